"""Reads what step B learns: preference pairs in the formats of TRL, or candidates with rewards."""

from __future__ import annotations

import collections
import contextlib
import datetime
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from expandr_jax.data.chat import apply_template
from expandr_jax.errors import UserError
from expandr_jax.files.records import Row, read_jsonl
from expandr_jax.files.stored_rows import StoredRows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SIDES = ("chosen", "rejected")
Template = Callable[..., str]  # `apply_template` of a tokenizer, on a day.


class _BadPair(Exception):
    """Raised for a pair that cannot be trained on, with the reason that it counts under."""


def read_preferences(
    path: str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt_length: int,
    on_bad_pair: str = "error",
    learned: Callable[[str], Sequence[Any]] | None = None,
    today: datetime.date | None = None,
) -> tuple[Sequence[dict[str, str]], dict[str, int]]:
    """The pairs of a JSON-lines file, each as the text before the response and two responses.

    A line has "prompt", "chosen" and "rejected". Where they are strings, a chat template must have
    been applied; a prompt that lacks what the tokenizer puts before any text, as Llama's does, gets
    it. Where they are lists of {"role", "content"}, the prompt
    gets the tokenizer's chat template, once, and each response is one assistant's message, as the
    template writes it. "chosen" and "rejected" may also be whole conversations, without a prompt or
    with one as a string: the messages that both begin with are the prompt. The tokenizer's end
    token is left out at a response's very end. "tools", a list or its JSON, and
    "chat_template_kwargs" are for the template, as in TRL.

    Args:
        path: The file.
        tokenizer: Has the chat template; counts a prompt's tokens.
        prompt_length: Most tokens of a prompt, chat template included.
        on_bad_pair: "error" stops at the first pair that cannot be used; "drop" leaves it out.
        learned: A response to those of its tokens that are trained on, where it may be cut: a pair
            of which these are the same cannot be used.
        today: The date that a chat template is told; None: the present one.

    Returns:
        {"prompt", "chosen", "rejected"} of each pair that can be used, and how many were dropped
        for what reason.

    Raises:
        UserError: A line is not a JSON object; or the first bad pair, by file and line.
    """
    template, start = _template_of(tokenizer, today), _text_start(tokenizer)

    def read(row: Row) -> dict[str, str]:
        pair = _texts(row, template, start, tokenizer.eos_token or "")
        _check(pair, tokenizer, prompt_length, learned)
        return pair

    return _read(path, read, on_bad_pair)


def read_candidates(
    path: str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase,
    prompt_of: Callable[[str], str],
    *,
    prompt_length: int | None = None,
    on_bad_pair: str = "error",
    today: datetime.date | None = None,
) -> tuple[Sequence[Row], dict[str, int]]:
    """The lines of a JSON-lines file of prompts, each with candidate responses and their rewards.

    A line has "candidates", a list of {"text", "reward"}, and a "prompt", a string or messages as
    `read_preferences` takes them; or a "query" in its place, as candidates.jsonl of a run has it.
    Other fields are let through.

    Args:
        path, tokenizer, on_bad_pair, today: As for `read_preferences`, which raises the same.
        prompt_of: A query to the prompt that asks for its expansion, chat template included.
        prompt_length: Most tokens of a prompt, chat template included; None for any.

    Returns:
        The lines, each with its "prompt" as text, and how many were dropped for what reason.
    """
    template, start = _template_of(tokenizer, today), _text_start(tokenizer)

    def read(row: Row) -> Row:
        _check_candidates(row)
        text = row["prompt"] if "prompt" in row else prompt_of(row["query"])
        if not isinstance(text, str):
            text = _chat_prompt(text, template, row)
        elif "prompt" in row:
            text = _started(text, start)
        _check_prompt(text, tokenizer, prompt_length)
        return {**row, "prompt": text}

    return _read(path, read, on_bad_pair)


def _read(
    path: str | os.PathLike, read: Callable[[Row], Row], on_bad_pair: str
) -> tuple[Sequence[Row], dict[str, int]]:
    """What `read` makes of each line, and how many lines were dropped for what reason."""
    dropped: collections.Counter[str] = collections.Counter()

    def usable() -> Iterator[Row]:
        for number, row in read_jsonl(path, {}):
            try:
                yield read(row)
            except _BadPair as error:
                reason, mistake = error.args
                if on_bad_pair == "error":
                    raise UserError(f"{path}:{number}: {mistake}") from None
                dropped[reason] += 1

    return StoredRows(usable(), "pairs"), dict(dropped)


def _check_candidates(row: Row) -> None:
    """Raises unless a line has a prompt or query, and candidates with rewards."""
    if "prompt" not in row and not isinstance(row.get("query"), str):
        raise _BadPair("missing field", 'no field "prompt" and no text "query"; expected one')
    if not isinstance(row.get("candidates"), list) or not row["candidates"]:
        raise _BadPair("missing field", 'no list "candidates"; expected {"text", "reward"} in it')
    for number, candidate in enumerate(row["candidates"]):
        reward = candidate.get("reward") if isinstance(candidate, dict) else None
        is_number = isinstance(reward, int | float) and not isinstance(reward, bool)
        # Not math.isfinite: JSON's whole numbers may be larger than any float.
        if not is_number or not abs(reward) < 1e30 or not isinstance(candidate.get("text"), str):
            raise _BadPair(
                "wrong type",
                f'candidate {number} is not {{"text", "reward"}}, a string and a finite number',
            )


def _template_of(tokenizer: PreTrainedTokenizerBase, today: datetime.date | None) -> Template:
    day = today or datetime.date.today()
    return lambda messages, **options: apply_template(tokenizer, messages, day, **options)


