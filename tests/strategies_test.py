"""What strategies make of a query and its texts, by the methods' own formulas."""

import dataclasses
import types

import pytest

from configs import smoke
from expandr_jax.errors import UserError
from expandr_jax.expansion.expand import Expander, by_sample, make_expander
from expandr_jax.expansion.prompts import PROMPTS, Prompt
from expandr_jax.expansion.strategies import (
    STRATEGIES,
    Ask,
    Search,
    document_message,
    strategy,
)
from expandr_jax.search import Bm25Index

QUERY, TEXTS = "Who flew", ["One passage.", "Another one."]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("q2d", "Who flew Who flew Who flew Who flew Who flew One passage. Another one."),
        ("query2doc", "Who flew Who flew Who flew Who flew Who flew One passage. Another one."),
        ("q2e", "Who flew One passage. Another one."),
        ("q2q", "One passage. Another one."),
        ("rewrite", "One passage. Another one."),
        ("q2c", "Who flew Who flew Who flew Who flew Who flew One passage. Another one."),
        ("lamer", "Who flew One passage. Who flew Another one."),
        ("csqe", "who flew one passage. another one."),  # one passage, one extract: N = 1
        ("genqr", "Who flew One passage. Another one."),
        (
            "genqr-ensemble",
            "Who flew Who flew Who flew Who flew Who flew One passage. Another one.",
        ),
        ("qa-expand", "Who flew Who flew Who flew One passage. Another one."),
        ("reformer", "One passage. Another one."),
    ],
)
def test_the_query_of_bm25(name, expected):
    assert STRATEGIES[name].sparse(QUERY, TEXTS) == expected


def test_mugi_repeats_the_query_by_the_ratio_of_lengths():
    # 8 characters; texts of 143 and 144 fit twice and three times into six queries' lengths.
    for length, times in ((10, 1), (95, 1), (96, 2), (143, 2), (144, 3)):
        assert STRATEGIES["mugi"].sparse(QUERY, ["x" * length]).count(QUERY) == times


def test_csqe_repeats_the_query_once_a_pair():
    text = STRATEGIES["csqe"].sparse(QUERY, [f"T{i}" for i in range(10)])
    assert text == "who flew " * 5 + " ".join(f"t{i}" for i in range(10))


@pytest.mark.parametrize("name", STRATEGIES)
def test_without_texts_the_query_is_alone(name):
    found = STRATEGIES[name]
    assert found.sparse(QUERY, []) in (QUERY, QUERY.lower())
    assert found.dense(QUERY, [], 0.5).texts == []


@pytest.mark.parametrize(
    ("name", "texts", "weight", "kind"),
    [
        ("q2d", TEXTS, 0.7, "document"),
        ("hyde", TEXTS, 1 / 3, "document"),
        ("lamer", TEXTS, 1 / 3, "document"),
        ("csqe", TEXTS, 1 / 3, "document"),
        ("q2q", TEXTS, 0.0, "query"),
        ("rewrite", TEXTS, 0.0, "query"),
        ("query2doc", [f"Who flew [SEP] {text}" for text in TEXTS], 0.0, "query"),
        ("q2e", [f"Who flew {text}" for text in TEXTS], 0.0, "query"),
        ("q2c", [f"Who flew {text}" for text in TEXTS], 0.0, "query"),
        ("mugi", [f"Who flew {text}" for text in TEXTS], 0.0, "query"),
    ],
)
def test_what_is_encoded(name, texts, weight, kind):
    found = STRATEGIES[name].dense(QUERY, TEXTS, 0.7)
    assert (found.texts, STRATEGIES[name].kind) == (texts, kind)
    assert found.query_weight == pytest.approx(weight)


# Texts of a query that are used: five draws, ten prompts, what a last request says.
NEW = {"genqr": 5, "genqr-ensemble": 10, "qa-expand": 1, "reformer": 1}


def test_requests_and_samples():
    assert {name: STRATEGIES[name].samples for name in ("q2d", "mugi", "lamer", "csqe")} == {
        "q2d": 1, "mugi": 5, "lamer": 5, "csqe": 5,
    }  # fmt: skip
    for several in STRATEGIES.values():
        for ask in (step for step in several.steps if isinstance(step, Ask)):
            passages = ["found first", "found second"] if ask.prompt.shows_passages else ()
            text = ask.message(QUERY, passages, 100, lambda _: True, "One?\nTwo?")
            assert QUERY in text or "One?" in text
            assert ("2. found second" in text) is ("passages" in ask.prompt.fields)
            assert ("found first\n\nfound second" in text) is ("documents" in ask.prompt.fields)
    shows = {name for name, s in STRATEGIES.items() if s.asks[-1].prompt.shows_passages}
    assert shows == {"lamer", "csqe", "thinkqe"}
    searches = {n for n, s in STRATEGIES.items() if any(isinstance(x, Search) for x in s.steps)}
    assert searches == {*shows, "reformer"}
    assert {name: s.samples * len(s.asks) for name, s in STRATEGIES.items() if name in NEW} == NEW


