"""Near-duplicate texts: clusters of those that share more than half of their word 5-grams."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

GRAM = 5


def words(text: str) -> list[str]:
    """Returns a text's words, case-folded: runs of letters, digits and underscores."""
    return re.findall(r"\w+", text.casefold())


def near_duplicate_clusters(
    texts: Sequence[str],
    threshold: float = 0.5,
    progress: Callable[[int, int], None] | None = None,
) -> list[int]:
    """Labels each text with the lowest index in its cluster.

    Two texts are linked when the Jaccard similarity of their sets of word 5-grams is above the
    threshold; clusters are the connected components. The search is exact: two such sets, each
    sorted rarest gram first, must share a gram within their first (1 - threshold) parts (prefix
    filtering, Chaudhuri et al. 2006), so only those parts are indexed.

    Args:
        texts: a text of fewer than five words counts as a single gram.
        threshold: between 0 and 1.
        progress: called with (texts done, texts in all).
    """
    progress = progress or (lambda done, total: None)
    progress(0, len(texts))
    if not texts:
        return []
    grams, first_shared = _gram_sets(texts)
    shared = [frozenset(ranks[np.searchsorted(ranks, first_shared) :].tolist()) for ranks in grams]
    parent = list(range(len(texts)))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = node = parent[parent[node]]
        return node

    postings: defaultdict[int, list[int]] = defaultdict(list)
    for index, ranks in enumerate(grams):
        size = len(ranks)
        prefix = ranks[: size - int(threshold * size - 1e-9)]
        prefix = prefix[prefix >= first_shared].tolist()
        for other in {other for gram in prefix for other in postings[gram]}:
            mine, its = root(index), root(other)
            if mine == its:
                continue
            common = len(shared[index] & shared[other])
            if common > threshold * (size + len(grams[other]) - common):
                parent[max(mine, its)] = min(mine, its)
        for gram in prefix:
            postings[gram].append(index)
        progress(index + 1, len(texts))
    return [root(index) for index in range(len(texts))]


def near_duplicates(
    texts: Iterable[str], of: Sequence[str], threshold: float = 0.5
) -> Iterator[list[int]]:
    """Yields, for each text, which of a few others it is nearly the same as.

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


def _gram_sets(texts: Sequence[str]) -> tuple[list[np.ndarray], int]:
    """Returns each text's grams as sorted ranks (rarest 0), and the first rank in two texts."""
    vocabulary: dict[str, int] = {"": 0}
    ids: list[int] = []
    lengths = []
    for text in texts:
        tokens = [vocabulary.setdefault(word, len(vocabulary)) for word in words(text)]
        tokens += [0] * (GRAM - len(tokens))
        ids += tokens
        lengths.append(len(tokens))
    tokens = np.asarray(ids, np.int64)
    grams = tokens
    for width in range(2, GRAM + 1):  # number the distinct n-grams, one word longer each time
        longer = grams[:-1] * len(vocabulary) + tokens[width - 1 :]
        grams = np.unique(longer, return_inverse=True)[1]
    # Keep those windows over the concatenated texts that lie inside one text.
    windows = np.asarray(lengths) - GRAM + 1
    starts = np.cumsum(lengths) - lengths
    owner = np.repeat(np.arange(len(texts)), windows)
    offset = np.arange(len(owner)) - np.repeat(np.cumsum(windows) - windows, windows)
    grams = grams[starts[owner] + offset]

    count = int(grams.max()) + 1
    keys = np.sort(owner * count + grams)  # np.unique hashes integers, ten times slower here
    owner, grams = np.divmod(keys[np.diff(keys, prepend=-1) > 0], count)
    frequency = np.bincount(grams, minlength=count)
    order = np.argsort(frequency, kind="stable")
    rank = np.empty(count, np.int64)
    rank[order] = np.arange(count)
    ranks = np.sort(owner * count + rank[grams]) % count
    ends = np.cumsum(np.bincount(owner, minlength=len(texts)))
    return np.split(ranks, ends[:-1]), int((frequency < 2).sum())
