"""Log-probabilities of packed responses under the generator.

The prompt of a row is computed once, and no response sees another. Logits exist only for response
tokens, a chunk at a time.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from expandr_jax.losses.language import response_sums, token_entropies, token_log_probs
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
    hidden = _hidden(module, variables, batch, responses, dropout_key)
    return _of_chunks(module, Head(), variables, hidden, batch["targets"], chunk)[0]


def sampled_log_probs(
    module: Decoder,
    variables: Mapping[str, Any],
    batch: Mapping[str, jax.Array],
    *,
    responses: int,
    chunk: int,
    temperature: float = 1.0,
    learn_entropy: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """log p of each target as it was sampled, and the entropy there: two of [batch, tokens].

    Args:
        temperature: Divides the logits.
        learn_entropy: Entropies have gradients, too, which cost a product with the head more.

    Other arguments are those of `packed_log_probs`.
    """
    hidden = _hidden(module, variables, batch, responses, None)
    head = Head(temperature, "learned" if learn_entropy else "looked at")
    return _of_chunks(module, head, variables, hidden, batch["targets"], chunk)


@dataclasses.dataclass(frozen=True)
class Head:
    """What is made of the logits of a token.

    Attributes:
        temperature: Divides them first.
        entropy: "" makes none; else it is "looked at", without gradients, or "learned".
    """

    temperature: float = 1.0
    entropy: Literal["", "looked at", "learned"] = ""


def _hidden(module, variables, batch, responses, dropout_key):
    """The states from which response tokens are predicted, [batch, response tokens, width]."""
    hidden = module.apply(
        variables,
        batch["tokens"],
        batch["positions"],
        Mask(batch["segments"] - PADDING, causal=True, responses=responses),
        deterministic=dropout_key is None,
        rngs=None if dropout_key is None else {"dropout": dropout_key},
    )
    return jnp.take_along_axis(hidden, batch["sources"][..., None], axis=1)


def _of_chunks(module, how, variables, hidden, targets, chunk):
    """What `Head` says, [batch, tokens] each, without the [batch, tokens, vocabulary] tensor."""
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
    made = _head(module, how, head, *split)
    return tuple(jnp.moveaxis(x, 0, 1).reshape(batch, padded)[:, :tokens] for x in made)


def _whole_head(module: Decoder, params: Mapping[str, Any]) -> dict[str, Any]:
    """The output head's parameter, gathered over fsdp: once, and not for every chunk."""
    name, axes = "lm_head", ("act_embed", "vocab")
    if module.config.tie_embeddings:
        name, axes = "embedding", ("vocab", "act_embed")
    return {name: constrain(params[name], axes)}


def _logits(module, how, head, states):
    logits = module.apply(head, states, method="logits")
    return logits if how.temperature == 1 else logits / how.temperature


def _values(how, logits, wanted):
    values = (token_log_probs(logits, wanted),)
    return (*values, token_entropies(logits)) if how.entropy else values


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _head(module, how, head, hidden, targets):
    """log p(target), and what else is wanted, of chunks [chunks, batch, columns] in turn.

    A token's log-probability has one slope in its hidden state, whatever the loss does with it, so
    the forward pass computes that while a chunk's logits are there: the backward pass neither
    keeps them nor makes them again. The head is frozen and gets no gradient.
    """

    def one(part):
        states, wanted = part
        return _values(how, _logits(module, how, head, states), wanted)

    return jax.lax.map(one, (hidden, targets))


def _head_forward(module, how, head, hidden, targets):
    def one(part):
        states, wanted = part
        logits, backward = jax.vjp(lambda x: _logits(module, how, head, x), states)
        mine = wanted[..., None] == jnp.arange(logits.shape[-1])
        shares = jax.nn.softmax(logits, axis=-1)
        slopes = [backward(mine.astype(logits.dtype) - shares)[0]]
        values = _values(how, logits, wanted)
        if how.entropy == "learned":
            logs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
            slope = -shares * (logs + values[1][..., None])
            slopes.append(backward(slope.astype(logits.dtype))[0])
        return values, slopes

    values, slopes = jax.lax.map(one, (hidden, targets))
    return values, (head, slopes)


def _head_backward(module, how, saved, cotangents):
    head, slopes = saved
    none = jax.tree.map(jnp.zeros_like, head)
    parts = [c[..., None] * slope for c, slope in zip(cotangents, slopes, strict=False)]
    return none, sum(parts[1:], parts[0]).astype(slopes[0].dtype), None


_head.defvjp(_head_forward, _head_backward)