def test_documents_are_cut_until_the_message_fits():
    (ask,) = STRATEGIES["lamer"].asks
    documents = ["a  b " * 100, "short", "c" * 500]

    def message(limit, shown=documents):
        return ask.message(QUERY, shown, most_characters=300, fits=lambda text: len(text) <= limit)

    whole = message(10_000)
    assert "2. short\n3. " + "c" * 300 + "\n" in whole
    assert "a b a b" in whole
    cut = message(400)
    assert 300 < len(cut) <= 400
    assert cut.startswith('Give a question "Who flew"')
    assert "3. " + "c" * 40 + "\n" in message(0)  # too long whatever is done
    assert "\n-\n" not in whole
    assert "1. -\n" in message(10_000, [])


def test_a_message_without_passages_is_not_measured():
    """There is nothing to cut, and to count the tokens of all queries takes its time."""

    def fits(text):
        raise AssertionError(text)

    (ask,) = STRATEGIES["q2d"].asks
    assert ask.message("Q", (), 300, fits) == PROMPTS["q2d"].message("Q")


def test_a_document_is_cut_until_its_message_fits():
    def message(limit):
        return document_message(
            "d2q", "a  b " * 100, most_characters=300, fits=lambda text: len(text) <= limit
        )

    assert "Document: " + "a b " * 75 + "\n" in message(10_000)
    assert 100 < len(message(200)) <= 200
    assert "a b " * 10 in message(0)


class Asked:
    """An expander of a strategy, with what it samples and searches for, step by step."""

    def __init__(self, tested, found):
        self.log = []
        sampler = types.SimpleNamespace(fits=lambda _: True)
        settings = smoke.get_config().expansion

        def search(step, asked, count):
            self.log.append((step.by, asked, count))
            return {query: [f"id of {p}" for p in found[query][:count]] for query in asked}

        corpus = {f"id of {p}": p for passages in found.values() for p in passages}
        self.expander = Expander(tested, sampler, settings, 100, search, corpus)

    def sample(self, step, requests):
        self.log.append((step.name, {request.id: request.prompt for request in requests}))
        return {(r.id, r.sample): f"{r.id} {step.name} {r.sample}" for r in requests}


FIRST, SHOWS = Ask("first", Prompt("say {query}", "")), Prompt("{query}:\n{passages}", "")
BOTH = {"a": "Who flew", "b": "Who fell"}


def test_steps_are_taken_in_turn_for_all_queries():
    tested = dataclasses.replace(STRATEGIES["csqe"], steps=(FIRST, Search(2), Ask("second", SHOWS)))
    asked = Asked(tested, {"a": ["u", "v", "w"], "b": []})
    texts = asked.expander.texts(BOTH, 2, asked.sample)
    assert asked.log == [
        ("first", {"a": "say Who flew", "b": "say Who fell"}),
        ("bm25", BOTH, 2),
        ("second", {"a": "Who flew:\n1. u\n2. v", "b": "Who fell:\n1. -"}),
    ]
    assert texts["b"] == [["b first 0", "b first 1"], ["b second 0", "b second 1"]]
    assert by_sample(texts["b"]) == [
        "b first 0", "b second 0", "b first 1", "b second 1",
    ]  # fmt: skip
    once, asked.log = asked.log, []
    assert asked.expander.messages(BOTH, asked.sample) == once[-1][1]
    assert asked.log == once[:-1]  # The last is for others to sample.


def test_a_text_that_is_not_used_is_shown_to_the_next_request():
    """QA-Expand: questions, their answers, and what is left of those."""
    asked = Asked(STRATEGIES["qa-expand"], {})
    said = {
        "qa-expand-questions": "1. Who?\n\n2) When?\n- Why?\nQ4: Where?",
        "qa-expand-answers": "Wilbur.\nIn 1903.",
        "qa-expand": "Wilbur flew in 1903.",
    }

    def sample(step, requests):
        asked.log.append(
            (step.name, [(r.sample, r.prompt.rpartition("\n\n")[2]) for r in requests])
        )
        return {(r.id, r.sample): f"{said[step.name]} {r.sample}" for r in requests}

    texts = asked.expander.texts({"a": QUERY}, 2, sample)
    answers = '{"answer1": "Wilbur.", "answer2": "In 1903. 0"}'
    refine = f'Initial query: "Who flew"\nAnswers: "{answers}"'
    questions = '{"question1": "Who?", "question2": "When?", "question3": "Why?"}'
    assert asked.log == [
        ("qa-expand-questions", [(0, 'Break the query into sub-questions: "Who flew"')]),
        ("qa-expand-answers", [(0, f'Questions to answer: "{questions}"')]),
        ("qa-expand", [(0, refine), (1, refine)]),
    ]
    assert texts["a"] == [["Wilbur flew in 1903. 0", "Wilbur flew in 1903. 1"]]
    asked.log.clear()
    message = asked.expander.messages({"a": QUERY}, sample)["a"]
    assert message.endswith(refine)
    assert len(asked.log) == 2


