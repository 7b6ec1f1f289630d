"""Triples from easy to hard, what FiGRet makes of failed queries, and the queries that are hard."""

import json
import shutil
import signal
import time
import types

import numpy as np
import pytest
from absl import flags
from rich.console import Console
from sentence_transformers import SentenceTransformer

from configs import base
from expandr_jax.config import read_config
from expandr_jax.data.triples import Triple, read_triples
from expandr_jax.errors import UserError
from expandr_jax.files.records import write_jsonl
from expandr_jax.objectives.contrastive_batches import ContrastiveExample, Passage
from expandr_jax.objectives.contrastive_steps import ContrastiveBatches
from expandr_jax.objectives.figret import easier_triples, failed_queries, with_margin
from expandr_jax.objectives.packed_examples import pack_examples
from expandr_jax.objectives.stored_examples import store_examples
from expandr_jax.ranking.results import hardest, of_some
from expandr_jax.vectors.stored import open_vectors
from tests.commands import command, finish, start, step_metrics
from tests.retriever_training_test import TINY
from train.retriever import train_on_triples


def test_how_easy_a_triple_is():
    scored = Triple("q", ("a", "b"), ("c", "d"), teacher_scores=(0.9, 0.75, 0.25, 0.5))
    assert scored.ease == 0.25  # The worst positive against the best negative.
    assert Triple("q", ("a",), ("c",), teacher_scores=(0.5, 2.0)).ease == -1.5
    assert Triple("q", ("a",), ("c",), teacher_scores=(0.5, 2.0), margin=3.0).ease == 3.0
    assert Triple("q", ("a",), teacher_scores=(0.5,)).ease is None
    assert Triple("q", ("a",), ("c",)).ease is None


def batches_of(eases, size, seed=3):
    settings = types.SimpleNamespace(
        batch_size=size, negatives=0, plain_share=0.0, length_window=0, curriculum=True
    )
    examples = [
        ContrastiveExample([i], (), Passage([i], f"text {i}"), ease=ease)
        for i, ease in enumerate(eases)
    ]
    return ContrastiveBatches(examples, settings, 0, seed, 0, 16, range(100))


def epochs_of(batches, count):
    each = batches.per_epoch
    return [
        [i for number in range(epoch * each, (epoch + 1) * each) for i in batches.draw(number)]
        for epoch in range(count)
    ]


def test_each_pass_goes_from_wide_to_narrow_margins():
    worked = batches_of([0.1, 3.0, -2.0, 0.5], 2)
    assert [[*worked.draw(number)] for number in range(4)] == [[1, 3], [0, 2]] * 2
    assert [*worked.draw(3, slice(1, 2))] == [2]  # A process asks for some rows of a step.
    eases = np.random.default_rng(0).integers(0, 5, 50) / 4
    passes = epochs_of(batches_of(eases, 8), 6)
    for order in passes:
        assert len({*order}) == len(order) == 48
        assert (np.diff(eases[order]) <= 0).all()
    # Those that are alike come in another order, and others are left out, in each.
    assert len({tuple(order) for order in passes}) == 6
    assert {*range(50)} == set().union(*passes)
    again = batches_of(eases, 8)  # After a restart, whatever was asked for before.
    assert [*again.draw(29)] == passes[4][40:]
    assert [*again.draw(3)] == passes[0][24:32]


def test_examples_in_files_are_as_easy():
    batches = batches_of([0.1, None, -2.0], 2)
    stored = store_examples([pack_examples(batches.examples)])
    assert [example.ease for example in stored] == [0.1, None, -2.0]


def config_of(path, **contrastive):
    config = base.get_config()
    config.data.kind, config.data.path = "triples", str(path)
    config.retriever.source, config.retriever.max_length = TINY, 16
    config.contrastive.update({"batch_size": 8, "negatives": 1, "curriculum": True, **contrastive})
    return config


