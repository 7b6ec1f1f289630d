"""BM25 for weighted words: weights of counts, of BM25 itself, and of RM3, against NumPy."""

import collections
import json

import numpy as np
import pytest
from ml_collections import ConfigDict

from expandr_jax import search
from expandr_jax.errors import UserError
from expandr_jax.expansion.strategies import STRATEGIES
from expandr_jax.ranking.ranker import Choice, Expansions, Ranker, Searches
from expandr_jax.ranking.systems import parse_system
from expandr_jax.ranking.words import rm3, saturated
from tests.bm25_test import zipf

# Of all lengths, so that scores are seldom equal.
TEXTS = [" ".join(text.split()[: 5 + i % 41]) for i, text in enumerate(zipf(200, 45, 400, 0))]
QUERIES = dict(zip("abcdef", zipf(6, 5, 400, 1), strict=True))
QUERIES["f"] = "w3 w3 w9 unknown"
SETTINGS = ConfigDict({"depth": 60, "drop_identical_ids": False})
VOCABULARY = sorted({word for text in TEXTS for word in text.split()})
# As texts have them: documents, and words in the order of the alphabet.
COUNTS = np.array([[text.split().count(word) for word in VOCABULARY] for text in TEXTS], float)
FREQUENCY = (COUNTS > 0).sum(0)
IDF = np.log(1 + (len(TEXTS) - FREQUENCY + 0.5) / (FREQUENCY + 0.5))


def weighed(counts, length):
    """Lucene's weights of the words of texts, which have so many words."""
    norm = 0.9 * (0.6 + 0.4 * length / COUNTS.sum(1).mean())
    return IDF * counts / (counts + norm)


DOCUMENTS = weighed(COUNTS, COUNTS.sum(1, keepdims=True))


def vector(query):
    return np.array([query.split().count(word) for word in VOCABULARY], float)


@pytest.fixture(scope="module")
def index():
    return search.Bm25Index(TEXTS)


def ranked(index, name, queries=QUERIES, texts=None):
    ranker = Ranker(
        queries,
        Searches(
            lambda _: index, None, {f"d{i}": text for i, text in enumerate(TEXTS)}, texts=texts
        ),
        lambda _: Expansions(STRATEGIES["q2e"], [[["w5 w7"]] for _ in queries]),
        lambda _: Choice(None, 1),
        SETTINGS,
    )
    return ranker.rank(parse_system(name))


def assert_scores(run, expected):
    """The run has the best 60 of those [queries, documents] that score anything."""
    for (query, found), scores in zip(run.items(), expected, strict=True):
        best = np.sort(scores[scores > 1e-9])[::-1][: SETTINGS.depth]
        np.testing.assert_allclose(list(found.values()), best, rtol=2e-5)
        of_documents = [scores[int(document[1:])] for document in found]
        np.testing.assert_allclose(of_documents, best, rtol=2e-5, err_msg=query)


@pytest.mark.parametrize("saved", [False, True])
def test_weights_that_are_counts_find_what_the_text_does(index, tmp_path, saved):
    if saved:
        index.save(tmp_path)
        index = search.load_index(tmp_path)
    queries = list(QUERIES.values())
    weights = [collections.Counter(query.split()) for query in queries]
    assert max(max(each.values()) for each in weights) > 1
    scores, rows = index.search_weighted(weights, 40)
    expected, expected_rows = index.search(queries, 40)
    np.testing.assert_allclose(scores, expected, rtol=1e-6)
    once = [i for i, each in enumerate(weights) if max(each.values()) == 1]
    np.testing.assert_array_equal(rows[once], expected_rows[once])
    halves = [{word: n / 2 for word, n in each.items()} for each in weights]
    np.testing.assert_allclose(index.search_weighted(halves, 40)[0], expected / 2, rtol=1e-6)
    real = [{"w1": 0.25, "w2": 3.5, "unknown": 1.0}, {"w3": 0.0}, {}]
    found, _ = index.search_weighted(real, 200)
    one, two = VOCABULARY.index("w1"), VOCABULARY.index("w2")
    scores = np.sort(0.25 * DOCUMENTS[:, one] + 3.5 * DOCUMENTS[:, two])[::-1]
    np.testing.assert_allclose(found[0], scores, rtol=1e-5)
    assert not found[1:].any()


def test_weights_and_depths_that_are_none_are_refused(index):
    for weight in (-0.5, float("nan"), float("inf")):
        with pytest.raises(UserError, match=r"BM25: 'w1' has weight .* expected a number"):
            index.search_weighted([{"w1": weight}], 3)
    with pytest.raises(UserError, match="k is 0"):
        index.search_weighted([{"w1": 1.0}], 0)


def test_an_index_knows_how_often_words_occur_and_how_long_texts_are(index, tmp_path):
    index.save(tmp_path)
    for each in (index, search.load_index(tmp_path)):
        assert [each.frequency(word) for word in VOCABULARY] == FREQUENCY.tolist()
        assert each.frequency("unknown") == 0
        assert each.mean_length == COUNTS.sum(1).mean()
    assert search.words_of(["The cat's Tail", "", "a"]) == [["cat", "tail"], [], []]


