"""A decoder's quality and speed: the perplexity of passages, and tokens a second."""

import functools
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from expandr_jax.losses.language import token_log_probs
from expandr_jax.models.decoder import Decoder, KVCache, token_positions, unstack_layers
from expandr_jax.models.generator import Generator
from expandr_jax.models.mask import causal_mask

_ROWS = 4


@functools.partial(jax.jit, static_argnums=0)
def _log_probs(module: Decoder, params: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """The sum of log p of each token behind the first."""
    variables = {"params": params}
    hidden = module.apply(variables, ids, token_positions(mask), causal_mask(mask))
    logits = module.apply(variables, hidden[:, :-1], method="logits")
    return jnp.sum(token_log_probs(logits, ids[:, 1:]) * mask[:, 1:])


def perplexity(
    generator: Generator, params: Mapping[str, Any], texts: Sequence[str], length: int = 128
) -> float | None:
    """exp of the mean negative log-likelihood of a token, of the texts' first `length` tokens.

    A text's first token is not predicted. None where no text has two.
    """
    rows = [row[:length] for row in generator.token_ids(texts)] if texts else []
    rows = [row for row in rows if len(row) > 1]
    total = 0.0
    for start in range(0, len(rows), _ROWS):
        part = rows[start : start + _ROWS]
        ids = np.full((_ROWS, length), generator.pad_id, np.int32)
        mask = np.zeros_like(ids)
        for number, row in enumerate(part):
            ids[number, : len(row)], mask[number, : len(row)] = row, 1
        total += float(_log_probs(generator.module, params, ids, mask))
    tokens = sum(len(row) - 1 for row in rows)
    return math.exp(-total / tokens) if tokens else None


def decoding_speed(
    module: Decoder, params: Mapping[str, Any], *, rows: int = 8, tokens: int = 64, times: int = 3
) -> float:
    """Tokens a second of `rows` texts that are continued together, greedily; the best of `times`.

    What is measured are steps with a cache, without prompts and whatever the tokens are.
    """
    unrolled = module.clone(unroll=True, lora=None)
    variables = {"params": unstack_layers(params)}

    @jax.jit
    def run(variables: Any) -> jax.Array:
        def step(_: int, state: Any) -> Any:
            ids, cache = state
            hidden, cache = unrolled.apply(variables, ids, cache, method="decode")
            logits = unrolled.apply(variables, hidden, method="logits")
            return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

        cache = KVCache.zeros(module.config, rows, tokens, module.dtype)
        return jax.lax.fori_loop(0, tokens, step, (jnp.zeros(rows, jnp.int32), cache))[0]

    run(variables).block_until_ready()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        run(variables).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return rows * tokens / min(seconds)
