"""What rewards and mining cost beside encoding: 1,000 queries x 32 candidates, 100,000 passages.

A candidate has 32 tokens, the least that makes sense and so the hardest case. The peer is this
project's own encoding of the same texts and nothing else, so the ratio is encoding's share of the
time. The corpus is encoded and indexed before: its vectors are those of pydoc's documents with
noise, which are searched like any others.
"""

import functools
import json
import pathlib
from collections.abc import Mapping

import numpy as np

from eval.benchmarks import Comparison, Different, Running, check_close, minilm, per_second

QUERIES, CANDIDATES, PASSAGES, LENGTH, DEPTH = 1000, 32, 100_000, 32, 100
NOISE = 0.5  # Length of what is added to a document's vector of length 1.


def prepare(directory: pathlib.Path) -> None:
    """Writes queries, candidates and the vectors of the corpus."""
    minilm.write_pydoc(directory)
    queries, documents = minilm.read_pydoc(directory)
    encoder, params = minilm.encoder(LENGTH)
    base = encoder.encode(params, documents, "document")
    generator = np.random.default_rng(0)
    rows = np.arange(PASSAGES) % len(documents)
    vectors = np.empty((PASSAGES, base.shape[1]), np.float32)
    for start in range(0, PASSAGES, 10_000):
        block = base[rows[start : start + 10_000]]
        noise = generator.standard_normal(block.shape, np.float32)
        block = block + NOISE * noise / np.linalg.norm(noise, axis=1, keepdims=True)
        vectors[start : start + 10_000] = block / np.linalg.norm(block, axis=1, keepdims=True)
    np.save(directory / "corpus.npy", vectors)
    words = " ".join(documents).split()
    starts = generator.integers(len(words) - 40, size=(QUERIES, CANDIDATES + 1))
    texts = [[" ".join(words[i : i + 40]) for i in row] for row in starts]
    (directory / "candidates.json").write_text(
        json.dumps([minilm.spread(queries, QUERIES), texts, [documents[i][:200] for i in rows]])
    )


def start(directory: pathlib.Path, everything: bool) -> Running:
    """Encoding alone, or also rewards by all ranks, pairs and hard negatives."""
    from expandr_jax.mining import mine_negatives
    from expandr_jax.rewards import ranks as rewards
    from expandr_jax.rewards.selection import passes_similarity_filter, select_pair
    from expandr_jax.search import build_index
    from expandr_jax.vectors.query import fuse_each

    queries, texts, documents = json.loads((directory / "candidates.json").read_text())
    vectors = np.load(directory / "corpus.npy", allow_pickle=False)
    positives = np.arange(QUERIES) * PASSAGES // QUERIES
    index = build_index(vectors) if everything else None
    encoder, params = minilm.encoder(LENGTH)

    def work(count: int) -> np.ndarray:
        flat = [text for row in texts[:count] for text in row]
        each = encoder.encode(params, flat, "document").reshape(count, CANDIDATES + 1, -1)
        query = encoder.encode(params, queries[:count], "query")
        if not everything:
            return query
        candidates, answers, relevant = each[:, :-1], each[:, -1], positives[:count]
        similarities = [
            np.einsum("qcd,qd->qc", candidates, side) for side in (vectors[relevant], answers)
        ]
        present = np.ones((count, CANDIDATES), bool)
        fused = fuse_each(query, candidates, present, query_weight=0.5, normalize="both")
        _, found = index.search(fused.reshape(-1, fused.shape[-1]), DEPTH)
        rank = rewards.ranks_in_results(found, np.repeat(relevant, CANDIDATES)[:, None])
        terms = [rewards.reciprocal_rank(rewards.ranks(side)) for side in similarities]
        reward = sum(terms) + rewards.reciprocal_rank(rank).reshape(count, -1)
        kept = passes_similarity_filter(*similarities, 0.6)
        for row in np.flatnonzero(kept):
            select_pair(reward[row], texts[row][:CANDIDATES])
        scores, nearest = index.search(query, DEPTH)
        mine_negatives(
            scores,
            nearest,
            np.sum(query * vectors[relevant], axis=1),
            [[document] for document in relevant.tolist()],
            documents,
            count=8,
            relative_margin=0.05,
        )
        return query

    outputs = {"queries": work(8)}
    return Running(per_second(QUERIES, lambda: work(QUERIES)), outputs)


def check(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> str:
    """Both encode alike."""
    if not len(ours["queries"]):
        raise Different("nothing was encoded")
    return check_close(ours["queries"], theirs["queries"], 1e-5, "vectors")


ROWS = (
    Comparison(
        name="rewards and mining",
        unit="queries/s",
        peer_name="its encoding alone, with jax",
        packages=("jax",),
        ours=functools.partial(start, everything=True),
        peer=functools.partial(start, everything=False),
        check=check,
    ),
)
