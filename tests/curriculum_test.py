"""Triples from easy to hard: how easy they are, the order of batches, what is refused."""

import types

import numpy as np
import pytest
from absl import flags
from rich.console import Console

from configs import base
from expandr_jax.config import read_config
from expandr_jax.data.triples import Triple, read_triples
from expandr_jax.errors import UserError
from expandr_jax.files.records import write_jsonl
from expandr_jax.objectives.contrastive_batches import ContrastiveExample, Passage
from expandr_jax.objectives.contrastive_steps import ContrastiveBatches
from expandr_jax.objectives.stored_examples import store_examples
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


def test_examples_in_files_are_as_easy(tmp_path):
    batches = batches_of([0.1, None, -2.0], 2)
    stored = store_examples(tmp_path, batches.examples)
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
