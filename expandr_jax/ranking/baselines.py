"""The baseline of a row with expansions: the same row without them."""

import re
from collections.abc import Iterable, Sequence

# In the place of a row of the trained pair. The first has learned from every label that the pair
# has seen, the second from the retriever's, the third is the pair's own retriever.
UNEXPANDED = ("fine-tuned-all", "fine-tuned", "expandr-plain")
PLAIN = UNEXPANDED[-1]
_OURS = re.compile(rf"(?!{PLAIN}\b)expandr(-[\w.-]+)?")


def baselines(system: str, systems: Iterable[str]) -> list[str]:
    """The systems that a system is compared with, of those given, the most telling one first.

    They are made as it is, by the same stages, but of plain queries: for a row of the trained pair
    `UNEXPANDED`, for BASE+S the row BASE, for documents expanded (BASE@D) those as they are.
    interpolation:bm25:expandr has interpolation:bm25:fine-tuned-all, for example. None for a system
    that expands nothing.
    """
    there = set(systems) - {system}
    words = [_without(word) for word in system.split(":")]
    count = max(map(len, words))
    names = [":".join(each[min(i, len(each) - 1)] for each in words) for i in range(count)]
    return [name for name in dict.fromkeys(names) if name in there]


def _without(word: str) -> Sequence[str]:
    """What a leaf, or feedback on one, is replaced by in baselines; itself where by nothing."""
    base, plus, method = word.partition("+")
    base, at, _ = base.partition("@")
    if _OURS.fullmatch(base):  # Feedback on it is feedback on these.
        return [f"{name}{plus}{method}" for name in UNEXPANDED]
    return [base] if plus or at else [word]
