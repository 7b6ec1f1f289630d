"""BM25 against Lucene's formula, behind the same functions as the other indexes."""

import errno
import json
import os
import random
import tracemalloc
import unicodedata

import bm25s
import numpy as np
import pytest

from expandr_jax import search
from expandr_jax.errors import UserError
from expandr_jax.files.records import hash_json
from expandr_jax.search import Bm25Index, bm25, text_fingerprint, word_counts, words_of

TEXTS = ["the cat sat", "a dog sat on a dog", "birds fly high", "", "Cat!", "dog sat"]


def test_bm25_equals_lucenes_formula():
    scores, indices = search.build_index(TEXTS).search(["dog sat", "CAT cat"], 6)
    documents = [["cat", "sat"], ["dog", "sat", "dog"], ["birds", "fly", "high"], [], ["cat"],
                 ["dog", "sat"]]  # fmt: skip
    mean_length = np.mean([len(words) for words in documents])

    def score(query, words):
        total = 0.0
        for word in query:
            frequency = sum(word in other for other in documents)
            weight = np.log(1 + (6 - frequency + 0.5) / (frequency + 0.5))
            norm = 0.9 * (1 - 0.4 + 0.4 * len(words) / mean_length)
            total += weight * words.count(word) / (words.count(word) + norm)
        return total

    for row, query in enumerate((["dog", "sat"], ["cat", "cat"])):
        expected = np.array([score(query, words) for words in documents])
        order = np.argsort(-expected, kind="stable")
        np.testing.assert_array_equal(indices[row], order)
        np.testing.assert_allclose(scores[row], expected[order], rtol=1e-5)
    assert scores.dtype == np.float32
    assert indices.dtype == np.int32


@pytest.mark.parametrize(
    ("texts", "query"),
    [
        (["今天天气很好", "我喜欢喝茶", "机器学习是人工智能的分支"], "喝茶"),
        (["東京タワーの高さ", "寿司を食べる", "犬・猫"], "すしと寿司"),
        (["มหาวิทยาลัยอยู่ที่ไหน", "ชาร้อนดีมาก", "หนังสือเล่มนี้"], "ชาร้อน"),
        (["오늘은날씨가좋다", "녹차를마신다", "기계 학습"], "녹차"),
        (["about 2008年北京奥运会", "茶", "nothing"], "茶"),
        (["𠮷野家", "𠀀𠀁𠀂", "x y z"], "𠀀𠀁"),
        # Vowel signs and accents are no word characters to Python.
        (["हिन्दी भाषा", "दिल्ली शहर", "कुछ और"], "हिन्दी"),
        (["ప్రధానమంత్రిని కలుసుకున్నారు", "నగరం పెద్దది", "వేరే"], "ప్రధానమంత్రిని"),
        (["بيت كبير", "كِتَاب جديد", "شيء"], "كِتَاب"),
        # One text, written with other characters.
        (["tea house", "a cafe\u0301", "x y z"], "caf\u00e9"),
        (["CPU cache", "GPU memory", "x y z"], "ＧＰＵ"),
        (["ひらがな", "カタカナ", "x y z"], "ｶﾀｶﾅ"),
        (["ankara", "istanbul", "x y z"], "İSTANBUL"),
        (["tea house", "infor\u00admation", "x y z"], "information"),
        (["foo", "tea\u200bbar", "x y z"], "bar"),  # A space that is not seen.
        (["LA", "I\u2764\ufe0fNY", "x y z"], "NY"),
    ],
)
def test_bm25_finds_words_of_scripts_without_spaces(texts, query):
    forms = [[unicodedata.normalize("NFKD", t.lower()) for t in (text, query)] for text in texts]
    wanted = max(range(3), key=lambda row: sum(char in forms[row][0] for char in forms[row][1]))
    scores, found = search.build_index(texts).search([query, "zzz"], 3)
    assert found[0, 0] == wanted
    assert scores[0, 0] > 0 == scores[0, 1] == scores[1].max()


@pytest.mark.parametrize("texts", [("กัด", "กัน"), ("ចាក់", "ចាន់"), ("เป็ด", "เป็น")])
def test_bm25_tells_words_by_their_last_letter(texts):
    scores, found = search.build_index(texts).search(list(texts), 2)
    assert found[:, 0].tolist() == [0, 1]
    assert (scores[:, 0] > scores[:, 1]).all()


def test_bm25_takes_pairs_of_characters_and_the_words_around_them():
    index = search.build_index(["Beijing 2008年北京奥运会 games", "年北", "京奥 2008"])
    pairs = {"年北", "北京", "京奥", "奥运", "运会"}
    assert index.dimension == len(pairs | {"beijing", "2008", "games"})


