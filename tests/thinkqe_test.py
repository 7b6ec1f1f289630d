"""ThinkQE: its rounds, BM25's query, and a run that trains it and is asked with it."""

import json
import types

import pytest

from configs import smoke
from expandr_jax.expansion.expand import Expander
from expandr_jax.expansion.prompts import strip_lead_in
from expandr_jax.expansion.strategies import STRATEGIES, Ask, Search, accumulated
from expandr_jax.files.records import read_jsonl
from tests.commands import command, finish, start

THINKQE = STRATEGIES["thinkqe"]
SIZES = {"retriever_train": 8, "generator_train": 4, "dev": 4, "test": 4}
ROUNDS = ("thinkqe-1", "thinkqe-2", "thinkqe-3")


def test_the_query_stands_for_a_third_of_the_words():
    assert accumulated("Who flew", []) == "who flew"
    # 11 words of texts hold 2 words of a query five times, and 3 x 2 words once; 12 words twice.
    assert accumulated("Who flew", ["A " * 11]).count("who flew") == 1
    assert accumulated("Who flew", ["A " * 7, "b " * 5]).count("who flew") == 2
    assert accumulated("Who flew", ["One.", "Two."]) == "who flew one. two."


def test_each_round_shows_what_no_round_before_has_shown():
    assert [type(step) for step in THINKQE.steps] == [Search, Ask] * 3
    corpus = {f"d{i}": f"passage {i}" for i in range(25)}
    searched, shown = [], []

    def search(step, asked, count):
        searched.append((asked["q"], count))
        return {"q": [*corpus][:count]}

    def sample(step, requests):
        lines = next(iter(requests)).prompt.splitlines()
        shown.append([line for line in lines if "passage " in line])
        return {("q", r.sample): f"{step.name} {r.sample}" for r in requests}

    sampler = types.SimpleNamespace(fits=lambda _: True)
    settings = smoke.get_config().expansion
    expander = Expander(THINKQE, sampler, settings, 100, search, corpus)
    texts = expander.texts({"q": "Who"}, 2, sample)
    assert searched == [
        ("Who", 10),
        ("who thinkqe-1 0 thinkqe-1 1", 20),
        # Eight words hold a query of one word twice, at three words a time.
        ("who who thinkqe-1 0 thinkqe-1 1 thinkqe-2 0 thinkqe-2 1", 30),
    ]
    numbers = [[int(line.split("passage ")[1].split()[0]) for line in several if ". " in line]
               for several in shown]  # fmt: skip
    assert numbers == [[*range(10)], [*range(10, 20)], [*range(20, 25)]]
    assert texts["q"] == [[f"{name} {i}" for i in range(2)] for name in ROUNDS]


def test_thoughts_are_no_part_of_a_text():
    assert strip_lead_in("Hm.\nA </think> or so?\n</think>\n\nHere is a passage: Bees.") == "Bees."
    assert strip_lead_in("Still thinking") == "Still thinking"


@pytest.mark.slow
def test_a_run_trains_it_and_is_asked_with_it(tmp_path):
    settings = [f"data.max_{name}={count}" for name, count in SIZES.items()]
    settings += ["expansion.strategy=thinkqe", "evaluation.systems=('expandr','expandr-plain')"]
    finish(start(tmp_path, *(f"--config.{setting}" for setting in settings)))
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["system"] for row in results["rows"]] == ["expandr", "expandr-plain"]
    # A sample is three texts, one a round; one sample for training, one or two for evaluation.
    expansions = [row for _, row in read_jsonl(tmp_path / "round-0" / "expansions.jsonl", {})]
    assert [row["sample"] for row in expansions] == [0, 1, 2] * 8
    assert results["chosen"]["expandr"]["samples"] in (3, 6)
    for name in ("expansions", "candidates"):
        journals = {path.name for path in (tmp_path / "work" / "round-0").glob(f"{name}*.jsonl")}
        expected = {f"{name}-{each}.jsonl" for each in ROUNDS[:2]} | {f"{name}.jsonl"}
        assert journals == expected
    # The candidates are the last round's; their prompt shows what was found for the query.
    candidates = [row for _, row in read_jsonl(tmp_path / "round-0" / "candidates.jsonl", {})]
    pairs = [row for _, row in read_jsonl(tmp_path / "round-0" / "preferences.jsonl", {})]
    prompts = {row["query_id"]: row["prompt"] for row in candidates}
    assert pairs
    for pair in pairs:
        assert pair["prompt"] == prompts[pair["query_id"]]
        assert "\n1. " in pair["prompt"]
    output = finish(command("eval.search", f"--workdir={tmp_path}", "scale the gradient"))
    assert output.count("expansion:") == results["chosen"]["expandr"]["samples"]
