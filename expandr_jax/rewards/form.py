"""Rewards of a candidate's form: of its length, and of a pattern that it matches."""

import re

import numpy as np

from expandr_jax.errors import UserError
from expandr_jax.rewards.evidence import Evidence
from expandr_jax.rewards.group import Candidate


def soft_overlong(lengths: np.ndarray, cut: np.ndarray, most: int, cache: int) -> np.ndarray:
    """0 up to `most - cache` tokens, from there linearly down to -1 at `most`; -1 for a cut text.

    (most - cache - length) / cache between these: DAPO's soft overlong punishment, arXiv
    2503.14476, equation 13, where a text that goes on past `most` is one that was cut there.

    Args:
        lengths: Numbers of tokens.
        cut: Whether a text was cut by length, as many.
        most: Longest text, in tokens.
        cache: So many tokens short of it the punishment begins.
    """
    beyond = (most - cache - np.asarray(lengths, np.float64)) / cache
    return np.where(cut, -1.0, np.clip(beyond, -1.0, 0.0))


def length_reward(evidence: Evidence) -> np.ndarray:
    """`soft_overlong` of each candidate's tokens, as sampled: [queries, candidates].

    UserError where nobody kept how many there were.
    """
    context = evidence.context
    lengths = [[_length(group.query_id, c) for c in group.candidates] for group in evidence.groups]
    cut = [[c.finished == "length" for c in group.candidates] for group in evidence.groups]
    most, cache = context.most_tokens, context.settings.length_cache
    return soft_overlong(np.array(lengths), np.array(cut), most, cache)


def _length(query: str, candidate: Candidate) -> int:
    if candidate.length is None and not candidate.tokens:
        raise UserError(
            f"reward.length: nobody kept how many tokens the candidates of query {query} have"
        )
    return len(candidate.tokens) if candidate.length is None else candidate.length


def format_reward(evidence: Evidence) -> np.ndarray:
    """1 where all of a text matches `reward.format_pattern`, in which . is any character; else 0.

    [queries, candidates].
    """
    pattern = re.compile(evidence.context.settings.format_pattern, re.DOTALL)
    return np.array(
        [
            [float(bool(pattern.fullmatch(text))) for text in group.texts]
            for group in evidence.groups
        ]
    )