def test_bm25_ties_clipping_and_queries_without_known_words():
    index = search.Bm25Index(["same words"] * 5 + ["other"])
    scores, indices = index.search(["words", "unknown", "", "the"], 100)
    np.testing.assert_array_equal(indices, [range(6)] * 4)
    assert (scores[1:] == 0).all()
    assert (scores[0, :5] > 0).all()
    assert scores[0, 5] == 0
    np.testing.assert_array_equal(index.search(["words"], 3)[1], [[0, 1, 2]])
    assert index.search([], 3)[0].shape == (0, 3)


def test_bm25_refuses_what_holds_no_word():
    for texts in ([], ["", "the a", "!"]):
        with pytest.raises(UserError, match="BM25"):
            search.Bm25Index(texts)
    with pytest.raises(UserError, match="k is 0"):
        search.Bm25Index(TEXTS).search(["cat"], 0)


def test_bm25_is_saved_and_loaded_as_the_others_are(tmp_path):
    index = search.build_index(TEXTS, "bm25", k1=1.2, b=0.75)
    index.save(tmp_path / "index")
    loaded = search.load_index(tmp_path / "index")
    assert (loaded.size, loaded.dimension) == (index.size, index.dimension) == (6, 6)
    assert loaded.fingerprint == index.fingerprint == search.text_fingerprint(TEXTS)
    for found, expected in zip(
        loaded.search(["dog sat", "unknown", "birds"], 6),
        index.search(["dog sat", "unknown", "birds"], 6),
        strict=True,
    ):
        np.testing.assert_array_equal(found, expected)
    again = tmp_path / "again"
    loaded.save(again)
    np.testing.assert_array_equal(search.load_index(again).search(["cat"], 6)[1],
                                  index.search(["cat"], 6)[1])  # fmt: skip
    for file in sorted(again.iterdir()):
        data = file.read_bytes()
        file.write_bytes(data[:-2])
        with pytest.raises(UserError, match=f"{file.name}: .*build .* again"):
            search.load_index(again)
        file.write_bytes(data)


@pytest.mark.parametrize(
    ("corpus", "backend", "options", "message"),
    [
        (TEXTS, "exact", {}, "the exact backend indexes an array of vectors; a list was given"),
        (np.eye(3), "bm25", {}, "the bm25 backend indexes a list of texts; an array was given"),
        ([[1.0, 2.0]], "auto", {}, "BM25 indexes texts; number 0 is of type list"),
        (["a", None, "dog"], "bm25", {}, "number 1 is of type NoneType"),
        ([b"cat dog"], "bm25", {}, "number 0 is of type bytes"),
        ("cats and dogs", "auto", {}, "BM25 indexes a list of texts; one text was given"),
        (TEXTS, "bm25", {"leaves": 3}, "expected one of b, k1"),
        (TEXTS, "bm25", {"k1": -0.1}, "BM25 option k1 is -0.1"),
        (TEXTS, "bm25", {"k1": float("nan")}, "BM25 option k1 is nan"),
        (TEXTS, "auto", {"b": 1.5}, "BM25 option b is 1.5; expected a finite number at least 0"),
        (TEXTS, "lucene", {}, "expected auto, exact, scann or bm25"),
    ],
)
def test_what_a_backend_does_not_take_is_refused(corpus, backend, options, message):
    with pytest.raises(UserError, match=message):
        search.build_index(corpus, backend, **options)


def test_bm25_searches_for_texts_alone():
    index = search.build_index(np.array(TEXTS), k1=np.float32(0.9))
    for queries in ("cat", np.eye(2), [b"cat"]):
        with pytest.raises(UserError, match=r"BM25 searches for (a list of )?texts"):
            index.search(queries, 3)
    np.testing.assert_array_equal(
        index.search(np.array(["cat", "dog"]), 2)[1], index.search(["cat", "dog"], 2)[1]
    )


def test_a_list_that_changes_later_changes_no_index(tmp_path):
    texts = list(TEXTS)
    index = search.build_index(texts)
    texts.append("zebra")
    index.save(tmp_path)
    assert search.load_index(tmp_path).fingerprint == search.text_fingerprint(TEXTS)


