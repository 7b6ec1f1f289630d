"""A sparse encoder, trained by step A's losses, and the rows that search by it."""

import json
import pathlib

import numpy as np
import pytest
from rich.console import Console
from sentence_transformers import SparseEncoder

from eval.beir import evaluate_beir
from expandr_jax import metrics
from expandr_jax.errors import UserError
from expandr_jax.ranking.systems import parse_system
from tests.retriever_training_test import PAIRS, TINY, config_of, data, train  # noqa: F401

SPLADE = {"temperature": 1.0, "normalize": "none", "kl_weight": 0.0, "epochs": 30.0,
          "eval_every": 20, "batch_size": 16, "save_every": 20, "plain_share": 1.0}  # fmt: skip


def splade(data, **contrastive):  # noqa: F811
    config = config_of(data, **{**SPLADE, **contrastive})
    config.retriever.pooling, config.retriever.normalize = "splade", None
    return config


def test_names_of_its_rows():
    (plain, expanded) = parse_system("exp4fuse:splade:splade+q2d").parts
    assert (plain.retriever, expanded.retriever, expanded.strategy) == ("splade", "splade", "q2d")
    assert not expanded.needs_training
    for name in ("splade+rm3", "splade+prf-average"):
        with pytest.raises(UserError, match=r"expected splade\+ one of "):
            parse_system(name)


def test_what_a_sparse_retriever_cannot_be_is_said(data, tmp_path):  # noqa: F811
    for changes, message in (
        ({"retriever.bidirectional": True}, "are not for sparse vectors"),
        ({"contrastive.lora.rank": 2}, r"lora\.rank is 2; expected 0, as retriever\.pooling"),
    ):
        config = splade(data)
        with config.unlocked():
            config.update_from_flattened_dict(changes)
        with pytest.raises(UserError, match=message):
            train(config, tmp_path / message[:8])
    config = splade(data)
    with pytest.raises(UserError, match=r"evaluation\.splade\.source is ''; expected a sparse enc"):
        evaluate_beir(config, tmp_path / "out", [str(data / "dev")], ["splade"], "dev",
                      Console(quiet=True))  # fmt: skip


@pytest.mark.slow
def test_it_learns_words_that_queries_lack_and_its_rows_rank_by_it(data, tmp_path):  # noqa: F811
    """Only other words than the query's find its document; BM25 knows none."""
    config = splade(data, flops_query_weight=1e-2, flops_document_weight=1e-2, micro_batch=8)
    train(config, tmp_path / "run")
    lines = (tmp_path / "run/work/round-0/retriever-dev.jsonl").read_text().splitlines()
    values = [json.loads(line)["ndcg@10"] for line in lines]
    assert max(values) > values[0] + 0.3, values
    steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    terms = [step["document_terms"] for step in steps if "document_terms" in step]
    assert terms[-1] < 0.7 * terms[0], (terms[0], terms[-1])
    export = tmp_path / "run" / "export" / "retriever"
    config = splade(data)
    config.retriever.pooling = ""
    config.evaluation.splade.update(source=str(export), max_length=16)
    config.evaluation.query_weights, config.evaluation.samples = (0.5,), (1,)
    config.generator.source = str(pathlib.Path(TINY).parent / "tiny-llama")
    config.generator.compute_dtype, config.generator.slots = "float32", 16
    config.generator.prompt_buckets, config.expansion.max_new_tokens = (96,), 8
    names = ["bm25", "splade", "splade+q2d", "exp4fuse:splade:splade+q2d"]

    def rank(name):
        place = [str(data / "dev")]
        return evaluate_beir(config, tmp_path / name, place, names, "dev", Console(quiet=True))

    rows = {row["system"]: row["ndcg@10"] for row in rank("out")["dev"]["rows"]}
    assert rows["splade"] == pytest.approx(max(values), abs=1e-6)
    assert rows["splade"] > rows["bm25"] + 0.3
    peer = SparseEncoder(str(export), device="cpu")
    queries, documents = zip(*PAIRS, strict=True)
    scores = peer.similarity(peer.encode_query([*queries]), peer.encode_document([*documents]))
    run = metrics.read_trec(tmp_path / "out/runs/splade.trec")
    for number, row in enumerate(scores.numpy()):
        found = run[f"q{number}"]
        expected = {f"d{i}": float(score) for i, score in enumerate(row) if score > 0}
        for document, score in found.items():
            np.testing.assert_allclose(score, expected[document], atol=2e-3)
    assert list((tmp_path / "out/work").glob("splade.index-*/index.json"))
    assert rank("again") == rank("out")
