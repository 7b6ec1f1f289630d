"""LLM-QL (arXiv 2504.05216): a document's end token has to foretell the document's query.

A decoder reads the document and then the query, whose tokens see of the document its end token
alone. What they are foretold by has to be in that token's states then, and the last of these is the
document's vector. Part of the document's words are blanks, so that it cannot be copied. The
released code learns the document's own tokens, too; here the query's alone are learned.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from expandr_jax.errors import UserError
from expandr_jax.losses.language import token_log_probs
from expandr_jax.models.decoder import token_positions
from expandr_jax.models.mask import Mask
from expandr_jax.models.retriever import Retriever
from expandr_jax.weights.families import family_of

if TYPE_CHECKING:
    from expandr_jax.objectives.settings import ContrastiveSettings

# Arrays of a batch that it needs, with a row a query.
LIKELIHOOD_ARRAYS = ("corrupted_ids", "positive_mask", "query_ids", "query_mask")
_BLANK = "_"


@dataclasses.dataclass(frozen=True)
class Corruption:
    """How documents are corrupted.

    Attributes:
        share: How many of a document's tokens, special ones left out.
        blank: The token that takes their place.
        kept: Special tokens, which stay.
    """

    share: float
    blank: int
    kept: tuple[int, ...]

    def of(self, ids: Sequence[int], draw: Sequence[int]) -> np.ndarray:
        """A document with blanks: [tokens] int32; `draw` are the numbers that it is drawn by."""
        corrupted = np.array(ids, np.int32)
        words = np.flatnonzero(~np.isin(corrupted, self.kept))
        count = round(self.share * len(words))
        corrupted[np.random.default_rng(draw).permutation(words)[:count]] = self.blank
        return corrupted


def corruption_of(retriever: Retriever, settings: "ContrastiveSettings") -> Corruption | None:
    """How the config's section `contrastive` has documents corrupted; None: nothing reads them.

    Raises:
        UserError: The retriever has no vector that a query could be foretold from.
    """
    if not settings.query_likelihood_weight:
        return None
    name, module = "contrastive.query_likelihood_weight is above 0", retriever.module
    writes = family_of(module).generates and module.config.causal
    if not (writes and retriever.pooling == "last"):
        raise UserError(
            f"{name}, which is for causal decoders with retriever.pooling 'last'; this retriever "
            f"is a {type(module).__name__} with {retriever.pooling!r}"
        )
    tokenizer = retriever.tokenizer
    (ids,), kept = retriever.token_ids(["a"]), tuple(tokenizer.all_special_ids)
    if ids[-1] not in kept:
        raise UserError(
            f"{name}, but no token ends a text, by which its query could see it; set "
            "retriever.end_token"
        )
    blank = tokenizer(_BLANK, add_special_tokens=False)["input_ids"] or [tokenizer.pad_token_id]
    return Corruption(settings.query_likelihood_corruption, blank[-1], kept)


def likelihood_mask(
    document: jax.Array, query: jax.Array, *, blocked: bool = True
) -> tuple[Mask, jax.Array]:
    """What a document's and then a query's tokens attend to, and where the document ends.

    Args:
        document: [rows, tokens], 1 for real tokens, which come first.
        query: [rows, tokens] likewise.
        blocked: The query sees of the document its last token alone; else a plain causal mask.

    Returns:
        The mask over both, the document first, and [rows] int32, the position of its last token.
    """
    real = jnp.concatenate([document, query], axis=1) > 0
    length = real.shape[1]
    allowed = jnp.tril(jnp.ones((length, length), bool)) & real[:, None]
    end = jnp.sum(document > 0, axis=1) - 1
    if blocked:
        position = jnp.arange(length)
        of_query = position >= document.shape[1]
        seen = of_query | (position == end[:, None])
        allowed &= ~of_query[:, None] | seen[:, None]
    return Mask(array=allowed), end


def query_losses(
    params: Mapping[str, Any],
    batch: Mapping[str, jax.Array],
    *,
    retriever: Retriever,
    blocked: bool = True,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """-log p of a query's tokens after its document, their mean: [rows] float32, in nats.

    Args:
        params: As of `Retriever.embed`.
        batch: `LIKELIHOOD_ARRAYS`, from `make_batch` and `Corruption`: a query's tokens are those
            that it is read by, its prompt and its own end token among them.
        retriever: A causal decoder.
        blocked: As of `likelihood_mask`.
        dropout_key: Turns dropout on.
    """
    ids, query = batch["query_ids"], batch["query_mask"]
    mask, end = likelihood_mask(batch["positive_mask"], query, blocked=blocked)
    tokens = jnp.concatenate([batch["corrupted_ids"], ids], axis=1)
    positions = token_positions(jnp.concatenate([batch["positive_mask"], query], axis=1))
    hidden = retriever.states(params, tokens, positions, mask, dropout_key=dropout_key)
    # The end token foretells the query's first one, and each of these the next.
    first = jnp.take_along_axis(hidden, end[:, None, None], axis=1)
    before = jnp.concatenate([first, hidden[:, -ids.shape[1] : -1]], axis=1)
    log_probs = token_log_probs(retriever.logits(params, before), ids)
    total = jnp.sum(jnp.where(query > 0, log_probs, 0.0), axis=1)
    return -total / jnp.maximum(jnp.sum(query, axis=1), 1)
