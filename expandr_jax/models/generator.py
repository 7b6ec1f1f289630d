"""A chat model with what it takes to prompt it."""

from __future__ import annotations

import dataclasses
import datetime
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from expandr_jax.data.chat import apply_template
from expandr_jax.files.records import hash_json
from expandr_jax.models.decoder import Decoder
from expandr_jax.models.identity import module_identity, tokenizer_identity
from expandr_jax.models.token_ids import check_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_ANSWER = "the assistant's answer"


@dataclasses.dataclass(frozen=True)
class Generator:
    """A decoder, its tokenizer with a chat template, and the ids that end or pad a text.

    Attributes:
        module: The decoder; parameters are passed in, never kept.
        tokenizer: Text to ids and back; has a chat template.
        eos_ids: Any of these ends a generation.
        pad_id: Fills rows; always masked.
        files: The `ModelFiles` that it is from: an export keeps what its config.json says.
        thinking: Whether a model that can is asked to reason before it answers; None: it is as the
            template has it.
        today: The date that a chat template is told, so that a run is the same on any day.
    """

    module: Decoder
    tokenizer: PreTrainedTokenizerFast
    eos_ids: tuple[int, ...]
    pad_id: int
    files: Any
    thinking: bool | None = False
    today: datetime.date = dataclasses.field(default_factory=datetime.date.today)

    def chat_text(self, user_text: str) -> str:
        """The chat template applied to a user's message, up to where the model's turn begins."""
        message = [{"role": "user", "content": user_text}]
        # Qwen 3, SmolLM 3 and GLM ask for the one name, DeepSeek and Granite for the other.
        names = () if self.thinking is None else ("enable_thinking", "thinking")
        thinking = dict.fromkeys(names, self.thinking)
        return apply_template(
            self.tokenizer, message, self.today, add_generation_prompt=True, **thinking
        )

    @functools.cached_property
    def identity(self) -> str:
        """sha256 over all that texts depend on, but for the parameters and what is asked.

        The chat template as it is told to think or not, and which day it is.
        """
        chat = self.chat_text("text"), self.eos_ids
        return hash_json([module_identity(self.module), tokenizer_identity(self.tokenizer), chat])

    @functools.cached_property
    def opens_thought(self) -> bool:
        """Whether the chat template itself begins what a model thinks, as DeepSeek-R1's does."""
        return self.chat_text("text").rstrip().endswith("<think>")

    def chat_ids(self, user_text: str, max_length: int) -> tuple[list[int], bool]:
        """Turns a user's message into the prompt of the assistant's answer.

        The chat template is applied once and brings its own special tokens.

        Args:
            user_text: The message.
            max_length: Most ids to return; of a longer prompt the end is kept, where the model's
                turn begins.

        Returns:
            The ids, and whether the beginning was cut off.
        """
        prompt = self.chat_text(user_text)
        (ids,) = self.token_ids([prompt])
        return ids[-max_length:], len(ids) > max_length

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts, without special tokens of the tokenizer's own.

        Raises:
            UserError: A text has a token that the model has no row for.
        """
        rows = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        check_ids(self.tokenizer, rows, self.module.config.vocab_size)
        return rows

    @functools.cached_property
    def end_id(self) -> int:
        """The one of `eos_ids` that ends an answer to a prompt of `chat_text`.

        What the chat template puts right after an assistant's message; if that is none of them,
        the tokenizer's eos token; if that is none of them, the first.
        """
        turns = [{"role": "user", "content": "text"}, {"role": "assistant", "content": _ANSWER}]
        try:
            text = apply_template(self.tokenizer, turns, self.today)
        except Exception:  # A template may raise anything; this one takes the user's turn alone.
            text = ""
        behind = text.rpartition(_ANSWER)[2].lstrip() if _ANSWER in text else ""
        usual = [*self.token_ids([behind])[0][:1], self.tokenizer.eos_token_id]
        return next((i for i in usual if i in self.eos_ids), self.eos_ids[0])

    def response_ids(self, text_ids: Sequence[int], max_length: int) -> tuple[list[int], bool]:
        """Turns the ids of an answer's text into what the model learns to generate.

        Args:
            text_ids: With `end_id` behind them or without.
            max_length: Most ids to return; of a longer text the beginning is kept.

        Returns:
            The ids with `end_id` at their end, and behind it what a chat template puts there, such
            as a line's end; and whether the text was cut off.
        """
        ids = list(text_ids)
        end = len(ids) - 1 - ids[::-1].index(self.end_id) if self.end_id in ids else len(ids)
        if self.tokenizer.decode(ids[end + 1 :]).strip():
            end = len(ids)  # It ended something within the text.
        if end == len(ids):
            ids.append(self.end_id)
        if end < max_length:
            return ids[:max_length], False
        return [*ids[: max_length - 1], self.end_id], True

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated ids up to the first that ends it, special tokens left out."""
        end = next((i for i, token in enumerate(ids) if token in self.eos_ids), len(ids))
        return self.tokenizer.decode(list(ids[:end]), skip_special_tokens=True)
