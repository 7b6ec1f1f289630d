"""What fewer bits cost: a generator on real docstrings, with its weights and sums in smaller types.

A part of `python -m eval.models`, which writes the table into docs/models.md.
"""

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

TEXTS, TOKENS, BATCH_ROWS = 32, 96, 8
# Types of the weights and of the computation.
FORMS = (
    ("float32", "float32"),
    ("bfloat16", "bfloat16"),
    ("int8", "float32"),
    ("int8", "bfloat16"),
    ("int4", "bfloat16"),
    ("nf4", "bfloat16"),
)
HEADER = (
    "weights", "computation", "MB", "perplexity", "mean change of a logit", "same next token",
)  # fmt: skip


def docstrings() -> list[str]:
    """The first long docstrings of numpy, by name."""
    texts = (inspect.getdoc(getattr(np, name)) for name in sorted(np.__all__))
    return [text for text in texts if text is not None and len(text) > 8 * TOKENS][:TEXTS]


@functools.partial(jax.jit, static_argnums=0)
def logits(module: nn.Module, params, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """A decoder's logits [rows, tokens, vocabulary] of ids [rows, tokens]."""
    hidden = module.apply({"params": params}, ids, token_positions(mask), causal_mask(mask))
    return module.apply({"params": params}, hidden, method="logits")


def measure(source: str, sha256: str) -> Iterator[list[str]]:
    """Rows below HEADER, one for a generator in each of FORMS.

    The perplexity is exp of a token's mean negative log-likelihood; logits, and at how many places
    the likeliest next token is the same, are compared with those of float32.
    """
    plain = None
    for weights, compute in FORMS:
        generator, params = load_generator(
            source, dtype=weights, compute_dtype=jnp.dtype(compute), sha256=sha256
        )
        rows = generator.tokenizer(docstrings())["input_ids"]
        ids = np.asarray([row[:TOKENS] for row in rows], np.int32).reshape(-1, BATCH_ROWS, TOKENS)
        parts = [logits(generator.module, params, part, jnp.ones_like(part)) for part in ids]
        log_probs = [
            token_log_probs(found[:, :-1], part[:, 1:])
            for found, part in zip(parts, ids, strict=True)
        ]
        found = np.concatenate([np.asarray(part) for part in parts])
        plain = found if plain is None else plain
        yield [
            weights,
            compute,
            f"{sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 1e6:.0f}",
            f"{np.exp(-np.mean(np.concatenate(log_probs))):.3f}",
            f"{np.mean(np.abs(found - plain)):.4f}",
            f"{100 * np.mean(found.argmax(-1) == plain.argmax(-1)):.1f} %",
        ]
