"""The baselines of a row with expansions: the same row without them, and with feedback instead."""

import re
from collections.abc import Iterable, Sequence

from expandr_jax.ranking.stages import FEEDBACKS, WORD_FEEDBACKS

# In the place of a row of the trained pair. The first has learned from every label that the pair
# has seen, the second from the retriever's, the third is the pair's own retriever.
UNEXPANDED = ("fine-tuned-all", "fine-tuned", "expandr-plain")
PLAIN = UNEXPANDED[-1]
_OURS = re.compile(rf"(?!{PLAIN}\b)expandr(-[\w.-]+)?")
# Nothing has to be written for it, so that an expansion has to do better.
_FEEDBACK = (*FEEDBACKS, *WORD_FEEDBACKS)


def baselines(system: str, systems: Iterable[str]) -> list[str]:
    """The systems that a system is compared with, of those given, the most telling one first.

    They are made as it is, by the same stages, but of plain queries: for a row of the trained pair
    `UNEXPANDED`, for BASE+S the row BASE, for documents expanded (BASE@D) those as they are; and
    these with feedback. interpolation:bm25:expandr has interpolation:bm25:fine-tuned-all, for
    example, and bm25+expansion has bm25 and bm25+rm3. None for a system that expands nothing.
    """
    options = [_without(word) for word in system.split(":")]
    found = {}
    for other in systems:
        words = other.split(":")
        if len(words) != len(options) or other == system:
            continue
        if all(word in own for word, own in zip(words, options, strict=True)):
            found[other] = [own.index(word) for word, own in zip(words, options, strict=True)]
    return sorted(found, key=found.__getitem__)


def _without(word: str) -> Sequence[str]:
    """What a leaf, or feedback on one, is replaced by in baselines; itself where by nothing."""
    base, plus, method = word.partition("+")
    base, at, _ = base.partition("@")
    if _OURS.fullmatch(base):
        # Feedback on it is feedback on these.
        return [f"{name}{plus}{method}" for name in UNEXPANDED] if plus else _fed_back(UNEXPANDED)
    if not (plus or at):
        return [word]
    return [base] if method in _FEEDBACK else _fed_back([base])


def _fed_back(names: Sequence[str]) -> list[str]:
    """Names of systems, then those of feedback on each."""
    return [*names, *(f"{name}+{method}" for name in names for method in _FEEDBACK)]
