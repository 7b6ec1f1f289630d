"""Log-probabilities of packed responses under the generator.

The prompt of a row is computed once, and no response sees another. Logits exist only for response
tokens, a chunk at a time.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from expandr_jax.losses.language import response_sums, token_log_probs
from expandr_jax.models.decoder import Decoder
from expandr_jax.models.mask import Mask
from expandr_jax.objectives.packing import PADDING
from expandr_jax.sharding import constrain


def response_log_probs(
    module: Decoder,
    variables: Mapping[str, Any],
    batch: Mapping[str, jax.Array],
    *,
    responses: int,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """Summed log-probabilities and token counts of each response, two of [batch, responses].

    Arguments are those of `packed_log_probs`.
    """
    log_probs = packed_log_probs(module, variables, batch, responses=responses, chunk=chunk)
    return response_sums(log_probs, batch["responses"], responses)


def packed_log_probs(
    module: Decoder,
    variables: Mapping[str, Any],
    batch: Mapping[str, jax.Array],
    *,
    responses: int,
    chunk: int,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """log p of each of the batch's "targets", [batch, response tokens]; padding's mean nothing.

    Args:
        variables: {"params": base} for the reference, with "lora" for the policy.
        batch: From `pack`.
        responses: Responses of a row.
        chunk: Response tokens whose logits are in memory at once.
        dropout_key: Turns the adapter's dropout on.
    """
    hidden = module.apply(
        variables,
        batch["tokens"],
        batch["positions"],
        Mask(batch["segments"] - PADDING, causal=True, responses=responses),
        deterministic=dropout_key is None,
        rngs=None if dropout_key is None else {"dropout": dropout_key},
    )
    hidden = jnp.take_along_axis(hidden, batch["sources"][..., None], axis=1)
    return _chunked_log_probs(module, variables, hidden, batch["targets"], chunk)


def _chunked_log_probs(module, variables, hidden, targets, chunk):
    """log p(target) [batch, tokens] without the [batch, tokens, vocabulary] tensor."""
    batch, tokens, width = hidden.shape
    columns = -(-tokens // min(tokens, -(-batch * tokens // chunk)))
    padded = -(-tokens // columns) * columns
    hidden = jnp.pad(hidden, ((0, 0), (0, padded - tokens), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, padded - tokens)))
    head = {"params": _whole_head(module, variables["params"])}
    split = (
        jnp.moveaxis(hidden.reshape(batch, -1, columns, width), 1, 0),
        jnp.moveaxis(targets.reshape(batch, -1, columns), 1, 0),
    )
    log_probs = _head_log_probs(module, head, *split)
    return jnp.moveaxis(log_probs, 0, 1).reshape(batch, padded)[:, :tokens]


def _whole_head(module: Decoder, params: Mapping[str, Any]) -> dict[str, Any]:
    """The output head's parameter, gathered over fsdp: once, and not for every chunk."""
    name, axes = "lm_head", ("act_embed", "vocab")
    if module.config.tie_embeddings:
        name, axes = "embedding", ("vocab", "act_embed")
    return {name: constrain(params[name], axes)}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _head_log_probs(module, head, hidden, targets):
    """log p(target) of chunks [chunks, batch, columns], one after the other.

    A token's log-probability has one slope in its hidden state, whatever the loss does with it, so
    the forward pass computes that while a chunk's logits are there: the backward pass neither
    keeps them nor makes them again. The head is frozen and gets no gradient.
    """

    def one(part):
        states, wanted = part
        return token_log_probs(module.apply(head, states, method="logits"), wanted)

    return jax.lax.map(one, (hidden, targets))


def _head_log_probs_forward(module, head, hidden, targets):
    def one(part):
        states, wanted = part
        logits, backward = jax.vjp(lambda x: module.apply(head, x, method="logits"), states)
        mine = wanted[..., None] == jnp.arange(logits.shape[-1])
        slope = backward(mine.astype(logits.dtype) - jax.nn.softmax(logits, axis=-1))[0]
        return token_log_probs(logits, wanted), slope

    log_probs, slopes = jax.lax.map(one, (hidden, targets))
    return log_probs, (head, slopes)


def _head_log_probs_backward(_, saved, cotangent):
    head, slopes = saved
    none = jax.tree.map(jnp.zeros_like, head)
    return none, (cotangent[..., None] * slopes).astype(slopes.dtype), None


_head_log_probs.defvjp(_head_log_probs_forward, _head_log_probs_backward)
