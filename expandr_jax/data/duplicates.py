"""Near-duplicate texts: clusters of those that share more than half of their word 5-grams."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from scipy import sparse

GRAM = 5
_ROWS_AT_ONCE = 64  # Texts that are compared with all others at a time.


def words(text: str) -> list[str]:
    """Returns a text's words, case-folded: runs of letters, digits and underscores."""
    return re.findall(r"\w+", text.casefold())


def near_duplicate_clusters(
    texts: Sequence[str],
    threshold: float = 0.5,
    progress: Callable[[int], None] = lambda count: None,
) -> list[int]:
    """Labels each text with the lowest index in its cluster.

    Two texts are linked when the Jaccard similarity of their sets of word 5-grams is above the
    threshold; clusters are the connected components.

    Args:
        texts: a text of fewer than five words counts as a single gram.
        threshold: between 0 and 1.
        progress: called with the number of texts done since its last call.
    """
    if not texts:
        return []
    numbers: dict[tuple[str, ...], int] = {}
    held = [[numbers.setdefault(gram, len(numbers)) for gram in _grams(text)] for text in texts]
    sizes = np.array([len(grams) for grams in held])
    columns, starts = np.concatenate(held), np.cumsum([0, *sizes])
    grams = sparse.csr_array((np.ones(len(columns), np.int32), columns, starts))
    lowest = everyone = np.arange(len(texts))  # The lowest index of each text's cluster.
    for start in range(0, len(texts), _ROWS_AT_ONCE):
        rows = grams[start : start + _ROWS_AT_ONCE]
        common = (rows @ grams.T).tocoo()
        first, second = common.row + start, common.col
        near = common.data > threshold * (sizes[first] + sizes[second] - common.data)
        # Links are not kept: the texts of one cluster have as many as the square of their number.
        pairs = np.concatenate([everyone, first[near]]), np.concatenate([lowest, second[near]])
        graph = sparse.coo_array((np.ones(len(pairs[0])), pairs), shape=[len(texts)] * 2)
        labels = sparse.csgraph.connected_components(graph, directed=False)[1]
        lowest = np.unique(labels, return_index=True)[1][labels]
        progress(rows.shape[0])
    return lowest.tolist()


def near_duplicates(
    texts: Iterable[str], of: Sequence[str], threshold: float = 0.5
) -> Iterator[list[int]]:
    """Yields, for each text, those of a few others that it nearly equals.

    Args:
        texts: As many as there are; one is in memory at a time.
        of: What they are compared with.
        threshold: Jaccard similarity of word 5-grams above which two texts are near.
    """
    sizes = []
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, text in enumerate(of):
        grams = _grams(text)
        sizes.append(len(grams))
        for gram in grams:
            holders[gram].append(number)
    for text in texts:
        grams = _grams(text)
        shared = Counter(number for gram in grams for number in holders.get(gram, ()))
        yield [
            number
            for number, count in sorted(shared.items())
            if count > threshold * (len(grams) + sizes[number] - count)
        ]


def _grams(text: str) -> set[tuple[str, ...]]:
    """The word 5-grams of a text; of fewer words, all of them as one gram."""
    tokens = words(text)
    return {tuple(tokens[i : i + GRAM]) for i in range(max(1, len(tokens) - GRAM + 1))}
