"""Which systems an evaluation ranks, in which order, and what still stands of one before."""

import pytest

from expandr_jax.ranking.choices import DevChoices, PartWeights
from expandr_jax.ranking.evaluated import Evaluated, Evaluation, standing
from expandr_jax.ranking.systems import parse_systems

RETRIEVERS = ["zero-shot", "fine-tuned", "expandr"]
QRELS = {"q": {"d": 1}}


class Ranker:
    """Says in which order it was asked; each system finds another document."""

    def __init__(self, ids=("q",)):
        self.ids, self.answers, self.ranked = [*ids], {}, []

    def rank(self, system):
        self.ranked.append(system.name)
        return {"q": {system.name: 1.0}}

    def index_recall(self, system):
        return {"system": system.name, "queries": 1} if system.name == "zero-shot" else None

    def encoded(self, leaf):
        return f"vectors of {leaf.name}"


def evaluation(names, found=None, grid=lambda _: [], is_main=True):
    rankers = {"dev": Ranker(), "test": Ranker()}
    choices = DevChoices(lambda: rankers["dev"], QRELS, grid, made={}, is_main=is_main)
    told = []

    def sampled(system, encoded):
        told.append((system.name, dict(encoded)))
        return [{"system": system.name, "query_id": "q"}]

    made = Evaluation(
        parse_systems(names), RETRIEVERS, rankers, choices, QRELS, found or Evaluated(), sampled,
        is_main,
    )  # fmt: skip
    for system in made.left:
        made.rank(system)
    return made, rankers, told


def test_systems_of_one_retriever_follow_each_other_and_parts_come_first():
    names = ["rrf:expandr-plain:zero-shot", "fine-tuned", "rrf:bm25:fine-tuned", "zero-shot"]
    made, rankers, _ = evaluation(names)
    ranked = rankers["test"].ranked
    assert ranked == [
        "bm25", "zero-shot", "fine-tuned", "rrf:bm25:fine-tuned", "expandr-plain",
        "rrf:expandr-plain:zero-shot",
    ]  # fmt: skip
    assert not rankers["dev"].ranked
    assert made.found.recalls == {"zero-shot": {"system": "zero-shot", "queries": 1}}
    results = made.results("toy", all_chosen=False)
    assert [row["system"] for row in results["rows"]] == names
    assert results["index_recall"] == [{"system": "zero-shot", "queries": 1}]
    assert results["chosen"] == {}


def test_what_stands_is_not_ranked_again_but_on_dev_where_a_choice_needs_it():
    fused = "interpolation:bm25:zero-shot"
    found = Evaluated(runs={name: {"q": {name: 1.0}} for name in ("bm25", "zero-shot")})
    grid = [PartWeights((0.5, 0.5))]
    made, rankers, _ = evaluation(
        ["bm25", "zero-shot", fused], found, lambda system: grid if system.parts else []
    )
    assert rankers["dev"].ranked == ["bm25", "zero-shot"]
    assert rankers["test"].ranked == [fused]
    assert [*made.found.runs] == ["bm25", "zero-shot", fused]
    made, rankers, _ = evaluation(["bm25", "zero-shot"], found)
    assert not made.left


@pytest.mark.parametrize("is_main", [True, False])
def test_samples_are_told_of_our_own_passages_in_process_0(is_main):
    found = Evaluated(samples=[{"system": "expandr"}, {"system": "zero-shot"}])
    made, _, told = evaluation(["zero-shot", "expandr"], found, is_main=is_main)
    both = dict.fromkeys(("dev", "test"), "vectors of expandr")
    assert told == [("expandr", both)] * is_main
    rows = made.rows()["samples"]
    assert [row["system"] for row in rows] == ["zero-shot", "expandr"]
    assert ("query_id" in rows[1]) is is_main  # What was told of it before is not, any more.


@pytest.mark.parametrize(
    ("rounds", "rows", "stands"),
    [
        (1, ["bm25", "expandr"], {"bm25", "expandr", "zero-shot", "rrf:bm25:zero-shot"}),
        (2, ["bm25"], {"bm25", "zero-shot", "rrf:bm25:zero-shot"}),
    ],
)
def test_after_a_further_round_what_rests_on_the_last_pair_does_not_stand(rounds, rows, stands):
    systems = parse_systems(["bm25", "expandr", "rrf:bm25:zero-shot"])
    assert standing(systems, ["expandr", "bm25", "gone"], rounds) == (rows, stands)
