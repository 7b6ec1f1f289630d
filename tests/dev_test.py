"""What dev says of a model that is trained, against nDCG@10 by hand."""

import dataclasses
import io
import types

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from configs import base
from expandr_jax.config import read_config, with_settings
from expandr_jax.data.beir import Collection
from expandr_jax.ranking.dev import reranker_on_dev, retriever_on_dev
from expandr_jax.runtime.processes import Processes
from expandr_jax.runtime.progress import Reporter

IDS = [f"d{i}" for i in range(8)]
CONFIG = with_settings(read_config(base.get_config()), {"evaluation.rerank.depth": 3})
SETTINGS = CONFIG.evaluation
DEV = Collection(
    "dev", {name: f"text {name}" for name in IDS}, {"q0": "first", "q1": "second", "q2": "of test"},
    {"dev": {"q0": {"d2": 1}, "q1": {"d5": 1}}, "test": {"q2": {"d0": 1}}},
)  # fmt: skip


def gain(rank: int) -> float:
    """nDCG@10 of a query whose one relevant document is found there, counted from 1."""
    return 1 / np.log2(rank + 1)


@pytest.mark.parametrize("pooling", ["mean", "splade"])
def test_a_retriever_s_value_is_that_of_all_inner_products(pooling):
    def encode(texts, kind, progress=lambda count: None, **_):
        progress(len(texts))
        return np.stack(
            [np.random.default_rng([*text.encode()]).uniform(0.1, 1, 6) for text in texts]
        ).astype(np.float32)

    module = types.SimpleNamespace(config=types.SimpleNamespace(vocab_size=6))
    model = types.SimpleNamespace(pooling=pooling, module=module)
    retriever = types.SimpleNamespace(
        encoder=types.SimpleNamespace(retriever=model), encode=encode, processes=Processes(),
        reporter=Reporter(Console(file=io.StringIO())),
    )  # fmt: skip
    scores = encode(["first", "second"], "query") @ encode([*DEV.corpus.values()], "document").T
    order = np.argsort(-scores).tolist()
    expected = (gain(1 + order[0].index(2)) + gain(1 + order[1].index(5))) / 2
    assert retriever_on_dev(retriever, DEV, SETTINGS) == pytest.approx(expected)


def test_a_re_ranker_ranks_again_what_words_find_once():
    searched, output, judged = [], io.StringIO(), {**DEV.qrels["dev"]}
    dev = dataclasses.replace(DEV, qrels={"dev": judged})

    def search(queries, k):
        searched.append((queries, k))
        rows = np.array([[0, 2, 4], [6, 7, 5]])
        return np.array([[3.0, 2.0, 1.0], [3.0, 2.0, 0.0]], np.float32), rows

    class Scorer:
        def scores(self, params, query, documents, *, rows, cut):
            assert rows == SETTINGS.rerank.rows
            cut([False] * len(documents))
            names = [document.removeprefix("text d") for document in documents]
            return np.array([*map(float, names)]) * params["sign"].item()

    words = types.SimpleNamespace(search=search)
    evaluate = reranker_on_dev(
        Scorer(), dev, lambda: words, SETTINGS, Reporter(Console(file=output)), Processes()
    )
    assert not searched
    # d2 is the second of d4, d2, d0; words do not find d5, whose words are none of the query's.
    assert evaluate({"sign": jnp.array(1.0)}) == pytest.approx(gain(2) / 2)
    assert evaluate({"sign": jnp.array(-1.0)}) == pytest.approx(gain(2) / 2)
    judged["q0"] = {"d4": 1}
    assert evaluate({"sign": jnp.array(1.0)}) == pytest.approx(gain(1) / 2)
    assert evaluate({"sign": jnp.array(-1.0)}) == pytest.approx(gain(3) / 2)
    assert searched == [(["first", "second"], 3)]
