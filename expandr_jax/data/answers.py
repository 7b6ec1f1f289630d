"""Answers that a collection gives to its queries, and whether a text holds one."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from expandr_jax.errors import UserError, shown


def answers_of(where: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    """The answers in a line of queries, none where it has no field for them.

    UserError, naming `where`, for what is no list of strings with a letter or digit each: any text
    would hold a string without one.
    """
    answers = row.get("answers")
    if answers is None:
        return ()
    if not isinstance(answers, list):
        raise UserError(f'{where}: field "answers" is {shown(answers)}; expected a list of strings')
    for answer in answers:
        if not isinstance(answer, str) or not normalized_words(answer):
            raise UserError(
                f'{where}: field "answers" has {shown(answer)}; expected strings with a letter or '
                "digit"
            )
    return tuple(answers)


def normalized_words(text: str) -> str:
    """A text in lower case, without punctuation, one space between words.

    So SQuAD's evaluation compares answers (Rajpurkar et al., EMNLP 2016), but for articles, which
    stay: without its own, "The Who" stands in any text.
    """
    text = unicodedata.normalize("NFC", text).lower()
    return " ".join(re.sub(r"[^\w\s]|_", "", text).split())


def holds_answer(text: str, answers: Sequence[str]) -> bool:
    """Whether a text has one of the answers, as whole words; both are of `normalized_words`."""
    return any(f" {answer} " in f" {text} " for answer in answers)
