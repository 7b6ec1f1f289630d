"""Step A's examples, triples of text as token ids, and the arrays of a batch of them."""

import dataclasses
import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import numpy as np

from expandr_jax.data.batches import pad
from expandr_jax.data.triples import Triple, queries_of
from expandr_jax.files.records import hash_json
from expandr_jax.vectors.encoder import Kind, TextEncoder

TRIPLES_AT_ONCE = 1024  # Triples whose texts are tokenized in one call.


@dataclasses.dataclass(frozen=True)
class Passage:
    """A document of a training query.

    Attributes:
        ids: Token ids.
        text: Hash or id of its text, to find equal ones in a batch.
        score: A teacher's, where there is one.
    """

    ids: Sequence[int]
    text: str
    score: float | None = None


@dataclasses.dataclass(frozen=True)
class ContrastiveExample:
    """Token ids of one training query, its expansions (may be none) and its documents.

    Attributes:
        query: Ids of the query.
        expansions: Ids of each sampled passage; an empty generation is left out.
        positive: The relevant document.
        negatives: Documents that were given as irrelevant.
        other_positives: Further relevant documents, of which `draw_passages` may take one instead.
        known: Texts of documents that are relevant as well and must not count as negatives.
        ease: How easy it is, where something says so; `Triple.ease`.
    """

    query: Sequence[int]
    expansions: Sequence[Sequence[int]]
    positive: Passage
    negatives: Sequence[Passage] = ()
    other_positives: Sequence[Passage] = ()
    known: Collection[str] = ()
    ease: float | None = None


def triple_examples(
    triples: Sequence[Triple],
    encoder: TextEncoder,
    expansions: Kind = "document",
    progress: Callable[[int], None] = lambda count: None,
) -> Iterator[ContrastiveExample]:
    """Tokenizes triples, some at a time; a query's positives on other lines are known, too.

    Its expansions are read as `expansions` says. `progress` is told of how many more are done.
    """
    known = _known_elsewhere(triples)
    for start in range(0, len(triples), TRIPLES_AT_ONCE):
        block = triples[start : start + TRIPLES_AT_ONCE]
        yield from _examples(block, known, encoder, expansions)
        progress(len(block))


def _known_elsewhere(triples: Sequence[Triple]) -> dict[str, set[str]]:
    """All positives of each query that several triples have."""
    hashes = np.fromiter(map(hash, queries_of(triples)), np.int64, len(triples))
    found, counts = np.unique(hashes, return_counts=True)
    known: dict[str, set[str]] = {}
    for number in np.flatnonzero(np.isin(hashes, found[counts > 1])).tolist():
        known.setdefault(triples[number].query, set()).update(triples[number].positives)
    return known


def _examples(
    triples: Sequence[Triple],
    known: Mapping[str, Collection[str]],
    encoder: TextEncoder,
    expansions: Kind,
) -> Iterator[ContrastiveExample]:
    queries = _tokens(encoder, (t.query for t in triples), "query")
    documents = _tokens(encoder, (x for t in triples for x in t.passages), "document")
    written = _tokens(encoder, (x for t in triples for x in t.expansions), expansions)
    for triple in triples:
        texts = triple.passages
        scores = triple.teacher_scores or [None] * len(texts)
        passages = [Passage(documents[x], x, score) for x, score in zip(texts, scores, strict=True)]
        count = len(triple.positives)
        yield ContrastiveExample(
            query=queries[triple.query],
            expansions=[written[x] for x in triple.expansions],
            positive=passages[0],
            negatives=passages[count:],
            other_positives=passages[1:count],
            known=known.get(triple.query) or {*triple.positives},
            ease=triple.ease,
        )


def _tokens(encoder: TextEncoder, texts: Iterable[str], kind: Kind) -> dict[str, list[int]]:
    """Text -> token ids; equal texts are tokenized once."""
    unique = list(dict.fromkeys(texts))
    return dict(zip(unique, encoder.tokenize(unique, kind), strict=True)) if unique else {}


class ExampleHashes:
    """What checkpoints know a training's examples by: hashes of those that pass by."""

    def __init__(self):
        self._all, self._older = hashlib.sha256(), hashlib.sha256()
        self._between = b"["

    def passing(self, examples: Iterable[ContrastiveExample]) -> Iterator[ContrastiveExample]:
        """The examples, each when it has been counted in."""
        for example in examples:
            self._add(example)
            yield example

    @property
    def all(self) -> str:
        """sha256 over all that is in them, expansions and scores among it."""
        return self._all.hexdigest()

    @property
    def older(self) -> str:
        """sha256 over their queries and documents' texts, which older runs recorded."""
        digest = self._older.copy()
        digest.update(b"]" if self._between == b"," else b"[]")
        return digest.hexdigest()

    def _add(self, example: ContrastiveExample) -> None:
        negatives = [passage.text for passage in example.negatives]
        row = hash_json([example.positive.text, [*map(int, example.query)], negatives])
        self._older.update(self._between + f'"{row}"'.encode())  # JSON, without all of it at once.
        self._between = b","
        passages = (example.positive, *example.negatives, *example.other_positives)
        counts = [len(x) for x in (example.expansions, example.negatives, example.other_positives)]
        texts = [[passage.text, passage.score] for passage in passages]
        self._all.update(hash_json([counts, texts, sorted(example.known)]).encode())
        for ids in (example.query, *example.expansions, *(passage.ids for passage in passages)):
            self._all.update(np.array([len(ids), *ids], np.int32).tobytes())


