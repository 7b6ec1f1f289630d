"""The baselines of `train.joint`: who is trained on which queries, with which negatives."""

import contextlib
import io
import types

import pytest
from rich.console import Console

from configs import smoke as smoke_config
from expandr_jax.config import read_config, with_settings
from expandr_jax.data.beir import Collection
from expandr_jax.data.training_data import TrainingData
from expandr_jax.runtime.processes import Processes
from expandr_jax.runtime.progress import Reporter
from expandr_jax.runtime.run import Run
from expandr_jax.vectors.corpus import Corpus
from tests.ranker_test import SEARCH, encode
from train import joint

CORPUS = {f"d{i}": f"text {i}" for i in range(30)}
QUERIES = {f"q{i}": f"query {i}" for i in range(24)}
QRELS = {"train": {f"q{i}": {f"d{i}": 1} for i in range(24)}}
STEP_A, STEP_B = list(QUERIES)[:16], list(QUERIES)[16:]


@pytest.mark.parametrize("name", ["fine-tuned", "fine-tuned-all"])
def test_a_baseline_has_its_queries_and_as_many_updates_as_step_a(monkeypatch, tmp_path, name):
    told = []

    def train(run, models, start, triples, **options):
        told.append((start, [*triples], options))
        return "trained"

    monkeypatch.setattr(joint, "train_retriever", train)
    vectors = encode(list(CORPUS.values()), "document", list(CORPUS))
    retriever = types.SimpleNamespace(
        corpus=Corpus(list(CORPUS), vectors, SEARCH), params="before training",
        processes=Processes(), reporter=Reporter(Console(file=io.StringIO())),
        encode=lambda texts, kind, **_: encode(texts, kind, texts), release=lambda: None,
    )  # fmt: skip
    settings = {"contrastive.batch_size": 8, "contrastive.epochs": 3.0, "mining.depth": 10}
    config = with_settings(read_config(smoke_config.get_config()), settings)
    data = TrainingData(Collection("toy", CORPUS, QUERIES, QRELS), STEP_A, STEP_B)
    given = {query: ["a negative of step A"] for query in STEP_A}
    models = types.SimpleNamespace(encoder=None)
    with contextlib.closing(Run(tmp_path, config, Console(file=io.StringIO()))) as run:
        for _ in range(2):  # Also after a restart, which mines nothing again.
            made = joint._baseline(run, models, data, given, retriever, name)
            assert made == "trained"
            retriever.encode = None
    (start, triples, options), again = told
    assert again == told[0]
    ids = [*STEP_A, *STEP_B] if name == "fine-tuned-all" else STEP_A
    assert options["ids"] == ids
    assert options["phase"] == name
    assert options["updates"] == 6  # Three passes over step A's two batches, whoever is trained.
    assert options["samples"] == 0
    assert start == "before training"
    assert [triple.query for triple in triples] == [QUERIES[query] for query in ids]
    for query, triple in zip(ids, triples, strict=True):
        assert triple.positives == (CORPUS[f"d{query[1:]}"],)
        assert not triple.expansions
        if query in STEP_A:
            assert triple.negatives == ("a negative of step A",)
        else:  # Mined, as theirs were.
            assert len(triple.negatives) >= 1
            assert {*triple.negatives} <= {*CORPUS.values()} - {*triple.positives}
