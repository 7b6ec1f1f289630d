"""`rerank:SYSTEM` in eval.beir and train.joint, against sentence-transformers' cross-encoder."""

import io
import json
import re
import shutil

import pytest
import sentence_transformers
from rich.console import Console

from configs import smoke as smoke_config
from eval.beir import evaluate_beir
from expandr_jax import metrics
from expandr_jax.data.beir import Collection, read_beir, write_beir
from expandr_jax.errors import UserError
from expandr_jax.ranking import rerank
from tests.commands import finish, start
from tests.cross_encoder_test import save
from tests.file_options import edit

DEPTH, LENGTH = 3, 32
IDENTITY = {"activation_fn": "torch.nn.modules.linear.Identity"}
DOCUMENTS = [
    "clip the norm", "pad an array", "scale a gradient", "the learning rate of an optimizer",
    "an array of zeros", "sort a list", "state of the optimizer " * 30, "momentum",
]  # fmt: skip
QUERIES = ["norm of an array", "clip a gradient", "optimizer state", "list of zeros"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model"), "bert", sentence_transformers=IDENTITY)


def assert_ranked_again(runs, collection, names, source, **limits):
    """Each run's first documents have the scores of pairs; the others follow in their order."""
    model, compared = sentence_transformers.CrossEncoder(str(source), device="cpu", **limits), 0
    for name in names:
        before = metrics.read_trec(runs / f"{name}.trec")
        again = metrics.read_trec(runs / f"rerank:{name}.trec")
        assert before.keys() == again.keys()
        for query, scores in before.items():
            first, rest = list(scores)[:DEPTH], list(scores)[DEPTH:]
            text = collection.queries[query]
            expected = model.predict([(text, collection.corpus[d]) for d in first])
            found = [again[query][document] for document in first]
            assert found == pytest.approx(expected.tolist(), abs=1e-4)
            compared += 1
            assert list(again[query])[DEPTH:] == rest
    assert compared > len(names)


def test_it_reads_the_first_documents_of_any_system_and_orders_them_again(tmp_path, source):
    source = shutil.copytree(source, tmp_path / "model")
    corpus = {f"d{i}": document for i, document in enumerate(DOCUMENTS)}
    queries = {f"q{i}": query for i, query in enumerate(QUERIES)}
    qrels = {"test": {query: {"d0": 1} for query in queries}}
    write_beir(tmp_path / "set", Collection("set", corpus, queries, qrels))
    config, output = smoke_config.get_config(), io.StringIO()
    config.evaluation.query_weights, config.evaluation.samples = (0.5,), (1,)
    config.evaluation.rerank.update(source=str(source), depth=DEPTH, max_length=LENGTH)
    names = ["dense", "rerank:dense", "rerank:rrf:bm25:dense"]

    def evaluate(workdir):
        console = Console(file=output, width=200)
        return evaluate_beir(config, workdir, [str(tmp_path / "set")], names, "test", console)

    found = evaluate(tmp_path / "out")["set"]
    peer = sentence_transformers.CrossEncoder(str(source), device="cpu")
    for name in ("dense", "rrf:bm25:dense"):
        first = metrics.read_trec(tmp_path / "out/runs" / f"{name}.trec")
        pairs = [(queries[q], corpus[d]) for q, found in first.items() for d in list(found)[:DEPTH]]
        lost = sum(len(peer.tokenizer(*pair)["input_ids"]) > LENGTH for pair in pairs)
        told = (
            rf"rerank:{name}: {lost} of {len(pairs)} pairs of a query and a document .* are longer"
        )
        assert bool(re.search(told, output.getvalue())) == bool(lost), (lost, output.getvalue())
    assert lost
    assert [row["system"] for row in found["rows"]] == names
    collection = read_beir(tmp_path / "set")
    compared = ["dense", "rrf:bm25:dense"]
    assert_ranked_again(tmp_path / "out/runs", collection, compared, source, max_length=LENGTH)
    # Another model by the same name is told, also where nothing is left to do.
    edit(source / "config.json", sentence_transformers={})
    rerank._loaded.cache_clear()
    with pytest.raises(UserError, match=r"^evaluation\.rerank\.source, what its files say: is not"):
        evaluate(tmp_path / "out")
    config.evaluation.rerank.source = ""
    with pytest.raises(UserError, match=r"evaluation\.rerank\.source is ''; expected a cross-enc"):
        evaluate(tmp_path / "none")
    config.evaluation.rerank.source = config.retriever.source
    with pytest.raises(UserError, match=r"tensors are missing: .*classifier"):
        evaluate(tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_a_run_ranks_its_rows_again(tmp_path, source):
    workdir = tmp_path / "run"
    systems = "('bm25','expandr','rerank:expandr','rerank:rrf:bm25:expandr','rrf:bm25:expandr')"
    rerank = [f"--config.evaluation.rerank.{n}" for n in (f"source={source}", f"depth={DEPTH}")]
    finish(start(workdir, f"--config.evaluation.systems={systems}", *rerank))
    rows = json.loads((workdir / "results.json").read_text())["rows"]
    assert [row["system"] for row in rows][2] == "rerank:expandr"
    collection = read_beir(workdir / "data")
    assert_ranked_again(workdir / "runs", collection, ["expandr", "rrf:bm25:expandr"], source)
