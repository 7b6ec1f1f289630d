"""BM25 over texts: bm25s splits them and has the files; what grows with them is our own.

Its matrix is made in search/word_counts.py, which says why. Adding up scores by bm25s's NumPy holds
Python's lock. Its loop in numba leaves the order of ties open, and numba would be one more compiled
dependency, for which newer Pythons and NumPys wait. search/postings.py adds the same numbers in the
same order, in a thread a core.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import pathlib
import re
import types
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np

from expandr_jax.errors import UserError
from expandr_jax.files.records import write_json
from expandr_jax.runtime.workers import mapped
from expandr_jax.search.index import Index
from expandr_jax.search.postings import Postings
from expandr_jax.search.word_counts import BlockCounts, WordCounts, count_block, join_blocks
from expandr_jax.settings import NotNegative, Share, read_section

_LENGTHS = "lengths.json"
# As bm25s names them, and ours.
_FILES = (
    "data.csc.index.npy", "indices.csc.index.npy", "indptr.csc.index.npy", "params.index.json",
    "vocab.index.json", _LENGTHS,
)  # fmt: skip
_WORDS = {"stopwords": "english", "stemmer": None, "show_progress": False}
# A text with all stop words, and other words that bm25s may come to split otherwise; its words.
_PROBE = (
    "A an and are as at be but by for if in into is it no not of on or such that the their then "
    "there these they this to was will with x1 State-of-the-art isn't in_one 3.14 naïve Straße"
)
_PROBED = ["x1", "state", "art", "isn", "in_one", "14", "naïve", "straße"]
_POSTINGS = "data", "indices", "indptr"  # Each word's weights and documents; where they end.
_TEXTS = 4096  # Texts whose words are in memory as strings at once.
_SENT = 4 * _TEXTS  # Texts that a worker is given at once.
_MANY = 200_000  # Texts from which on workers take less time than they need to begin.
# Scripts that set no space between words: Thai to Lao, Myanmar, Khmer, kana, Han, and Han beyond
# the first plane; Hangul has spaces, but between groups of words.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u3005-\u3007\u3040-\u309f\u30a1-\u30fa\u30fc-\u30ff\u3130-\u318f"
    "\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\uff66-\uff9f"
    "\U00020000-\U0003ffff]+"
)
_WIDE = re.compile("[\uff01-\uffdc]+")  # Latin letters as wide as Han, and narrow kana.


@dataclasses.dataclass(frozen=True)
class Bm25Options:
    """BM25's k1 and b as in Lucene; the defaults are those usual on BEIR (Anserini).

    Attributes:
        k1: how slowly further occurrences of a word count less, 0 or more.
        b: how much a document's length counts, 0 to 1.
    """

    k1: NotNegative = 0.9
    b: Share = 0.4


class Bm25Index(Index):
    """Lucene's BM25: an index of texts, searched for texts.

    Text is lower-cased and split into words of two or more word characters; Lucene's 33 English
    stop words are dropped; nothing is stemmed (Anserini stems, so its scores differ a little).
    Where a script sets no spaces between words, as in Chinese, Japanese and Thai, and in Korean,
    the words are all pairs of neighbouring characters, as in Lucene's CJK analyzer; vowel signs
    and accents belong to their words, as Hindi's do.

    A word that stands twice in a query counts twice. Documents that share no word with it score 0
    and come last.

    Attributes:
        mean_length: Words of a text on the average, those that count.
    """

    backend, options_type, file_names = "bm25", Bm25Options, _FILES
    mean_length: float

    def __init__(
        self,
        texts: Collection[str],
        options: Bm25Options = Bm25Options(),
        *,
        scratch: str | os.PathLike | None = None,
        workers: int = 1,
        progress: Callable[[int], None] = lambda count: None,
    ):
        """Indexes `texts`, one a document, in order; none of them is kept.

        Args:
            texts: The documents.
            options: BM25's.
            scratch: The directory where the index lies, in files without a name; None: where the
                system has its temporary files.
            workers: How many processes split texts, where there are many; see `workers.mapped`,
                whose processes import the program's main module.
            progress: Told how many texts more have been read.

        Raises:
            UserError: there is no text, or no word in any of them, or an option is out of range.
        """
        # NumPy's numbers would not go into the manifest.
        plain = {n: v.item() if isinstance(v, np.generic) else v for n, v in vars(options).items()}
        self.options = read_section(Bm25Options, plain, "BM25 option ")
        counts, vocabulary = WordCounts(scratch), dict[str, int]()
        workers = workers if len(texts) >= _MANY else 1
        # Fewer and larger ones have fewer words to be numbered here, where there are workers.
        blocks = (block for _, block in _blocks(texts, size=_TEXTS if workers == 1 else _SENT))
        for words, block in mapped(_counted, blocks, workers):
            numbers = [vocabulary.setdefault(word, len(vocabulary)) for word in words]
            counts.add(block, np.array(numbers, np.int32))
            progress(len(block.lengths))
        if not vocabulary:
            raise UserError(f"BM25: no word to index in {len(texts)} texts")
        self.size = len(texts)
        self.mean_length = sum(int(n.sum()) for n in counts.lengths) / self.size
        self.fingerprint = text_fingerprint(texts)
        self._bm25 = _bm25s().BM25(method="lucene", **vars(self.options))
        names = (*_POSTINGS, "num_docs")
        matrix = dict(zip(names, (*counts.matrix(**vars(self.options)), self.size), strict=True))
        # As bm25s lets its matrix be built otherwise; what its tokenizer returns has ids and words.
        self._bm25.build_index_from_ids = lambda **_: matrix
        self._bm25.nonoccurrence_array = None  # Lucene's method has none.
        self._bm25.index(types.SimpleNamespace(ids=(), vocab=vocabulary), show_progress=False)
        self.dimension = len(vocabulary) - ("" in vocabulary)  # bm25s adds "", which no text has.

    def frequency(self, word: str) -> int:
        """How many of the documents have a word; words are as `words_of` splits texts."""
        number = self._bm25.vocab_dict.get(word)
        if number is None:
            return 0
        ends = self._bm25.scores["indptr"]
        return int(ends[number + 1] - ends[number])

    def score_texts(self, queries: Sequence[str], texts: Sequence[str]) -> np.ndarray:
        """[queries, texts] float64 of texts that need not be indexed, as if each were.

        How rare words are and how long a text is on the average is as in the index; what none of
        its documents has counts for nothing but the length.
        """
        k1, b = self.options.k1, self.options.b
        weights: dict[str, float] = {}
        for word in {word for words in words_of(queries) for word in words}:
            if having := self.frequency(word):
                weights[word] = math.log(1 + (self.size - having + 0.5) / (having + 0.5))
        columns = {word: column for column, word in enumerate(weights)}
        asked = np.zeros((len(queries), len(columns)))
        of_texts = np.zeros((len(texts), len(columns)))
        for row, words in enumerate(words_of(queries)):
            for word in words:
                if word in columns:
                    asked[row, columns[word]] += weights[word]
        for row, words in enumerate(words_of(texts)):
            for word in words:
                if word in columns:
                    of_texts[row, columns[word]] += 1
            count = of_texts[row]
            length = k1 * (1 - b + b * len(words) / self.mean_length)
            of_texts[row] = np.divide(count, count + length, where=count > 0, out=count)
        return asked @ of_texts.T

    def search_weighted(
        self, queries: Sequence[Mapping[str, float]], k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """What `search` returns, for queries whose words have weights.

        A document's score is the sum of what each word adds to it, times the word's weight. Words
        are as `words_of` splits texts, and those that no document has find nothing; where weights
        are how often a text has its words, the text itself finds the same.

        Raises:
            UserError: A weight is below 0 or not finite, or k below 1.
        """
        block = [self._numbered(weights) for weights in queries]
        return self._postings.search([(0, block)], len(queries), self._depth(k))

    def _numbered(self, weights: Mapping[str, float]) -> tuple[list[int], np.ndarray]:
        """The numbers of a query's words that are known, and their weights."""
        for word, weight in weights.items():
            if not 0 <= weight < math.inf:
                raise UserError(f"BM25: {word!r} has weight {weight}; expected a number, 0 or more")
        known = {n: w for word, w in weights.items()
                 if (n := self._bm25.vocab_dict.get(word)) is not None}  # fmt: skip
        return list(known), np.array([*known.values()], np.float32)

    def _search(self, queries: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        blocks = (
            (first, ((ids, np.ones(len(ids), np.float32))
                     for ids in map(self._bm25.get_tokens_ids, _split(texts))))
            for first, texts in _blocks(queries, "BM25 searches for")
        )  # fmt: skip
        return self._postings.search(blocks, len(queries), k)

    @property
    def _postings(self) -> Postings:
        return Postings(self.size, *(self._bm25.scores[name] for name in _POSTINGS))

    def _write(self, directory: pathlib.Path) -> None:
        self._bm25.save(directory, show_progress=False)  # Not the texts.
        write_json(directory / _LENGTHS, {"mean": self.mean_length})

    def _open(self, directory: str | os.PathLike) -> None:
        path = pathlib.Path(directory, _LENGTHS)
        if not path.exists():  # The manifest knows none: an older version wrote it.
            raise UserError(f"{path}: missing, an older version wrote the index; build it again")
        self.mean_length = json.loads(path.read_text())["mean"]
        self._bm25 = _bm25s().BM25.load(directory, mmap=True, show_progress=False)


def text_fingerprint(texts: Collection[str]) -> str:
    """Returns the sha256 of texts in their order, each with its length."""
    digest = hashlib.sha256()
    if (probed := words_of([_PROBE])) != [_PROBED]:  # Another version of bm25s has other words.
        digest.update(json.dumps(probed).encode())

    def odd() -> Iterator[str]:
        return (text for text in texts if not text.isascii() and _patterns()[0].search(text))

    # Indexes of older versions had other words of these texts.
    if any(_UNSPACED.search(text) for text in odd()):
        digest.update(b"pairs of characters\n")
    if any(_words(text) != _UNSPACED.sub(_pairs, text) for text in odd()):
        digest.update(b"words of all scripts\n")
    for text in texts:
        data = text.encode(errors="surrogatepass")
        digest.update(f"{len(data)}\n".encode() + data)
    return digest.hexdigest()


def _blocks(
    texts: Collection[str], verb: str = "BM25 indexes", size: int = _TEXTS
) -> Iterator[tuple[int, tuple[str, ...]]]:
    """The number of the first text and the texts of each block, checked."""
    if isinstance(texts, str):
        raise UserError(f"{verb} a list of texts; one text was given: make it a list of one")
    rest = iter(texts)
    for first in itertools.count(step=size):
        block = tuple(itertools.islice(rest, size))
        for row, text in enumerate(block, first):
            if not isinstance(text, str):
                raise UserError(f"{verb} texts; number {row} is of type {type(text).__name__}")
        if not block:
            return
        yield first, block


def words_of(texts: Collection[str]) -> list[list[str]]:
    """The words of each text as an index of BM25 has them, in their order."""
    return [words for _, block in _blocks(texts, "BM25 splits") for words in _split(block)]


def _split(texts: Sequence[str]) -> list[list[str]]:
    return _bm25s().tokenize(_spaced(texts), return_ids=False, **_WORDS)


def _counted(texts: Sequence[str]) -> tuple[list[str], BlockCounts]:
    """The words of texts, in the order in which they come, and how often each text has them."""
    vocabulary, parts = dict[str, int](), []
    for _, block in _blocks(texts):
        tokens = _bm25s().tokenize(_spaced(block), return_ids=True, **_WORDS)
        numbers = [vocabulary.setdefault(word, len(vocabulary)) for word in tokens.vocab]
        words = np.fromiter(itertools.chain.from_iterable(tokens.ids), np.int32)
        lengths = np.array([len(ids) for ids in tokens.ids])
        parts.append(count_block(np.array(numbers, np.int32)[words], lengths))
    return [*vocabulary], join_blocks(parts)


def _bm25s() -> types.ModuleType:
    """The library, imported late: it uses jax at import, whose devices can then not be chosen."""
    import bm25s

    # It sets itself to report every index that it builds.
    logging.getLogger("bm25s").setLevel(logging.WARNING)
    return bm25s


def _spaced(texts: Sequence[str]) -> list[str]:
    """The texts, with spaces around the words that bm25s would not find."""
    return [t if t.isascii() or not _patterns()[0].search(t) else _words(t) for t in texts]


@functools.cache
def _patterns() -> tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str]]:
    """Finds what `_words` changes, which most texts are spared; characters not seen; and marks.

    All characters beyond the first plane are of the first: `re` looks for single ones one by one.
    """
    signs = dict.fromkeys("CM", "")
    for character in map(chr, range(0x80, 0x10000)):
        kind = unicodedata.category(character)
        if kind == "Cf" or kind[0] == "M":
            signs[kind[0]] += character
    odd = f"\u0130\uff01-\uffdc\U00010000-\U0010ffff{signs['C']}{signs['M']}]"
    unseen = f"[\ufe00-\ufe0f\U000e0100-\U000e01ef{signs['C']}]"  # Or choose a character's form.
    return (
        re.compile(_UNSPACED.pattern.removesuffix("]+") + odd),
        re.compile(unseen),
        re.compile(f"[{signs['M']}]+"),
    )


