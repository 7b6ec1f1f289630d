"""Ids that a model has rows for: JAX would read the last row for all others, without a word."""

from collections.abc import Sequence
from typing import Any

from expandr_jax.errors import UserError


def check_ids(tokenizer: Any, rows: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Refuses ids beyond a model's embedding table, where PyTorch raises IndexError.

    Args:
        tokenizer: What the ids are of; it may have more tokens than the model has rows.
        rows: Ids of texts.
        vocab_size: Rows of the table.

    Raises:
        UserError: An id is not below `vocab_size`.
    """
    beyond = max(map(max, filter(None, rows)), default=-1)
    if beyond >= vocab_size:
        raise UserError(
            f"token {tokenizer.convert_ids_to_tokens(beyond)!r} has id {beyond}, but the model's "
            f"embedding table has {vocab_size} rows: resize it with transformers' "
            "resize_token_embeddings, or take this token out of the texts"
        )