def make_batch(
    examples: Sequence[ContrastiveExample],
    pad_id: int,
    samples: int,
    negatives: int = 0,
    longest: int | None = None,
    *,
    lengths: Mapping[str, int] | None = None,
    relevant: int | None = None,
) -> dict[str, np.ndarray]:
    """Arrays of one batch, or of some rows of one.

    Args:
        examples: The first `samples` expansions and `negatives` negatives of each are used.
        pad_id: Fills up rows.
        samples: Expansions a query; 0 for plain queries.
        negatives: Negatives a query. A query with fewer has its positive in their place, which is
            left out of every softmax.
        longest: No text has more tokens; rows are not padded beyond it.
        lengths: What rows of each kind of text are padded to; None: as `data.batches.pad` has it.
        relevant: Columns of "relevant"; None: as many as these examples need.

    Returns:
        "query_ids", "query_mask" [batch, length]; "positive_ids", "positive_mask";
        "positive_texts" [batch, 2], a hash of each text, by which equal ones are known; "relevant"
        [batch, relevant, 2], the hashes of all that is relevant to a query, filled up with its
        positive's. With samples also "expansion_ids", "expansion_mask" [batch * samples, length]
        and "present" [batch, samples]; with negatives "negative_ids", "negative_mask", [batch *
        negatives, length], a query's own side by side, "negative_texts" [batch * negatives, 2] and
        "given", "teacher_scores" [batch, 1 + negatives], the positive first.
    """
    batch: dict[str, np.ndarray] = {}
    for kind, texts in texts_by_kind(examples, samples, negatives).items():
        ids = [text for row in texts for text in row]
        batch[f"{kind}_ids"], batch[f"{kind}_mask"] = pad(
            ids, pad_id, lengths and lengths[kind], longest
        )
    own = text_hashes([example.positive.text for example in examples])
    batch["positive_texts"] = own
    others = [known_texts(example) for example in examples]
    relevant = relevant or max(map(len, others))
    batch["relevant"] = np.repeat(own[:, None], relevant, axis=1)
    for row, texts in enumerate(others):
        batch["relevant"][row, : len(texts)] = text_hashes(texts)
    if negatives:
        given = [e.negatives[:negatives] for e in examples]
        passages = [[e.positive, *row] for e, row in zip(examples, given, strict=True)]
        missing = [[None] * (1 + negatives - len(row)) for row in passages]
        rows = [row + none for row, none in zip(passages, missing, strict=True)]
        batch["given"] = np.array([[p is not None for p in row] for row in rows])
        batch["teacher_scores"] = np.array(
            [[(p and p.score) or 0.0 for p in row] for row in rows], np.float32
        )
        batch["negative_texts"] = text_hashes(
            [p.text if p else "" for row in rows for p in row[1:]]
        )
    if samples:
        batch["present"] = np.array(
            [[i < len(e.expansions) for i in range(samples)] for e in examples]
        )
    return batch


def text_hashes(texts: Sequence[str | bytes]) -> np.ndarray:
    """[texts, 2] int32, the same for equal texts alone, in all processes: 64 bits of a hash.

    What is bytes is such a hash already.
    """
    return np.frombuffer(b"".join(map(_text_hash, texts)), np.int32).reshape(-1, 2)


def _text_hash(text: str | bytes) -> bytes:
    if isinstance(text, bytes):
        return text
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()


def known_texts(example: ContrastiveExample) -> list[str]:
    """Texts of an example that must not count as negatives of its query, its own first."""
    positives = (passage.text for passage in (example.positive, *example.other_positives))
    return list(dict.fromkeys((*positives, *sorted(example.known))))


def texts_by_kind(
    examples: Sequence[ContrastiveExample], samples: int, negatives: int
) -> dict[str, list[list[Sequence[int]]]]:
    """Token ids of each kind of text, a list for each example."""
    texts = {
        "query": [[e.query] for e in examples],
        "positive": [[e.positive.ids] for e in examples],
    }
    if negatives:
        rows = ([p.ids for p in e.negatives[:negatives]] for e in examples)
        texts["negative"] = [
            row + [e.positive.ids] * (negatives - len(row))
            for e, row in zip(examples, rows, strict=True)
        ]
    if samples:
        rows = ([*e.expansions[:samples]] for e in examples)
        texts["expansion"] = [
            row + [e.query] * (samples - len(row)) for e, row in zip(examples, rows, strict=True)
        ]
    return texts