def _text_start(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token that a tokenizer by itself puts before any text; "" if there is none."""
    bos = tokenizer.bos_token_id
    before = [] if bos is None else tokenizer("text")["input_ids"][:1]
    after = tokenizer("text", add_special_tokens=False)["input_ids"][:1]
    return tokenizer.bos_token if before == [bos] != after else ""


def _started(prompt: str, start: str) -> str:
    """A prompt that begins with `start` once; of one that has it as text, TRL makes two."""
    return prompt if prompt.startswith(start) or not prompt.strip() else start + prompt


def _texts(row: Row, template: Template, start: str, end: str) -> dict[str, str]:
    """A line's prompt and responses as text, without the end token at a response's very end."""
    for name in SIDES:
        if name not in row:
            raise _BadPair("missing field", f'no field "{name}"; expected prompt, chosen, rejected')
    if name := next((name for name in ("image", "images") if row.get(name)), None):
        raise _BadPair(
            "wrong type", f'field "{name}" is not supported: models here read text alone'
        )
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        if "prompt" not in row:
            raise _BadPair(
                "missing field", 'no field "prompt"; only conversations go without a prompt'
            )
        if not isinstance(prompt, str):
            raise _BadPair("wrong type", "the prompt must be a string, as the responses are")
        return {"prompt": _started(prompt, start), "chosen": chosen, "rejected": rejected}
    _check_messages(chosen, "chosen")
    _check_messages(rejected, "rejected")
    if "prompt" not in row or isinstance(prompt, str):
        pairs = zip(chosen, rejected, strict=False)
        shortest = min(len(chosen), len(rejected))
        shared = next((i for i, (a, b) in enumerate(pairs) if a != b), shortest)
        # Equal conversations are left with a response each, and found to be equal.
        shared = min(shared, shortest - 1)
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        if not prompt:
            raise _BadPair("missing field", "chosen and rejected begin with no common message")
    for name, messages in zip(SIDES, (chosen, rejected), strict=True):
        if len(messages) != 1 or messages[0]["role"] != "assistant":
            raise _BadPair("wrong type", f"{name} must be one assistant's message after the prompt")
        if not messages[0]["content"].strip():
            raise _BadPair("empty", f"{name} is empty")
    text = _chat_prompt(prompt, template, row)
    whole = [_rendered([*prompt, *side], template, row) for side in (chosen, rejected)]
    # The template writes responses, not we: it may trim them, or put a space or an empty thought
    # before them. What follows the prompt is the response, from where the texts differ, as in TRL.
    alike = itertools.takewhile(lambda c: len({*c}) == 1, zip(text, *whole, strict=False))
    text = "".join(characters[0] for characters in alike)
    responses = (full[len(text) :].removesuffix(end) for full in whole)
    return {"prompt": text, **dict(zip(SIDES, responses, strict=True))}


def _chat_prompt(prompt: Any, template: Template, row: Row) -> str:
    """Messages with the chat template applied, up to where the model's turn begins."""
    _check_messages(prompt, "prompt")
    if prompt[-1]["role"] == "assistant":
        raise _BadPair("wrong type", "the prompt ends with an assistant's message")
    return _rendered(prompt, template, row, add_generation_prompt=True)


def _rendered(
    messages: Sequence[Mapping[str, str]], template: Template, row: Row, **options: Any
) -> str:
    """Messages with the chat template applied, and a line's tools and options of the template."""
    tools, given = row.get("tools"), row.get("chat_template_kwargs") or {}
    with contextlib.suppress(ValueError):
        tools = json.loads(tools) if isinstance(tools, str) else tools
    if not isinstance(tools, list | None) or not isinstance(given, dict):
        raise _BadPair("wrong type", "tools must be a list, and chat_template_kwargs an object")
    try:
        return template(messages, tools=tools or None, **options, **given)
    except Exception as error:  # A template may raise anything, and transformers as well.
        reason = " ".join(str(error).split())
        raise _BadPair("wrong type", f"the chat template refuses the prompt: {reason}") from None


def _check_messages(messages: Any, name: str) -> None:
    """Raises unless this is a list of messages."""
    if not isinstance(messages, list) or not messages:
        raise _BadPair(
            "wrong type", f"{name} must be a string or a list of messages, as the others"
        )
    for message in messages:
        is_message = isinstance(message, dict) and all(
            isinstance(message.get(key), str) for key in ("role", "content")
        )
        if not is_message:
            raise _BadPair(
                "wrong type",
                f'{name} has a message that is not {{"role", "content"}}, both strings',
            )


def _check(
    pair: Mapping[str, str],
    tokenizer: PreTrainedTokenizerBase,
    prompt_length: int,
    learned: Callable[[str], Sequence[Any]] | None,
) -> None:
    """Raises unless there is something to learn from the pair."""
    for name, text in pair.items():
        if not text.strip():
            raise _BadPair("empty", f"{name} is empty")
    if pair["chosen"] == pair["rejected"]:
        raise _BadPair("nothing preferred", "chosen and rejected are the same text")
    _check_prompt(pair["prompt"], tokenizer, prompt_length)
    if learned is not None:
        chosen, rejected = (learned(pair[name]) for name in SIDES)
        if list(chosen) == list(rejected):
            raise _BadPair(
                "nothing preferred",
                f"chosen and rejected are the same {len(chosen)} tokens once cut to their limit",
            )


def _check_prompt(
    prompt: str, tokenizer: PreTrainedTokenizerBase, prompt_length: int | None
) -> None:
    """Raises if there is no prompt, or it is too long."""
    if not prompt.strip():
        raise _BadPair("empty", "prompt is empty")
    if prompt_length is None:
        return
    count = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    if count > prompt_length:
        raise _BadPair(
            "prompt too long", f"the prompt has {count} tokens; at most {prompt_length} are allowed"
        )