def _words(text: str) -> str:
    """A text whose words are all runs of what Python takes for word characters.

    Letters and accents become one character, wide forms usual ones, and the Turkish capital i a
    small one; Lucene does the last two, in its CJK analyzer and in lower-casing. Marks become
    numbers behind a letter, and are left out elsewhere, as is what is not seen; but a space
    without width is a space.
    """
    _, unseen, marks = _patterns()
    text = unicodedata.normalize("NFC", text).replace("\u0130", "i").replace("\u200b", " ")
    text = _WIDE.sub(lambda run: unicodedata.normalize("NFKC", run.group()), text)
    return marks.sub(_numbers, _UNSPACED.sub(_pairs, unseen.sub("", text)))


def _numbers(run: re.Match[str]) -> str:
    before = run.string[max(run.start() - 1, 0) : run.start()]
    return "".join(map(_number, run.group())) if before.isalnum() or before == "_" else ""


def _pairs(run: re.Match[str]) -> str:
    """The pairs of neighbouring characters of a run, with spaces around them.

    A character that stands alone is doubled: it is a word, and words have two characters or more.
    """
    text = run.group() if len(run.group()) > 1 else 2 * run.group()
    pairs = [text[i : i + 2] for i in range(len(text) - 1)]
    # Vowel signs, as Thai's, are no word characters: their numbers are.
    words = [pair if pair.isalnum() else "".join(map(_number, pair)) for pair in pairs]
    return f" {' '.join(words)} "


def _number(character: str) -> str:
    return f"u{ord(character):x}"
