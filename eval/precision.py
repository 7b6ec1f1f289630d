"""What fewer bits cost: a generator on real docstrings, with its weights and sums in smaller types.

A part of `python -m eval.models`, which writes the table into docs/models.md.
"""

import dataclasses
import functools
import inspect
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from expandr_jax.losses.language import token_log_probs
from expandr_jax.models.decoder import token_positions
from expandr_jax.models.mask import causal_mask
from expandr_jax.weights.hf import load_generator

TEXTS, TOKENS, ROWS = 32, 96, 8
# Types of the weights and of the computation.
FORMS = (
    ("float32", "float32"),
    ("bfloat16", "bfloat16"),
    ("int8", "float32"),
    ("int8", "bfloat16"),
)


@dataclasses.dataclass(frozen=True)
class Precision:
    """One line of the table.

    Attributes:
        weights: Type of the weights.
        compute: Type of the computation.
        megabytes: Size of the weights.
        perplexity: exp of the mean negative log-likelihood of a token.
        difference: Mean absolute difference of a logit from float32's.
        same: Share of places where the likeliest next token is float32's.
    """

    weights: str
    compute: str
    megabytes: float
    perplexity: float
    difference: float
    same: float


def docstrings() -> list[str]:
    """The first long docstrings of numpy, by name."""
    texts = (inspect.getdoc(getattr(np, name)) for name in sorted(np.__all__))
    return [text for text in texts if text is not None and len(text) > 8 * TOKENS][:TEXTS]


@functools.partial(jax.jit, static_argnums=0)
def _logits(module: nn.Module, params, ids: jax.Array) -> jax.Array:
    mask = jnp.ones_like(ids)
    hidden = module.apply({"params": params}, ids, token_positions(mask), causal_mask(mask))
    return module.apply({"params": params}, hidden, method="logits")


def measure_precision(source: str, sha256: str) -> Iterator[Precision]:
    """Measures a generator in each of FORMS.

    Args:
        source: Where it is.
        sha256: Checksum of its file.
    """
    plain = None
    for weights, compute in FORMS:
        generator, params = load_generator(
            source, dtype=jnp.dtype(weights), compute_dtype=jnp.dtype(compute), sha256=sha256
        )
        rows = generator.tokenizer(docstrings())["input_ids"]
        ids = np.asarray([row[:TOKENS] for row in rows], np.int32)
        parts = [_logits(generator.module, params, part) for part in ids.reshape(-1, ROWS, TOKENS)]
        log_probs = [
            token_log_probs(logits[:, :-1], part[:, 1:])
            for logits, part in zip(parts, ids.reshape(-1, ROWS, TOKENS), strict=True)
        ]
        found = np.concatenate([np.asarray(part) for part in parts])
        plain = found if plain is None else plain
        yield Precision(
            weights,
            compute,
            sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 1e6,
            float(np.exp(-np.mean(np.concatenate(log_probs)))),
            float(np.mean(np.abs(found - plain))),
            float(np.mean(found.argmax(-1) == plain.argmax(-1))),
        )


def precision_table(rows: list[Precision]) -> str:
    """The rows in Markdown, with what they say."""
    lines = [
        f"| {row.weights} | {row.compute} | {row.megabytes:.0f} | {row.perplexity:.3f} | "
        f"{row.difference:.4f} | {100 * row.same:.1f} % |\n"
        for row in rows
    ]
    return (
        "\n## Fewer bits\n\n"
        f"SmolLM2-135M-Instruct on the first {TOKENS} tokens of {TEXTS} docstrings of numpy. The\n"
        "weights of a frozen base (`generator.weights`) can be float32, bfloat16 or int8: in int8\n"
        "the projections have a scale for each output, and the embedding, the head and the norms\n"
        "are not int8. The types of the computation are `generator.compute_dtype`.\n\n"
        "| weights | computation | MB | perplexity | mean change of a logit | same next token |\n"
        "|---|---|---|---|---|---|\n" + "".join(lines)
    )
