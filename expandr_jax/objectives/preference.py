"""Step B: the generator learns by DPO which passages rank the right document high.

A pair is one packed row, prompt | chosen | rejected: the prompt is computed once, and neither
response sees the other. Logits exist only for response tokens, a chunk at a time.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from expandr_jax.data.batches import best_lengths, bucket_length
from expandr_jax.losses.contrastive import dpo, token_log_probs
from expandr_jax.models.decoder import Decoder
from expandr_jax.models.mask import Mask
from expandr_jax.sharding import constrain
from expandr_jax.training.train_state import TrainState

PROMPT, CHOSEN, REJECTED, PADDING = 0, 1, 2, 3
Shape = tuple[int, int]  # Of a batch: tokens of a row, and of its responses.


@dataclasses.dataclass(frozen=True)
class DPOConfig:
    """Settings of the preference loss.

    Attributes:
        beta: Strength of the tie to the reference; the paper's is 0.1.
        kind: One of the losses of `losses.dpo`.
        label_smoothing: Share of pairs taken to be the wrong way round.
        length_normalized: Use mean instead of summed token log-probabilities; "ipo" always does.
        sft_weight: Weight of the chosen response's negative log-likelihood per token, added.
        chunk: Response tokens whose logits are in memory at once.
    """

    beta: float = 0.1
    kind: str = "sigmoid"
    label_smoothing: float = 0.0
    length_normalized: bool = False
    sft_weight: float = 0.0
    chunk: int = 256


@dataclasses.dataclass(frozen=True)
class PreferencePair:
    """Token ids of a prompt and its two responses, each response with its one EOS; its name."""

    prompt: Sequence[int]
    chosen: Sequence[int]
    rejected: Sequence[int]
    name: str = dataclasses.field(default="", compare=False)

    @property
    def tokens(self) -> int:
        """How many it has."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)

    @property
    def positions(self) -> int:
        """Tokens of the prompt with the longer response: both continue its positions."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))

    @property
    def size(self) -> Shape:
        """Tokens of its row, and those of them that are its responses'."""
        responses = len(self.chosen) + len(self.rejected)
        return len(self.prompt) + responses, responses


def pack(
    pairs: Sequence[PreferencePair], pad_id: int, shapes: Sequence[Shape] = ()
) -> dict[str, np.ndarray]:
    """Arrays of a batch of pairs, each in one row: `pack_rows` of CHOSEN and REJECTED."""
    rows = [(p.prompt, {CHOSEN: p.chosen, REJECTED: p.rejected}) for p in pairs]
    return pack_rows(rows, pad_id, shapes)


