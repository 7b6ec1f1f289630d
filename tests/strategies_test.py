"""What strategies make of a query and its texts, by the methods' own formulas."""

import pytest

from expandr_jax.expansion.prompts import render
from expandr_jax.expansion.strategies import (
    STRATEGIES,
    document_message,
)

QUERY, TEXTS = "Who flew", ["One passage.", "Another one."]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("q2d", "Who flew Who flew Who flew Who flew Who flew One passage. Another one."),
        ("query2doc", "Who flew Who flew Who flew Who flew Who flew One passage. Another one."),
        ("q2e", "Who flew One passage. Another one."),
        ("q2c", "Who flew Who flew Who flew Who flew Who flew One passage. Another one."),
        ("lamer", "Who flew One passage. Who flew Another one."),
        ("csqe", "who flew one passage. another one."),  # one passage, one extract: N = 1
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
    strategy = STRATEGIES[name]
    assert strategy.sparse(QUERY, []) in (QUERY, QUERY.lower())
    assert strategy.dense(QUERY, [], 0.5).texts == []


@pytest.mark.parametrize(
    ("name", "texts", "weight", "kind"),
    [
        ("q2d", TEXTS, 0.7, "document"),
        ("hyde", TEXTS, 1 / 3, "document"),
        ("lamer", TEXTS, 1 / 3, "document"),
        ("csqe", TEXTS, 1 / 3, "document"),
        ("query2doc", [f"Who flew [SEP] {text}" for text in TEXTS], 0.0, "query"),
        ("q2e", [f"Who flew {text}" for text in TEXTS], 0.0, "query"),
        ("q2c", [f"Who flew {text}" for text in TEXTS], 0.0, "query"),
        ("mugi", [f"Who flew {text}" for text in TEXTS], 0.0, "query"),
    ],
)
def test_what_is_encoded(name, texts, weight, kind):
    strategy = STRATEGIES[name]
    found = strategy.dense(QUERY, TEXTS, 0.7)
    assert (found.texts, strategy.kind) == (texts, kind)
    assert found.query_weight == pytest.approx(weight)


def test_requests_and_samples():
    assert {name: STRATEGIES[name].samples for name in ("q2d", "mugi", "lamer", "csqe")} == {
        "q2d": 1, "mugi": 5, "lamer": 5, "csqe": 5,
    }  # fmt: skip
    for strategy in STRATEGIES.values():
        for request in strategy.requests:
            shown = ["found first", "found second"] if request.needs_passages else ()
            text = render(request.prompt, QUERY, passages=shown)
            assert QUERY in text
            assert ("2. found second" in text) is request.needs_passages
    needs = {name for name, s in STRATEGIES.items() if any(r.needs_passages for r in s.requests)}
    assert needs == {"lamer", "csqe"}


def test_documents_are_cut_until_the_message_fits():
    (request,) = STRATEGIES["lamer"].requests
    documents = ["a  b " * 100, "short", "c" * 500]

    def message(limit, shown=documents):
        return request.message(
            QUERY, shown, most_characters=300, fits=lambda text: len(text) <= limit
        )

    whole = message(10_000)
    assert "2. short\n3. " + "c" * 300 + "\n" in whole
    assert "a b a b" in whole
    cut = message(400)
    assert 300 < len(cut) <= 400
    assert cut.startswith('Give a question "Who flew"')
    assert "3. " + "c" * 40 + "\n" in message(0)  # too long whatever is done
    assert "\n-\n" not in whole
    assert "1. -\n" in message(10_000, [])


def test_a_document_is_cut_until_its_message_fits():
    def message(limit):
        return document_message(
            "d2q", "a  b " * 100, most_characters=300, fits=lambda text: len(text) <= limit
        )

    assert "Document: " + "a b " * 75 + "\n" in message(10_000)
    assert 100 < len(message(200)) <= 200
    assert "a b " * 10 in message(0)
