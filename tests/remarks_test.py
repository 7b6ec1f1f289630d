"""What a reader of a table is told below it: queries that find themselves, or nothing."""

import numpy as np
import pytest
from rich.console import Console

from configs import beir, smoke
from eval.beir import evaluate_beir
from expandr_jax import metrics
from expandr_jax.data.beir import Collection, write_beir
from expandr_jax.ranking.results import remarks

WORDS = ["array", "sort", "pad", "matrix", "inverse", "scale", "gradient", "list", "zero", "shape"]


def test_arguana_is_measured_as_beir_measures_it(tmp_path):
    """Each query is a document, by the same id, and is left out before the ranking is cut."""
    arguments = [f"argument {word} for {word} is good" for word in WORDS]
    corpus = {f"{word}a": text for word, text in zip(WORDS, arguments, strict=True)}
    corpus |= {f"{word}b": f"counter {word} is bad" for word in WORDS}
    queries = {name: text for name, text in corpus.items() if name.endswith("a")}
    qrels = {"test": {query: {f"{query[:-1]}b": 1} for query in queries}}
    path = tmp_path / "arguana"
    write_beir(path, Collection("arguana", corpus, queries, qrels))
    config = smoke.get_config()
    config.retriever.max_length = 64
    config.evaluation.update(query_weights=(0.5,), samples=(1,), depth=3)
    names, console = ["bm25", "dense", "rrf:bm25:dense"], Console(width=200, record=True)
    for drop in (beir.get_config(str(path)).evaluation.drop_identical_ids, False):
        config.evaluation.drop_identical_ids = drop
        out = tmp_path / str(drop)
        rows = evaluate_beir(config, out, [str(path)], names, "test", console)["arguana"]["rows"]
        for row in rows:
            run = metrics.read_trec(out / "runs" / f"{row['system']}.trec")
            assert all((query in found) != drop for query, found in run.items())
            assert {len(found) for found in run.values()} == {3}
            ranks = [[*found].index(f"{q[:-1]}b") if f"{q[:-1]}b" in found else None
                     for q, found in run.items()]  # fmt: skip
            gains = [0.0 if rank is None else 1 / np.log2(rank + 2) for rank in ranks]
            assert row["ndcg@10"] == pytest.approx(np.mean(gains), abs=1e-6)
        assert (rows[0]["ndcg@10"] == 1.0) == drop
        # Said below each form of the table, also where it is only shown again.
        texts = [console.export_text()]
        evaluate_beir(config, out, [str(path)], names, "test", console)
        texts += [(out / name).read_text() for name in ("results.md", "report.html")]
        for text in (*texts, console.export_text()):
            said = "bm25: 10 of 10 queries find the document of their own id" in text
            assert said != drop


def test_documents_of_their_query_s_id_are_counted():
    qrels = {"a": {"x": 1}, "b": {"y": 1}}
    run = {"a": {"a": 2.0, "x": 1.0}, "b": {"y": 1.0}}
    assert remarks("bm25", run, qrels) == [
        "bm25: 1 of 2 queries find the document of their own id; without these nDCG@10 is 1.0000, "
        "not 0.8155 (evaluation.drop_identical_ids)"
    ]


def test_queries_that_find_nothing_are_counted():
    qrels = {query: {"x": 1} for query in "abc"}
    assert remarks("bm25", {"a": {"x": 1.0}, "b": {}}, qrels) == [
        "bm25: 2 of 3 queries find no document"
    ]
    assert not remarks("bm25", {"a": {"x": 1.0}, "b": {"x": 1.0}}, qrels)


def test_ids_that_coincide_and_change_nothing_are_no_remark():
    """Numbers do in most collections, far down in a ranking: every row had such a remark."""
    documents = {str(number): 1.0 / number for number in range(1, 40)}
    qrels = {"39": {"1": 1}, "38": {"2": 1}}
    run = dict.fromkeys(qrels, documents)
    assert remarks("bm25", run, qrels) == []
    assert len(remarks("bm25", {"1": documents}, {"1": {"2": 1}})) == 1