def test_an_index_without_lengths_is_built_again(tmp_path, caplog):
    search.kept_bm25(tmp_path, TEXTS)
    (directory,) = tmp_path.glob("bm25.index-*")
    manifest = json.loads((directory / "index.json").read_text())
    del manifest["sha256"], manifest["files"]["lengths.json"]
    manifest["sha256"] = search.index.hash_json(manifest)
    (directory / "index.json").write_text(json.dumps(manifest))
    (directory / "lengths.json").unlink()
    assert search.kept_bm25(tmp_path, TEXTS).mean_length == COUNTS.sum(1).mean()
    assert "an older version wrote the index; build it again" in caplog.text


def test_bm25q_weighs_a_query_as_if_it_were_a_document(index):
    queries = [vector(query) for query in QUERIES.values()]
    lengths = [len(query.split()) for query in QUERIES.values()]  # Unknown words count.
    expected = [weighed(q, n) @ DOCUMENTS.T for q, n in zip(queries, lengths, strict=True)]
    run = ranked(index, "bm25q")
    assert_scores(run, expected)
    assert run != ranked(index, "bm25")
    expanded = [weighed(q + vector("w5 w7"), n + 2) @ DOCUMENTS.T
                for q, n in zip(queries, lengths, strict=True)]  # fmt: skip
    assert_scores(ranked(index, "bm25q+q2e"), expanded)
    # "a" twice and "b" of four documents with two words each: norms are 0.9 (0.6 + 0.4 * 3 / 2).
    four = search.Bm25Index(["aa bb", "aa cc", "bb dd", "dd ee"])
    idf = np.log(1 + 2.5 / 2.5)
    weights = saturated(["aa", "aa", "bb"], four)
    assert weights == pytest.approx({"aa": idf * 2 / (2 + 1.08), "bb": idf / (1 + 1.08)})


def test_rm3_of_two_documents_by_hand():
    index = search.Bm25Index(
        ["apple banana banana cherry of pie", "apple date", *["filler words"] * 18]
    )
    found = [(2.0, ["apple", "banana", "banana", "cherry", "filler", "b_d", "x" * 21]),
             (1.0, ["apple", "date"])]  # fmt: skip
    # Shares of the first, 1/4, 2/4 and 1/4, count twice; apple and date are half of the second.
    # apple 1, banana 1, cherry 1/2 and date 1/2 sum to 3, and half of the query is apple.
    expected = {"apple": 1 / 2 + 1 / 6, "banana": 1 / 6, "cherry": 1 / 12, "date": 1 / 12}
    assert rm3({"apple": 3.0}, found, index) == pytest.approx(expected)
    assert rm3({"apple": 3.0, "zebra": 1.0}, [], index) == {"apple": 0.375, "zebra": 0.125}
    assert rm3({}, [(1.0, [])], index) == {}
    # Twelve words of one document: those of it that come first in the alphabet are taken.
    many = [f"rare{letter}" for letter in "lkjihgfedcba"]
    taken = rm3({"apple": 1.0}, [(1.0, many)], index)
    assert taken == pytest.approx({"apple": 0.5, **dict.fromkeys(sorted(many)[:10], 0.05)})


def first_ten(weights):
    """The ten highest of some weights, by the alphabet among equals; all others 0."""
    kept = np.zeros_like(weights)
    best = np.argsort(-weights, kind="stable")[:10]
    kept[best] = weights[best]
    return kept


def twin_of_rm3(query, first):
    """A query's weights after feedback on the documents that it scores so."""
    scores = DOCUMENTS @ first
    rare = len(TEXTS) >= 10 * FREQUENCY
    model = np.zeros(len(VOCABULARY))
    ranks = [(np.float32(score), f"d{row}", row) for row, score in enumerate(scores)]
    for _, _, row in sorted(ranks, reverse=True)[:10]:  # As trec_eval breaks ties.
        counts = first_ten(COUNTS[row] * rare)
        if counts.any():
            model += scores[row] * counts / counts.sum()
    model = first_ten(np.where(model > 0, model, 0))
    return 0.5 * query + 0.5 * model / model.sum()


@pytest.mark.parametrize("name", ["bm25+rm3", "bm25q+rm3", "bm25+q2e+rm3", "bm25+rm3+rm3"])
def test_rm3_equals_its_twin(index, name):
    expected = []
    for text in QUERIES.values():
        text += " w5 w7" if "q2e" in name else ""
        counts, length = vector(text), len(text.split())
        weights = weighed(counts, length) if "bm25q" in name else counts
        # An unknown word has its share of the query, but no weight by BM25.
        share = weights / (weights.sum() if "bm25q" in name else length)
        after = twin_of_rm3(share, weights)
        if name.endswith("rm3+rm3"):
            after = twin_of_rm3(after, after)
        expected.append(DOCUMENTS @ after)
    assert_scores(ranked(index, name), expected)


def test_rm3_reads_documents_as_they_are_indexed(index):
    """Feedback on expanded documents takes their words, too."""
    texts = [f"{text} onlyhere{i}" for i, text in enumerate(TEXTS)]
    expanded = search.Bm25Index(texts)
    seen = []
    run = ranked(expanded, "bm25@d2q+rm3", texts=lambda how: seen.append(how) or texts)
    assert set(seen) == {"d2q"}
    assert run != ranked(index, "bm25+rm3")