def test_what_has_no_margin_is_named(tmp_path):
    rows = [{"query": f"q {i}", "pos": f"p {i}", "neg": f"n {i}", "margin": i} for i in range(8)]
    path = tmp_path / "triples.jsonl"
    write_jsonl(path, [*rows[:4], {**rows[4], "margin": None}, *rows[5:]])
    with pytest.raises(UserError, match=r"^training query triples\.jsonl:5 has neither a margin"):
        train_on_triples(config_of(path), tmp_path / "run", Console(quiet=True))
    write_jsonl(path, [{**rows[0], "margin": "wide"}])
    with pytest.raises(UserError, match=r"triples\.jsonl:1: field \"margin\" is no finite number"):
        read_triples(path)
    with pytest.raises(UserError, match=r"^contrastive\.length_window is 2; expected 0"):
        read_config(config_of(path, length_window=2))


@pytest.mark.slow
def test_a_retriever_is_trained_in_this_order(tmp_path, monkeypatch):
    rows = [
        {"query": f"shape {i}", "pos": f"array {i}", "neg": f"norm {i}",
         "teacher_scores": [float(i % 5), 0.5]}
        for i in range(24)
    ]  # fmt: skip
    write_jsonl(tmp_path / "triples.jsonl", rows)
    seen, contents = [], ContrastiveBatches.contents

    def recorded(self, number, *args):
        made = contents(self, number, *args)
        seen.append((number, made.ids))
        return made

    monkeypatch.setattr(ContrastiveBatches, "contents", recorded)
    config = config_of(tmp_path / "triples.jsonl", epochs=2.0)
    flags.FLAGS.mark_as_parsed()  # Which Grain reads; train.launch parses them.
    config.mesh.workers = 1
    train_on_triples(config, tmp_path / "run", Console(quiet=True))
    ids = [
        int(name.partition(":")[2]) - 1 for _, names in sorted(dict(seen).items()) for name in names
    ]
    for order in (ids[:24], ids[24:]):
        assert sorted(order) == [*range(24)]
        assert (np.diff([i % 5 for i in order]) <= 0).all()


def test_queries_fail_whose_documents_are_all_below_the_rank():
    found = np.array([[5, 1, 7], [2, 3, 4], [9, 8, 0]])
    relevant = [[1, 9], [6], [0]]
    assert failed_queries(found, relevant, 3) == [1]
    assert failed_queries(found, relevant, 2) == [1, 2]
    assert failed_queries(found, relevant, 1) == [0, 1, 2]


def test_what_is_written_becomes_triples_with_margins():
    own = Triple("q", ("right", "also right"), ("wrong",))
    made = easier_triples(own, ["easy", "half", "noise"])
    assert made == {
        "relevance": Triple("q", ("easy",), ("wrong",)),
        "completeness": Triple("q", ("easy",), ("half",)),
        "purity": Triple("q", ("easy",), ("noise",)),
        "judged": own,
    }
    assert [*easier_triples(own, ["", "half", "noise"])] == ["judged"]
    assert [*easier_triples(own, ["easy", "", "easy"])] == ["relevance", "judged"]
    alone = easier_triples(Triple("q", ("right",)), ["easy", "half", "noise"])
    assert [*alone] == ["completeness", "purity"]  # Nothing is known to be wrong.
    vectors = {"easy": [1.0, 0.0], "wrong": [0.5, 1.0], "right": [0.0, 2.0], "also right": [0.2, 0]}
    vectors = {text: np.array(vector) for text, vector in vectors.items()}
    query = {"q": np.array([1.0, 0.5])}
    assert with_margin(made["relevance"], query, vectors).ease == 1.0 - 1.0
    assert with_margin(own, query, vectors).ease == pytest.approx(0.2 - 1.0)