def test_questions_and_answers_are_read_with_their_lead_ins_too():
    asks = STRATEGIES["qa-expand"].steps
    said = 'Here are the questions:\n```json\n{"question1": "Who?", "question2": "When?"}\n```'
    for text in (said, "Sure! Here are 2 questions:\n1. Who?\n2. When?"):
        assert asks[1].shown(text) == {"questions": '{"question1": "Who?", "question2": "When?"}'}
    whole = '{"answer1": "1903 it was.", "answer2": "Nobody"}'
    assert asks[2].shown(whole) == {"answers": whole}
    assert asks[1].shown("") == {"questions": "{}"}


@pytest.mark.parametrize(
    ("said", "rule"),
    [
        ('{"pattern_name": "Generalization", "description": "Broadens', "Replace specific terms"),
        ("I take Clarify Subject, not Generalization.", "Replace or refine the main subject"),
        ("The third.", "Replace vague or ambiguous terms"),  # The first, where none is named.
    ],
)
def test_reformer_applies_the_pattern_that_is_named_first(said, rule):
    asked = Asked(STRATEGIES["reformer"], {"a": ["u", "v", "w", "x"]})
    prompts = {}

    def sample(step, requests):
        prompts[step.name] = requests.make("a")[0].prompt
        return {("a", 0): said if step.name == "reformer-pattern" else "Who flew first"}

    texts = asked.expander.texts({"a": QUERY}, 1, sample)
    assert asked.log == [("bm25", {"a": QUERY}, 3)]
    assert "Retrieved Documents:\nu\n\nv\n\nw\n\nAvailable" in prompts["reformer-pattern"]
    assert f"Transformation Rule: {rule}" in prompts["reformer"]
    assert texts["a"] == [["Who flew first"]]
    assert STRATEGIES["reformer"].sparse(QUERY, texts["a"][0]) == "Who flew first"


def test_a_search_sees_the_texts_so_far_and_may_pass_over_what_was_shown():
    again = Search(2, "dense", query=lambda query, texts: "|".join([query, *texts]), unseen=True)
    steps = (Search(2, unseen=True), Ask("one", SHOWS), again, Ask("two", SHOWS))
    asked = Asked(dataclasses.replace(STRATEGIES["q2d"], steps=steps), {"a": list("vwxyz")})
    asked.expander.texts({"a": "Q"}, 2, asked.sample)
    assert asked.log == [
        ("bm25", {"a": "Q"}, 2),
        ("one", {"a": "Q:\n1. v\n2. w"}),
        ("dense", {"a": "Q|a one 0|a one 1"}, 4),
        ("two", {"a": "Q:\n1. x\n2. y"}),
    ]


def passages_of(corpus, index, drop_identical_ids=False):
    return make_expander(
        smoke.get_config().expansion, None, corpus, index.search, None,
        most_characters=100, drop_identical_ids=drop_identical_ids,
    ).search  # fmt: skip


def test_passages_are_those_of_bm25_but_for_the_query_s_own_id():
    corpus = {"q": "the cat sat", "d1": "a dog ran", "d2": "the cat ran", "d3": "cat cat"}
    index = Bm25Index(list(corpus.values()))
    for drop, expected in ((False, {"q", "d2", "d3"}), (True, {"d2", "d3"})):
        search = passages_of(corpus, index, drop)
        found = search(Search(), {"q": "cat", "p": "bird"}, 10)
        assert {*found["q"]} == expected
        assert found["p"] == []  # No word in common.
        _, rows = index.search(["cat"], 4)
        best = [list(corpus)[row] for row in rows[0]]
        assert found["q"] == [d for d in best if d in found["q"]]
        assert search(Search(), {"q": "cat"}, 1)["q"] == found["q"][:1]


def test_ten_passages_are_shown_however_few_a_ranking_has():
    corpus = {f"d{i}": f"cat {i}" for i in range(15)}
    search = passages_of(corpus, Bm25Index(corpus.values()))
    assert len(search(Search(), {"q": "cat"}, Search().depth)["q"]) == 10


def test_a_template_of_the_config_takes_the_last_prompt_s_place():
    assert strategy("q2d") is STRATEGIES["q2d"]
    assert strategy("q2d", "Say {query}").asks[-1].message("Q", (), 9, bool) == "Say Q"
    shows = strategy("q2d", "{query} {passages}")
    assert [type(step) for step in shows.steps] == [Search, Ask]  # It has something to show.
    of_csqe = strategy("csqe", "{query} {passages}")
    assert [type(step) for step in of_csqe.steps] == [Ask, Search, Ask]
    assert of_csqe.asks[0] == STRATEGIES["csqe"].asks[0]
    with pytest.raises(UserError, match="strategy 'q2x' is unknown; there are q2d, "):
        strategy("q2x")
    with pytest.raises(UserError, match="template is 'nothing'"):
        strategy("q2d", "nothing")
