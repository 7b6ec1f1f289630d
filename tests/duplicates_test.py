import random
import tracemalloc

from expandr_jax.data.duplicates import near_duplicate_clusters, near_duplicates, words


def grams(text):
    tokens = words(text)
    return {tuple(tokens[i : i + 5]) for i in range(max(1, len(tokens) - 4))}


def clusters_by_brute_force(texts, threshold):
    labels = list(range(len(texts)))
    for i, first in enumerate(map(grams, texts)):
        for j, second in enumerate(map(grams, texts[:i])):
            if len(first & second) / len(first | second) > threshold:
                low, high = sorted((labels[i], labels[j]))
                labels = [low if label == high else label for label in labels]
    return labels


def edited(text, rng):
    tokens = text.split()
    for _ in range(rng.randrange(8)):
        tokens[rng.randrange(len(tokens))] = str(rng.randrange(1000))
    return " ".join(tokens[: rng.randrange(len(tokens) // 2, len(tokens) + 1)])


def test_equals_comparing_every_pair():
    rng = random.Random(0)
    for threshold in (0.2, 0.5, 0.9):
        sizes = [rng.randrange(1, 120) for _ in range(40)]
        bases = [" ".join(str(rng.randrange(30)) for _ in range(size)) for size in sizes]
        texts = [text for base in bases for text in (base, *(edited(base, rng) for _ in range(3)))]
        rng.shuffle(texts)
        labels = near_duplicate_clusters(texts, threshold)
        assert labels == clusters_by_brute_force(texts, threshold)
        assert 1 < len(set(labels)) < len(texts)


def test_near_duplicates_are_those_of_comparing_every_pair():
    rng = random.Random(1)
    bases = [
        " ".join(str(rng.randrange(30)) for _ in range(rng.randrange(1, 60))) for _ in range(40)
    ]
    texts = [edited(base, rng) for base in bases for _ in range(3)]
    for threshold in (0.2, 0.5, 0.9):
        expected = [
            [
                number
                for number, base in enumerate(bases[:20])
                if len(grams(t) & grams(base)) / len(grams(t) | grams(base)) > threshold
            ]
            for t in texts
        ]
        assert list(near_duplicates(texts, bases[:20], threshold)) == expected
        assert 0 < sum(map(bool, expected)) < len(texts)


def test_exactly_the_threshold_is_no_link():
    first = "a b c d e f g"  # 3 grams, of which 2 are among the 4 - 1 of the union
    assert near_duplicate_clusters([first, "A, b c d e f."], 0.5) == [0, 0]  # 2/3
    assert near_duplicate_clusters([first, "A, b c d e f."], 2 / 3) == [0, 1]


def test_short_texts_count_as_one_gram():
    assert near_duplicate_clusters(["a b", "", "A b!", "a b c", "--"]) == [0, 1, 0, 3, 1]
    assert near_duplicate_clusters([]) == []


def test_one_cluster_through_a_chain():
    text = [str(number) for number in range(40)]
    texts = [" ".join(text[start : start + 20]) for start in (0, 10, 5)]
    assert near_duplicate_clusters(texts[:2]) == [0, 1]
    assert near_duplicate_clusters(texts, 0.5) == [0, 0, 0]


def test_memory_does_not_grow_with_the_square_of_a_cluster():
    """Every text of a cluster is linked to every other one; the links are not held."""
    texts = ["ten words that are the same in each of them"] * 2000
    tracemalloc.start()
    try:
        assert {*near_duplicate_clusters(texts)} == {0}
        assert tracemalloc.get_traced_memory()[1] < 40 * 2**20  # 4,000,000 links take 64 MB.
    finally:
        tracemalloc.stop()