def test_the_hardest_queries_are_those_whose_documents_a_run_ranks_last():
    run = {
        "a": {"d1": 3.0, "d2": 2.0},
        "b": {"d1": 3.0, "d2": 2.0},
        "c": {"d1": 1.0},
        "d": {"d4": 1.0, "d1": 2.0, "d2": 1.5},
    }
    qrels = {"a": {"d1": 1}, "b": {"d2": 1, "d1": 0}, "c": {"d2": 1}, "d": {"d4": 2}, "e": {"d": 1}}
    assert hardest(run, qrels, 1.0) == {"c": None, "e": None, "d": 3, "b": 2, "a": 1}
    assert [*hardest(run, qrels, 0.6)] == ["c", "e", "d"]
    assert [*hardest(run, qrels, 0.01)] == ["c"]
    values = {name: {"mrr": {q: x * i for i, q in enumerate("abc")}} for name, x in
              (("one", 1.0), ("two", 2.0))}  # fmt: skip
    some = of_some(values, {"b", "c"}, [("two", "one")])
    assert some["queries"] == 2
    assert some["rows"] == [{"system": "one", "mrr": 1.5}, {"system": "two", "mrr": 3.0}]
    assert [(t["system"], t["difference"]) for t in some["significance"]] == [("two", 1.5)]


FIGRET = ("--config.figret.rank=1",)
SAME = ("results.json", "round-0/figret.jsonl", "evaluation/hardest.jsonl",
        "runs/expandr-figret.trec", "runs/expandr-figret-control.trec")  # fmt: skip


@pytest.mark.slow
def test_a_finished_run_is_given_the_turn_and_a_kill_changes_nothing(smoke, tmp_path):
    """The rows that there were stay. It is killed in the turn."""
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    for copy in (whole, workdir):
        shutil.copytree(smoke[0], copy)
    printed = finish(start(whole, *FIGRET))
    assert "queries have no relevant document above the rank" in printed
    before, after = (json.loads((w / "results.json").read_text()) for w in (smoke[0], whole))
    count = len(before["rows"])
    assert after["rows"][:count] == before["rows"]
    added = [row["system"] for row in after["rows"][count:]]
    assert added == ["expandr-figret", "expandr-figret-control"]
    assert [row["system"] for row in after["hardest"]["rows"]] == [
        row["system"] for row in after["rows"]
    ]
    assert after["hardest"]["queries"] == round(0.25 * after["queries"])
    pairs = {(t["system"], t["baseline"]) for t in after["hardest"]["significance"]}
    assert pairs >= {(added[0], added[1]), (added[0], "expandr-plain"), ("expandr", "bm25")}

    lines = [json.loads(line) for line in (whole / "round-0/figret.jsonl").read_text().splitlines()]
    assert {line["aim"] for line in lines} == {"relevance", "completeness", "purity", "judged"}
    steps = [m["phase"] for m in step_metrics(whole)]
    turns = [steps.count(f"{name}-0") for name in added]
    assert turns[0] == turns[1] == 2 * (len(lines) // 8)

    _check_export(whole, smoke[0])
    process, limit = start(workdir, *FIGRET), time.monotonic() + 240
    while not any(workdir.glob("checkpoints/expandr-figret-0/[0-9]*")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < limit
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    finish(start(workdir, *FIGRET))
    for name in SAME:
        assert (workdir / name).read_bytes() == (whole / name).read_bytes(), name
    assert step_metrics(workdir) == step_metrics(whole)
    assert "all is done" in finish(start(workdir, *FIGRET))


def _check_export(workdir, plain):
    """sentence-transformers has of the turn's export the vectors that its row was ranked by."""
    export = workdir / "export" / "retriever-figret"
    peer = SentenceTransformer(str(export), device="cpu")
    rows = [json.loads(line) for line in (workdir / "data/corpus.jsonl").read_text().splitlines()]
    texts = [row["text"] for row in rows[:40]]
    vectors = open_vectors(workdir / "work/vectors/expandr-figret.npy")
    np.testing.assert_allclose(peer.encode_document(texts), vectors[:40], atol=2e-4)
    before = open_vectors(workdir / "work/vectors/expandr.npy")
    assert np.abs(before[:40] - vectors[:40]).max() > 1e-3
    for name in ("retriever", "adapter"):  # What was there is as it was.
        for path in (plain / "export" / name).rglob("*.safetensors"):
            again = workdir / path.relative_to(plain)
            assert again.read_bytes() == path.read_bytes(), path
    to = workdir.parent / "exported"
    finish(command("train.export", f"--workdir={workdir}", f"--to={to}",
                   "--format=retriever-figret"))  # fmt: skip
    assert (to / "model.safetensors").read_bytes() == (export / "model.safetensors").read_bytes()