def test_a_manifest_of_a_backend_that_is_not_known_is_refused(tmp_path):
    search.build_index(TEXTS).save(tmp_path)
    manifest = json.loads((tmp_path / "index.json").read_text())
    del manifest["sha256"]
    manifest["backend"] = "later"
    manifest["sha256"] = hash_json(manifest)
    (tmp_path / "index.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="no backend 'later' is known here; build the index again"):
        search.load_index(tmp_path)


def test_texts_that_run_together_have_another_fingerprint():
    ways = [["ab", "c"], ["a", "bc"], ["abc"], ["abc", ""], ["c", "ab"]]
    assert len({search.text_fingerprint(texts) for texts in ways}) == len(ways)


class Written:
    """Texts that are there only while they are read; `words` gives the words of one."""

    def __init__(self, count, words):
        self._count, self._words = count, words

    def __len__(self):
        return self._count

    def __iter__(self):
        return (" ".join(self._words(row)) for row in range(self._count))


def zipf(count, words, vocabulary, seed):
    """Texts of so many words, of which the n-th is drawn 1 / n as often as the first."""
    chances = 1 / np.arange(1, vocabulary + 1)
    draw = np.random.default_rng(seed).choice(vocabulary, (count, words), p=chances / chances.sum())
    return [" ".join(f"w{number}" for number in row) for row in draw.tolist()]


def one_by_one(index, queries, k):
    """bm25s's sums of the scores of each query, the best first and ties by row."""
    bm25 = index._bm25
    scored = [bm25.get_scores_from_ids(bm25.get_tokens_ids(query.split())) for query in queries]
    rows = [np.argsort(-scores, kind="stable")[:k] for scores in scored]
    return np.array([s[r] for s, r in zip(scored, rows, strict=True)]), np.array(rows)


@pytest.mark.parametrize("k", [1, 30, 900])
def test_bm25_finds_what_bm25s_own_sums_do_to_the_bit(k, tmp_path):
    texts = zipf(900, 12, 300, 0)
    texts[500:700] = texts[100:300]  # Ties.
    queries = [*zipf(40, 8, 300, 1), "w7 w7 w299", "w1", "unknown", ""]
    index = search.Bm25Index(texts)
    index.save(tmp_path)
    for each in (index, search.load_index(tmp_path)):
        for found, expected in zip(each.search(queries, k), one_by_one(index, queries, k),
                                   strict=True):  # fmt: skip
            np.testing.assert_array_equal(found, expected)


def test_the_matrix_is_bm25ss_own_to_the_bit_whatever_its_parts(monkeypatch):
    texts = [*zipf(300, 12, 300, 0), "", "w1 w1 w1 w299", *zipf(50, 90, 40, 2), "w9"]
    for k1, b, at_once in ((0.9, 0.4, 7), (1.2, 0.75, 1000), (0.0, 1.0, 2**22)):
        monkeypatch.setattr(word_counts, "COUNTS_AT_ONCE", at_once)
        monkeypatch.setattr(search.bm25, "_TEXTS", 64)
        ours = search.Bm25Index(texts, search.Bm25Options(k1=k1, b=b))._bm25
        theirs = bm25s.BM25(method="lucene", k1=k1, b=b)
        numbers = [[ours.vocab_dict[word] for word in text.split()] for text in texts]
        words = {word: number for word, number in ours.vocab_dict.items() if word}
        theirs.index((numbers, words), show_progress=False)
        assert ours.vocab_dict == theirs.vocab_dict
        for name in ("data", "indices", "indptr", "num_docs"):
            np.testing.assert_array_equal(ours.scores[name], theirs.scores[name])


def test_bm25_keeps_neither_texts_nor_words_in_memory(monkeypatch):
    monkeypatch.setattr(search.bm25, "_TEXTS", 256)
    monkeypatch.setattr(word_counts, "COUNTS_AT_ONCE", 4096)
    held = []
    for count in (1_000, 2_000, 4_000, 8_000):
        texts = Written(count, lambda row: [f"w{row % 7}", f"w{row % 11}"] * 100)
        tracemalloc.start()
        index = search.Bm25Index(texts)
        held.append(np.array(tracemalloc.get_traced_memory()))
        tracemalloc.stop()
        assert index.size == count
    # The first one imports bm25s. A text has 200 words, 600 letters at least and two scores.
    for smaller, larger, count in zip(held[1:], held[2:], (2_000, 4_000), strict=False):
        left, peak = (larger - smaller) / count
        assert left < 5
        assert peak < 100, held


def test_a_place_for_the_index_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"none: cannot write BM25's index: No such file"):
        search.Bm25Index(TEXTS, scratch=tmp_path / "none")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(UserError, match=f"{tmp_path}: cannot write BM25's index: No space left"):
        search.Bm25Index(TEXTS, scratch=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_workers_make_the_index_that_one_process_makes(monkeypatch, tmp_path):
    monkeypatch.setattr(bm25, "_SENT", 7)
    draw, told = random.Random(0), []
    words = [f"w{number}" for number in range(60)] + [
        "naïve",
        "検索エンジン",
        "The",
        "state-of-the-art",
    ]
    texts = [" ".join(draw.choices(words, k=draw.randrange(30))) for _ in range(100)]
    Bm25Index(texts).save(tmp_path / "one")
    monkeypatch.setattr(bm25, "_MANY", 50)
    Bm25Index(texts, workers=2, progress=told.append).save(tmp_path / "two")
    assert sum(told) == len(texts)
    assert len(told) == 15
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_texts_are_told_by_what_their_words_are(monkeypatch):
    """An index was opened whose texts another version of bm25s had split."""
    assert words_of([bm25._PROBE]) == [bm25._PROBED]
    before = text_fingerprint(TEXTS)
    monkeypatch.setattr(bm25, "_WORDS", {**bm25._WORDS, "stopwords": ["the"]})
    assert text_fingerprint(TEXTS) != before