def batch_shapes(needed: Sequence[Shape], most: int) -> list[Shape]:
    """The shapes, `most` of them or fewer, that batches are padded to with the least filling.

    Args:
        needed: (tokens of the longest row, of the most response tokens) of each batch.
        most: Shapes at most; each is a program to compile.

    Returns:
        Shapes for `pack_rows`.
    """
    shapes = []
    for length in best_lengths([length for length, _ in needed], most):
        width = max(own for longest, own in needed if longest <= length)
        shapes.append((length, -(-width // 16) * 16))
    return shapes


def pack_rows(
    rows: Sequence[tuple[Sequence[int], Mapping[int, Sequence[int]]]],
    pad_id: int,
    shapes: Sequence[Shape] = (),
) -> dict[str, np.ndarray]:
    """Arrays of a batch of prompts, each in one row with its responses by segment.

    Args:
        rows: (prompt, its responses).
        pad_id: Fills rows up.
        shapes: (length, response tokens) that a batch may have, in rising order; a batch that fits
            none is padded to powers of two.

    Returns:
        "tokens", "positions", "segments" [batch, length]: all responses continue the prompt's
        positions. "sources", "targets", "responses" [batch, response tokens]: the place whose
        hidden state predicts each response token, the token, and its segment. int32.
    """
    widths = [sum(map(len, responses.values())) for _, responses in rows]
    longest = max(len(prompt) + own for (prompt, _), own in zip(rows, widths, strict=True))
    length, width = next(
        (shape for shape in shapes if longest <= shape[0] and max(widths) <= shape[1]),
        (bucket_length(longest), bucket_length(max(widths))),
    )
    shape = len(rows), length
    batch = {name: np.zeros(shape, np.int32) for name in ("positions", "segments")}
    batch["tokens"] = np.full(shape, pad_id, np.int32)
    batch["segments"][:] = PADDING
    batch |= {name: np.zeros((len(rows), width), np.int32) for name in ("sources", "targets")}
    batch["responses"] = np.full((len(rows), width), PADDING, np.int32)
    for row, (tokens, responses) in enumerate(rows):
        end = prompt = len(tokens)
        batch["tokens"][row, :prompt] = tokens
        batch["positions"][row, :prompt] = np.arange(prompt)
        batch["segments"][row, :prompt] = PROMPT
        for segment, response in responses.items():
            place = slice(end, end + len(response))
            batch["tokens"][row, place] = response
            batch["positions"][row, place] = prompt + np.arange(len(response))
            batch["segments"][row, place] = segment
            out = slice(end - prompt, end - prompt + len(response))
            batch["targets"][row, out] = response
            batch["responses"][row, out] = segment
            # The prompt's last token predicts the first token of either response.
            batch["sources"][row, out] = [prompt - 1, *range(end, end + len(response) - 1)]
            end += len(response)
    return batch


def packed_mask(segments: jax.Array) -> Mask:
    """The mask of packed rows [batch, length]: causal, the prompt and the own response only."""
    return Mask(jnp.where(segments == PADDING, 0, segments + 1), causal=True, responses=2)


def response_log_probs(
    module: Decoder,
    variables: Mapping[str, Any],
    batch: Mapping[str, jax.Array],
    *,
    chunk: int,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Summed log-probabilities and token counts of both responses.

    Args:
        module: The decoder.
        variables: {"params": base} for the reference, with "lora" for the policy.
        batch: From `pack`.
        chunk: Response tokens whose logits are in memory at once.
        dropout_key: Turns the adapter's dropout on.

    Returns:
        (chosen, rejected, chosen tokens, rejected tokens), [batch] float32 each.
    """
    log_probs = packed_log_probs(module, variables, batch, chunk=chunk, dropout_key=dropout_key)
    responses = batch["responses"]
    sums = [jnp.sum(jnp.where(responses == s, log_probs, 0.0), axis=1) for s in (CHOSEN, REJECTED)]
    counts = [jnp.sum(responses == s, axis=1).astype(jnp.float32) for s in (CHOSEN, REJECTED)]
    return sums[0], sums[1], counts[0], counts[1]


def packed_log_probs(
    module: Decoder,
    variables: Mapping[str, Any],
    batch: Mapping[str, jax.Array],
    *,
    chunk: int,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """log p of each of the batch's "targets", [batch, response tokens]; see `response_log_probs`.

    At padding the values mean nothing.
    """
    hidden = module.apply(
        variables,
        batch["tokens"],
        batch["positions"],
        packed_mask(batch["segments"]),
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
    the way forth computes that while a chunk's logits are there: the way back neither keeps them
    nor makes them again. The head is frozen and gets no gradient.
    """

    def one(part):
        states, wanted = part
        return token_log_probs(module.apply(head, states, method="logits"), wanted)

    return jax.lax.map(one, (hidden, targets))


def _head_log_probs_forth(module, head, hidden, targets):
    def one(part):
        states, wanted = part
        logits, back = jax.vjp(lambda x: module.apply(head, x, method="logits"), states)
        mine = wanted[..., None] == jnp.arange(logits.shape[-1])
        slope = back(mine.astype(logits.dtype) - jax.nn.softmax(logits, axis=-1))[0]
        return token_log_probs(logits, wanted), slope

    log_probs, slopes = jax.lax.map(one, (hidden, targets))
    return log_probs, (head, slopes)


def _head_log_probs_back(_, saved, cotangent):
    head, slopes = saved
    none = jax.tree.map(jnp.zeros_like, head)
    return none, (cotangent[..., None] * slopes).astype(slopes.dtype), None


_head_log_probs.defvjp(_head_log_probs_forth, _head_log_probs_back)


def dpo_values(
    adapter: Any,
    params: Any,
    batch: Mapping[str, jax.Array],
    *,
    module: Decoder,
    config: DPOConfig,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Preference loss and figures of each pair of a packed batch.

    Args:
        adapter: The trainable LoRA tree.
        params: The frozen base.
        batch: From `pack`, with "reference_chosen" and "reference_rejected" [batch] summed
            log-probabilities of the base.
        module: The decoder, with its LoRA settings.
        config: Loss settings.
        dropout_key: Turns the adapter's dropout on.

    Returns:
        [batch] losses, and the figures of `losses.dpo` and both log-probabilities, [batch] each.
    """
    chosen, rejected, chosen_tokens, rejected_tokens = response_log_probs(
        module,
        {"params": params, "lora": adapter},
        batch,
        chunk=config.chunk,
        dropout_key=dropout_key,
    )
    scale_chosen = scale_rejected = 1.0
    if config.length_normalized or config.kind == "ipo":
        scale_chosen, scale_rejected = 1 / chosen_tokens, 1 / rejected_tokens
    loss, metrics = dpo(
        chosen * scale_chosen,
        rejected * scale_rejected,
        batch["reference_chosen"] * scale_chosen,
        batch["reference_rejected"] * scale_rejected,
        beta=config.beta,
        kind=config.kind,
        label_smoothing=config.label_smoothing,
    )
    if config.sft_weight:
        loss = loss - config.sft_weight * chosen / chosen_tokens
    return loss, {**metrics, "log_prob_chosen": chosen, "log_prob_rejected": rejected}


def dpo_loss(*args: Any, **kwargs: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Means of `dpo_values`, with its arguments."""
    return _means(dpo_values, *args, **kwargs)


def _means(
    values: Callable[..., tuple[jax.Array, dict[str, jax.Array]]], *args: Any, **kwargs: Any
) -> tuple[jax.Array, dict[str, jax.Array]]:
    losses, metrics = values(*args, **kwargs)
    return jnp.mean(losses), {name: jnp.mean(value) for name, value in metrics.items()}


def adapter_step(
    state: TrainState,
    params: Any,
    batch: Mapping[str, jax.Array],
    key: jax.Array,
    *,
    values: Callable[..., tuple[jax.Array, dict[str, jax.Array]]],
    module: Decoder,
    config: Any,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One batch's part in an update of the adapter; dropout is drawn from (key, step).

    Args:
        state: The adapter and its optimizer's state.
        params: The frozen base.
        batch: What `values` takes.
        key: Of the dropout.
        values: The objective: `dpo_values` or `reward_sft.sft_values`.
        module: The decoder, with its LoRA settings.
        config: The objective's settings.
        optimizer: Of the state.

    Returns:
        The state after it, and the batch's mean figures.
    """
    (loss, metrics), grads = jax.value_and_grad(functools.partial(_means, values), has_aux=True)(
        state.params,
        params,
        batch,
        module=module,
        config=config,
        dropout_key=jax.random.fold_in(key, state.step),
    )
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), **metrics}
    return state.apply(grads, optimizer), metrics


# (state, params, batch, key, *, module, config, optimizer) -> (state, figures), of `DPOConfig`.
dpo_step = functools.partial(adapter_step, values=dpo_values)
