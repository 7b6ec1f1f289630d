"""Pairs a second through a cross-encoder: the first lines of pydoc's docstrings, each with 20 of
its documents, cut at 128 tokens, in float32.

The model is MiniLM with a head that is drawn by a seed. Text goes in and scores come out, a query
after the other on our side, as `rerank:` ranks; sentence-transformers takes all pairs at once, and
the quickest of three batch sizes, 32 being its default.
"""

import functools
import json
import pathlib
from collections.abc import Mapping

import numpy as np

from eval.benchmarks import Comparison, Running, check_close, minilm, per_second

QUERIES, DEPTH, LENGTH = 32, 20, 128
TRIED = 128  # Pairs of the trial that chooses the peer's batch.


def prepare(directory: pathlib.Path) -> None:
    """Writes the model, the pairs, and how many tokens each has."""
    from expandr_jax.weights.cross_encoder import export_cross_encoder, load_cross_encoder

    minilm.write_pydoc(directory)
    queries, documents = minilm.read_pydoc(directory)
    queries = minilm.spread(queries, QUERIES)
    several = minilm.spread(documents, QUERIES * DEPTH)
    texts = [several[i::QUERIES] for i in range(QUERIES)]
    encoder, params = load_cross_encoder(minilm.SOURCE, max_length=LENGTH, seed=0)
    export_cross_encoder(directory / "cross-encoder", encoder, params)
    ids = (encoder.token_ids(query, own) for query, own in zip(queries, texts, strict=True))
    lengths = [len(tokens) for rows in ids for tokens, _ in rows]
    (directory / "pairs.json").write_text(json.dumps([queries, texts, lengths]))


def _pairs(directory: pathlib.Path) -> tuple[list[str], list[list[str]], list[int]]:
    return tuple(json.loads((directory / "pairs.json").read_text()))


def start_ours(directory: pathlib.Path) -> Running:
    """`CrossEncoder.scores`, a query after the other."""
    from expandr_jax.weights.cross_encoder import load_cross_encoder

    queries, texts, _ = _pairs(directory)
    encoder, params = load_cross_encoder(str(directory / "cross-encoder"), max_length=LENGTH)

    def scores() -> np.ndarray:
        each = zip(queries, texts, strict=True)
        return np.concatenate([encoder.scores(params, *pair, rows=ROWS_AT_ONCE) for pair in each])

    return Running(
        per_second(QUERIES * DEPTH, scores), {"scores": scores()}, f"{ROWS_AT_ONCE} rows"
    )


def start_peer(directory: pathlib.Path) -> Running:
    """`CrossEncoder.predict` of sentence-transformers."""
    from sentence_transformers import CrossEncoder

    queries, texts, _ = _pairs(directory)
    pairs = [(q, text) for q, own in zip(queries, texts, strict=True) for text in own]
    model = CrossEncoder(str(directory / "cross-encoder"), device="cpu", max_length=LENGTH)
    predict = functools.partial(model.predict, show_progress_bar=False)

    def rate(batch: int, some: list[tuple[str, str]]) -> float:
        return per_second(len(some), lambda: predict(some, batch_size=batch))()

    tried = pairs[:: len(pairs) // TRIED]
    rate(32, tried)
    batch = max((16, 32, 64), key=lambda size: rate(size, tried))
    outputs = {"scores": predict(pairs, batch_size=batch)}
    return Running(lambda: rate(batch, pairs), outputs, f"batches of {batch}")


def check(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> str:
    """The scores are the same."""
    return check_close(ours["scores"], theirs["scores"], 2e-4, "scores")


def flops(directory: pathlib.Path) -> float:
    """Operations of a pair on average, padding left out."""
    lengths = _pairs(directory)[2]
    return minilm.forward_flops(lengths) / len(lengths)


ROWS_AT_ONCE = 8  # Shorter batches are padded less.
ROWS = (
    Comparison(
        name=f"re-rank, {LENGTH} tokens",
        unit="pairs/s",
        peer_name="sentence-transformers",
        packages=("sentence-transformers", *minilm.PACKAGES),
        ours=start_ours,
        peer=start_peer,
        check=check,
        flops=flops,
    ),
)
