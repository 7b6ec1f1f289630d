"""Step A's examples as arrays: each process makes a share of them, and has all."""

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from expandr_jax.data.triples import Triple
from expandr_jax.files.records import hash_json
from expandr_jax.objectives.contrastive_batches import (
    ContrastiveExample,
    known_elsewhere,
    known_texts,
    text_hashes,
    triple_examples,
)
from expandr_jax.runtime.processes import Processes
from expandr_jax.runtime.shares import shares_in_turn
from expandr_jax.vectors.encoder import Kind, TextEncoder

TRIPLES_AT_ONCE = 1024  # Which are tokenized together, by all processes.
CUT_KINDS = "queries", "documents", "expansions"  # What step A counts that is cut.

Block = Mapping[str, np.ndarray]  # As of `pack_examples`.


def pack_examples(examples: Sequence[ContrastiveExample]) -> Block:
    """Examples as arrays, one example behind the other.

    Returns:
        "counts" [examples, 4] int32: expansions, negatives, other positives, known texts of each.
        "lengths" [texts] int32 and "tokens" int32, the lengths' sum: of each example its query, its
        expansions, its positive, its negatives and its other positives. "hashes" [passages and
        known texts, 2] int32, of the passages in that order, then of `known_texts`; "scores"
        [passages] float64 and "eases" [examples] float64, NaN where there is none. "all", "older"
        [examples] of 64 bytes: what `ExampleHashes` counts in.
    """
    counts, texts, hashed, scores, all_, older = [], [], [], [], [], []
    for example in examples:
        passages = [example.positive, *example.negatives, *example.other_positives]
        named, known = [passage.text for passage in passages], known_texts(example)
        parts = example.expansions, example.negatives, example.other_positives, known
        counts.append([*map(len, parts)])
        texts += [example.query, *example.expansions, *(passage.ids for passage in passages)]
        hashed += [*named, *known]
        scores += [np.nan if passage.score is None else passage.score for passage in passages]
        given = [[passage.text, passage.score] for passage in passages]
        all_.append(hash_json([counts[-1][:3], given, sorted(example.known)]))
        query, negatives = [*map(int, example.query)], named[1 : 1 + len(example.negatives)]
        older.append(hash_json([named[0], query, negatives]))
    return {
        "counts": np.array(counts, np.int32),
        "lengths": np.fromiter(map(len, texts), np.int32, len(texts)),
        "tokens": np.concatenate([np.asarray(ids, np.int32) for ids in texts]),
        "hashes": text_hashes(hashed),
        "scores": np.array(scores, np.float64),
        "eases": np.array([np.nan if e.ease is None else e.ease for e in examples], np.float64),
        "all": np.array(all_, "S64"),
        "older": np.array(older, "S64"),
    }


def triple_blocks(
    triples: Sequence[Triple],
    encoder: TextEncoder,
    expansions: Kind = "document",
    progress: Callable[[int], None] = lambda count: None,
    processes: Processes | None = None,
    cut: Counter[str] | None = None,
) -> Iterator[Block]:
    """The examples of triples in their order, of which each process tokenizes a share.

    All processes go through it together, and each gets all of them. A query's positives in other
    triples are known, too.

    Args:
        triples: The same ones in every process, which makes those of its share alone.
        encoder: Its tokenizer is used.
        expansions: As what they are read.
        progress: Told of how many more are done, by all processes.
        processes: Those of the run; None: this one is alone.
        cut: As of `triple_examples`, of all processes.
    """
    processes, known = processes or Processes(), known_elsewhere(triples)
    for _, own, count in shares_in_turn(triples, TRIPLES_AT_ONCE, processes):
        lost: Counter[str] = Counter()
        made = triple_examples(own, encoder, expansions, known, lost)
        made = (
            pack_examples([*made]) | {"cut": np.array([lost[n] for n in CUT_KINDS])} if own else {}
        )
        for block in filter(None, processes.exchange(made)):
            if cut is not None:
                cut.update(dict(zip(CUT_KINDS, block["cut"].tolist(), strict=True)))
            yield block
        progress(count)


def triples_key(
    triples: Sequence[Triple],
    expansions: Kind = "document",
    progress: Callable[[int], None] = lambda count: None,
    processes: Processes | None = None,
) -> str:
    """sha256 over all that `triple_blocks` makes examples of, which no text is tokenized for.

    All processes call it together, of which each reads a share of the triples.
    """
    processes, digest = processes or Processes(), hashlib.sha256(expansions.encode())
    for _, own, count in shares_in_turn(triples, TRIPLES_AT_ONCE, processes):
        rows = [
            hash_json([t.query, t.positives, t.negatives, t.expansions, t.teacher_scores, t.ease])
            for t in own
        ]
        made = {"rows": np.array(rows, "S64")} if own else {}
        for block in filter(None, processes.exchange(made)):
            digest.update(block["rows"].tobytes())
        progress(count)
    return digest.hexdigest()


class ExampleHashes:
    """What checkpoints know a training's examples by: hashes of those that pass by."""

    def __init__(self):
        self._all, self._older = hashlib.sha256(), hashlib.sha256()
        self._between = b"["

    def passing(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """The blocks, each when its examples have been counted in."""
        for block in blocks:
            self._add(block)
            yield block

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

    def _add(self, block: Block) -> None:
        for row in block["older"].tolist():
            # JSON, without all of it at once.
            self._older.update(self._between + b'"' + row + b'"')
            self._between = b","
        lengths = block["lengths"]
        texts = iter(np.split(block["tokens"], np.cumsum(lengths)[:-1]))
        for row, count in zip(block["all"].tolist(), text_counts(block).tolist(), strict=True):
            self._all.update(row)
            for ids in itertools.islice(texts, count):
                self._all.update(np.int32(len(ids)).tobytes())
                self._all.update(ids)


def text_counts(block: Block) -> np.ndarray:
    """How many texts each example of a block has, [examples]."""
    return 2 + block["counts"][:, :3].sum(axis=1)
