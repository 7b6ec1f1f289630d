"""Step B's other objective: the generator learns its candidates, each by its reward's share.

loss of a query = - sum_i w_i log pi(d_i | q), with w of `rewards.candidate_shares`: the M step of
expectation maximisation over expansions. It needs neither a reference model nor a rejected text.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from expandr_jax.models.decoder import Decoder
from expandr_jax.objectives.preference import CHOSEN, Shape, pack_rows, packed_log_probs


@dataclasses.dataclass(frozen=True)
class RewardSftConfig:
    """Settings of reward-weighted supervised fine-tuning.

    Attributes:
        length_normalized: Use mean instead of summed token log-probabilities.
        chunk: Response tokens whose logits are in memory at once.
    """

    length_normalized: bool = False
    chunk: int = 256


@dataclasses.dataclass(frozen=True)
class WeightedResponse:
    """Token ids of a prompt and one response, with its one EOS; the response's weight and name."""

    prompt: Sequence[int]
    response: Sequence[int]
    weight: float
    name: str = dataclasses.field(default="", compare=False)

    @property
    def tokens(self) -> int:
        """How many it has."""
        return len(self.prompt) + len(self.response)

    @property
    def positions(self) -> int:
        """The same: one response continues the prompt."""
        return self.tokens

    @property
    def size(self) -> Shape:
        """Tokens of its row, and those of them that are the response's."""
        return len(self.prompt) + len(self.response), len(self.response)


def pack_weighted(
    responses: Sequence[WeightedResponse], pad_id: int, shapes: Sequence[Shape] = ()
) -> dict[str, np.ndarray]:
    """Arrays of a batch: those of `preference.pack_rows`, and "weights" [batch] float32."""
    batch = pack_rows([(r.prompt, {CHOSEN: r.response}) for r in responses], pad_id, shapes)
    return {**batch, "weights": np.array([r.weight for r in responses], np.float32)}


def sft_values(
    adapter: Any,
    params: Any,
    batch: Mapping[str, jax.Array],
    *,
    module: Decoder,
    config: RewardSftConfig,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted negative log-likelihood of each response of a batch.

    Args:
        adapter: The trainable LoRA tree.
        params: The frozen base.
        batch: From `pack_weighted`.
        module: The decoder, with its LoRA settings.
        config: Settings of the loss.
        dropout_key: Turns the adapter's dropout on.

    Returns:
        [batch] losses, and {"log_prob", "token_log_prob"}, [batch] each: the response's summed and
        mean log-probability, without its weight.
    """
    variables = {"params": params, "lora": adapter}
    log_probs = packed_log_probs(
        module, variables, batch, chunk=config.chunk, dropout_key=dropout_key
    )
    own = batch["responses"] == CHOSEN
    log_prob = jnp.sum(jnp.where(own, log_probs, 0.0), axis=1)
    mean = log_prob / jnp.sum(own, axis=1)
    loss = -batch["weights"] * (mean if config.length_normalized else log_prob)
    return loss, {"log_prob": log_prob, "token_log_prob": mean}
