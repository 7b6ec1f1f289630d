"""Published and measured results, reproduced on a real collection where it is there."""

import json
import pathlib
import subprocess

import bm25s
import numpy as np
import pytest

from expandr_jax.data.beir import read_beir
from expandr_jax.search import Bm25Index
from tests.commands import ROOT, command

CRANFIELD = ROOT.parent / "shared" / "data" / "cranfield"
needs_cranfield = pytest.mark.skipif(not CRANFIELD.exists(), reason=f"{CRANFIELD} is not there")

WORDS = 20_000  # Size of the synthetic set's vocabulary.
PASSAGES = 500_000
QUERIES = 200
MOST_BYTES = 3 * 10**9


@needs_cranfield
def test_bm25_equals_bm25s():
    collection = read_beir(CRANFIELD)
    texts, queries = list(collection.corpus.values()), list(collection.queries.values())
    theirs = bm25s.BM25(method="lucene", k1=0.9, b=0.4)
    theirs.index(bm25s.tokenize(texts, show_progress=False), show_progress=False)
    tokens = bm25s.tokenize(queries, return_ids=False, show_progress=False)
    _, expected = theirs.retrieve(tokens, k=100, show_progress=False)
    scores, indices = Bm25Index(texts).search(queries, 100)
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    for row, words in enumerate(tokens):  # Every document's score, whatever the order of ties.
        everywhere = theirs.get_scores([word for word in words if word in theirs.vocab_dict])
        np.testing.assert_allclose(scores[row], everywhere[indices[row]], rtol=1e-5)


@pytest.mark.slow
@needs_cranfield
def test_minilm_on_cranfield(tmp_path):
    options = ["--systems=dense", "--config.retriever.max_length=256"]
    process = command("eval.beir", f"--data={CRANFIELD}", f"--workdir={tmp_path / 'out'}", *options)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    # As sentence-transformers gives them on the same 75 test queries.
    assert row["ndcg@10"] == pytest.approx(0.3992, abs=1e-3)
    assert row["recall@100"] == pytest.approx(0.7816, abs=1e-3)
    assert row["map"] == pytest.approx(0.3394, abs=1e-3)


def write_large_set(directory: pathlib.Path) -> None:
    """Passages of 40 words; a query is eight words of one of them, which is right for it."""
    random = np.random.default_rng(0)
    words = np.array([f"word{i}" for i in range(WORDS)])
    (directory / "qrels").mkdir(parents=True)
    asked = {}
    with open(directory / "corpus.jsonl", "w") as file:
        for start in range(0, PASSAGES, 10_000):
            for number, row in enumerate(random.integers(0, WORDS, (10_000, 40)), start=start):
                text = " ".join(words[row])
                file.write(f'{{"_id": "d{number}", "title": "", "text": "{text}"}}\n')
                if number % (PASSAGES // QUERIES) == 0:
                    asked[f"d{number}"] = " ".join(words[row[:8]])
    with open(directory / "queries.jsonl", "w") as file:
        for number, text in enumerate(asked.values()):
            file.write(json.dumps({"_id": f"q{number}", "text": text}) + "\n")
    lines = "".join(f"q{number}\t{document}\t1\n" for number, document in enumerate(asked))
    (directory / "qrels" / "test.tsv").write_text(lines)


@pytest.mark.slow
def test_half_a_million_passages_in_under_three_gigabytes(tmp_path, capsys):
    data = tmp_path / "large"
    write_large_set(data)
    options = ["--config=configs/smoke.py", "--config.retriever.tokens_per_batch=16384"]
    options += ["--systems=bm25,dense", f"--data={data}", f"--workdir={tmp_path / 'out'}"]
    process = command("eval.beir", *options)
    output, _ = process.communicate(timeout=580)
    assert process.returncode == 0, output
    phases = json.loads((tmp_path / "out" / "timings.json").read_text())["phases"]
    memory = {row["phase"]: row["peak_memory_bytes"] for row in phases}
    rows = {
        row["system"]: row["recall@100"]
        for row in json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    }
    peak = max(memory.values())
    with capsys.disabled():
        print(f"\n{PASSAGES:,} passages, peak memory in GB, recall@100:")
        print({name: round(value / 1e9, 2) for name, value in memory.items()}, rows)
    assert rows["bm25"] == 1.0
    assert rows["dense"] > 0.5  # A random model that reads 16 tokens, among 500,000 passages.
    assert peak < MOST_BYTES
    for path in (data, tmp_path / "out" / "work"):
        subprocess.run(["rm", "-r", path], check=True)
