"""What hosts take outside compiled programs: CORE_SECONDS of `planning/host_stages.py`.

    python -m tests.host_rates

Seconds of one core, for a thousand of each, with texts of 512 tokens.
"""

import hashlib
import pathlib
import tempfile
import time
import types
from collections.abc import Callable

import numpy as np
from tokenizers import pre_tokenizers

from expandr_jax.data.batches import pad
from expandr_jax.data.beir import read_beir, write_beir
from expandr_jax.data.triples import Triple
from expandr_jax.files.records import Journal, open_jsonl
from expandr_jax.metrics import evaluate, write_trec
from expandr_jax.objectives.contrastive_steps import ContrastiveBatches
from expandr_jax.objectives.packed_examples import ExampleHashes, triple_blocks
from expandr_jax.objectives.stored_examples import store_examples
from expandr_jax.planning.narrow import _tokenizer
from expandr_jax.planning.synthetic import Counts, draw_words, word, write_collection
from expandr_jax.rewards.group import Candidate, Group
from expandr_jax.search import Bm25Index, ScannIndex
from expandr_jax.weights.safetensors_file import Tensor, write_safetensors

COUNT, WORDS, LENGTH = 900, 32_000, 510
EPOCHS = 3
VECTORS, WIDTH = 480_000, 768  # Nearly half of a shard: any tree is trained on 100,000.


class Encoder:
    """The tokenizer of a rehearsal."""

    def __init__(self):
        words = {word(i): i + 4 for i in range(WORDS)}
        self._tokenizer = _tokenizer(words, pre_tokenizers.WhitespaceSplit(), LENGTH)

    def tokenize(self, texts, kind=None, cut=None):
        if cut is not None:
            cut([False] * len(texts))
        return self._tokenizer([*texts], truncation=True, max_length=LENGTH)["input_ids"]


def spent(task: Callable[[], object], count: float = COUNT) -> float:
    """Seconds for a thousand, of so many."""
    start = time.process_time()
    task()
    return (time.process_time() - start) / count * 1000


def measure(directory: pathlib.Path) -> dict[str, float]:
    """Name -> seconds."""
    rng, encoder = np.random.default_rng(0), Encoder()
    drawn = draw_words(rng, WORDS, COUNT * LENGTH).reshape(COUNT, LENGTH)
    texts = [" ".join(map(word, row)) for row in drawn.tolist()]
    collection = directory / "collection"
    write_collection(collection, Counts(COUNT, 90, 9, 4, 4), words=WORDS, document=LENGTH, query=50)

    def read() -> None:
        write_beir(directory / "data", read_beir(collection, store=directory / "store"))

    def sample() -> None:
        journal = Journal(directory / "journal.jsonl")
        for first in range(0, COUNT, 32):
            journal.append(
                {"query_id": f"q{first + i}", "sample": 0, "text": text, "tokens": LENGTH}
                for i, text in enumerate(texts[first : first + 32])
            )
        journal.finish()
        for _ in range(EPOCHS):  # For its index, a summary, and where they are needed.
            assert len(list(journal.rows)) == COUNT

    thirds = zip(texts[::3], texts[1::3], texts[2::3], strict=True)
    triples = [Triple(f"w{i}", (a,), (b,), (c,)) for i, (a, b, c) in enumerate(thirds)]
    settings = types.SimpleNamespace(
        batch_size=100, negatives=1, plain_share=0.0, length_window=0, curriculum=False
    )
    blocks, kept = [], []

    def make() -> None:
        blocks.extend(triple_blocks(triples, encoder))

    def keep() -> None:
        examples = store_examples(ExampleHashes().passing(blocks))
        steps = range(EPOCHS * len(examples) // settings.batch_size)
        kept.append(ContrastiveBatches(examples, settings, 1, 0, 0, LENGTH, steps))
        kept[0].prepare()

    def batch() -> None:
        for step in kept[0].steps:
            kept[0].batch(step)

    def reward() -> None:
        candidates = [Candidate(text, 1.0, total=1.0, rewards={"corpus": 1.0}) for text in texts]
        with open_jsonl(directory / "candidates.jsonl") as write:
            write(Group("q", "query", "d", texts[0], [c]).to_row(False) for c in candidates)

    def rank() -> None:
        scores = np.sort(rng.random((COUNT, 100)))[:, ::-1].tolist()
        found = {f"q{i}": {f"d{i}-{j}": s for j, s in enumerate(of)} for i, of in enumerate(scores)}
        write_trec(directory / "run.trec", found, "run")
        right = {query: {f"{query.replace('q', 'd')}-7": 1} for query in found}
        evaluate(found, right, ("ndcg@10", "mrr@10", "recall@100", "map"))

    def export() -> None:
        rows = np.ones((1024, 1024), np.float32)
        tensor = Tensor(rows.dtype, rows.shape, lambda: iter([rows]))
        path = directory / "model.safetensors"
        write_safetensors(path, {f"t{i}": tensor for i in range(32)})
        with open(path, "rb") as file:
            hashlib.file_digest(file, "sha256")

    vectors = rng.standard_normal((VECTORS, WIDTH), np.float32)
    read()  # Imports what it needs.
    example, example_kept = (spent(task, COUNT / 3) for task in (make, keep))
    Bm25Index(texts[:1])
    return {
        "document read": spent(read),
        "text encoded": spent(lambda: pad(encoder.tokenize(texts), 0, LENGTH)),
        "text sampled": spent(sample),
        "example": example + spent(batch, COUNT / 3),
        "example kept": example_kept,
        "candidate rewarded": spent(reward),
        "query ranked": spent(rank),
        "MB exported": spent(export, 4 * 32 * 1.048576),
        "text in BM25": spent(lambda: Bm25Index(texts)),
        "vector indexed": spent(lambda: ScannIndex(vectors), VECTORS),
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        for what, seconds in measure(pathlib.Path(name)).items():
            print(f"{what}: {seconds:.2g}")
