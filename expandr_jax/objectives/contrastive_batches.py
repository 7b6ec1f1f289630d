"""Step A's examples, triples of text as token ids, and the arrays of a batch of them."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from expandr_jax.data.batches import pad
from expandr_jax.data.triples import Triple, queries_of
from expandr_jax.vectors.encoder import Kind, TextEncoder


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
    known: Mapping[str, Collection[str]] | None = None,
    cut: Counter[str] | None = None,
) -> Iterator[ContrastiveExample]:
    """Tokenizes triples, all in one call.

    Args:
        triples: What the examples are made of.
        encoder: Its tokenizer is used.
        expansions: As what they are read.
        known: `known_elsewhere` of all triples, where these are some of them; None: they are all.
        cut: Gets how many "queries", "documents" and "expansions" are longer than is read.
    """
    known = known_elsewhere(triples) if known is None else known
    cut = Counter() if cut is None else cut
    queries = _tokens(encoder, [t.query for t in triples], "query", cut, "queries")
    documents = [x for t in triples for x in t.passages]
    documents = _tokens(encoder, documents, "document", cut, "documents")
    written = [x for t in triples for x in t.expansions]
    written = _tokens(encoder, written, expansions, cut, "expansions")
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


def known_elsewhere(triples: Sequence[Triple]) -> dict[str, set[str]]:
    """All positives of each query that several triples have."""
    hashes = np.fromiter(map(hash, queries_of(triples)), np.int64, len(triples))
    found, counts = np.unique(hashes, return_counts=True)
    known: dict[str, set[str]] = {}
    for number in np.flatnonzero(np.isin(hashes, found[counts > 1])).tolist():
        known.setdefault(triples[number].query, set()).update(triples[number].positives)
    return known


def _tokens(
    encoder: TextEncoder, texts: Sequence[str], kind: Kind, cut: Counter[str], name: str
) -> dict[str, list[int]]:
    """Text -> token ids; equal texts are tokenized once, and counted as often as they are there."""
    unique, lost = Counter(texts), []
    if not unique:
        return {}
    ids = dict(zip(unique, encoder.tokenize([*unique], kind, lost.extend), strict=True))
    cut[name] += sum(times for times, was_cut in zip(unique.values(), lost, strict=True) if was_cut)
    return ids


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
