"""A corpus as a retriever encodes it, with its index, and other texts; processes share the work."""

import contextlib
import dataclasses
import functools
import pathlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from expandr_jax.data.documents import ids_of, texts_of
from expandr_jax.errors import NotFiniteError
from expandr_jax.files.arrays import read_arrays, write_arrays
from expandr_jax.files.records import hash_json
from expandr_jax.runtime.processes import Processes
from expandr_jax.runtime.progress import Reporter
from expandr_jax.search import ExactIndex, Index, ScannIndex, kept_index, scann
from expandr_jax.search.divided import (
    SHARD_ROWS,
    DividedIndex,
    Span,
    found_by_all,
    share_of_blocks,
    share_of_shards,
)
from expandr_jax.search.settings import SearchSettings
from expandr_jax.vectors.blocks import fetch_rows, is_within_reach, open_rows, width_of
from expandr_jax.vectors.encoder import Kind, Progress, TextEncoder
from expandr_jax.vectors.file import content_key, encode_to_file
from expandr_jax.vectors.query import NORMALIZE, Normalize
from expandr_jax.vectors.stored import StoredVectors, open_vectors
from expandr_jax.vectors.together import Known, encode_together, progress_of_all, share_starts

# What texts of a kind are called that are no documents of the corpus.
_READ_AS: dict[Kind, str] = {"query": "queries", "document": "documents"}


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The corpus as the current retriever sees it.

    Attributes:
        ids: Document ids, in the order of the index.
        vectors: [documents, dim], float32 when indexed or stored in less; process 0 has them.
        search: The config's section `search`.
        path: The vectors' file, beside which an index worth it is kept; None: none is. It may be
            elsewhere, and here those of its rows that this process searches; see `blocks`.
        writes: Whether an index that is made is kept, or only one that is there opened.
        processes: Those that search together, each of which has this corpus.
        shares: Where they hand each other what they find.
        normalize: Where an expanded query's vector is brought to unit length that it is searched
            for; see `expanded_query`.
    """

    ids: Sequence[str]
    vectors: np.ndarray | StoredVectors | None
    search: SearchSettings
    path: pathlib.Path | None = None
    normalize: Normalize = NORMALIZE
    writes: bool = True
    processes: Processes = dataclasses.field(default_factory=Processes)
    shares: pathlib.Path | None = None

    @property
    def is_exact(self) -> bool:
        """Whether search is exact, and not approximate."""
        backend = self.search.backend
        return backend == "exact" or (backend == "auto" and not scann.installed())

    @property
    def size(self) -> int:
        """Number of documents."""
        return len(self.ids if self.vectors is None else self.vectors)

    @property
    def is_divided(self) -> bool:
        """Whether there is an index of each part, which processes share."""
        return self.processes.count > 1 if self.is_exact else self.size > SHARD_ROWS

    @functools.cached_property
    def index(self) -> Index | DividedIndex:
        """Search over the vectors, which process 0 asks; opened or made by the first search."""
        size, own, options = self.size, self.processes, self.search.exact
        if not self.is_divided:
            return self._made(0, size)
        if self.is_exact:
            block = min(options.block_rows, size)
            spans = share_of_blocks(size, block, own.index, own.count)
        else:
            spans = share_of_shards(size, own.index, own.count)
        width = self.vectors.shape[1] if self.path is None else width_of(self.path)
        kind = "exact" if self.is_exact else "scann"
        where = self.path.relative_to(self.shares.parent).as_posix() if self.shares else ""
        return DividedIndex(
            f"{kind} {where}", size, width, spans, self._made, options.query_rows, own, self.shares
        )

    def release(self) -> None:
        """Lets go of the index, if there is one; it is opened again when it is asked for."""
        if self.approximate and "exact" in self.__dict__:
            self.exact.release()
        index = self.__dict__.get("index")
        if isinstance(index, DividedIndex):
            index.release()  # The other processes still answer by it.
        else:
            self.__dict__.pop("index", None)

    def _vectors(self, start: int, end: int) -> np.ndarray | StoredVectors:
        if self.path is None:
            return self.vectors[start:end]
        return open_rows(self.path, start, end)

    def _made(self, start: int, end: int) -> Index:
        """The index of some of the vectors."""
        vectors = self._vectors(start, end)
        if self.is_exact:
            block = min(self.search.exact.block_rows, self.size)
            return ExactIndex(vectors, self.search.exact, block_rows=block)
        build = functools.partial(ScannIndex, vectors, self.search.scann)
        if self.path is None:
            return build()
        key = hash_json([content_key(self.path), "scann", vars(self.search.scann)])[:16]
        stem = (
            f"{self.path.stem}.shard-{start // SHARD_ROWS}" if self.is_divided else self.path.stem
        )
        if not self.path.exists():  # As the vectors, it stays on this machine.
            stem = f".{stem}"
        directory = self.path.with_name(f"{stem}.index-{key}")
        return kept_index(directory, build, write=self.writes)

    @property
    def approximate(self) -> bool:
        """Whether `index` may miss some of the best documents."""
        return not self.is_exact and not scann.finds_all(self.search.scann, self.size)

    @property
    def misses_some(self) -> bool:
        """Whether results are searched by such an index, as `search.evaluation` may ask."""
        return self.approximate and self.search.evaluation == "index"

    @functools.cached_property
    def exact(self) -> "Corpus":
        """This corpus with exact search, which scores every document."""
        search = dataclasses.replace(self.search, backend="exact")
        return dataclasses.replace(self, search=search) if self.approximate else self

    @property
    def evaluated(self) -> Index | DividedIndex:
        """The index that evaluation searches."""
        return (self if self.misses_some else self.exact).index

    def recall(self, queries: np.ndarray, k: int) -> float:
        """The share of the k best documents of queries, [queries, dim], that `evaluated` finds."""
        (_, best), (_, found) = (i.search(queries, k) for i in (self.exact.index, self.evaluated))
        return float(np.mean([np.isin(*rows).mean() for rows in zip(best, found, strict=True)]))


@dataclasses.dataclass(frozen=True)
class CorpusRetriever:
    """A retriever and a corpus; all processes of a run encode together, each a share of the texts.

    Attributes:
        encoder: Encodes a share.
        params: The retriever's parameters.
        texts: The corpus, document id -> text.
        path: The file of its vectors; see `encode_to_file`.
        dtype: Their type there.
        search: The config's section `search`.
        processes: Those that encode.
        reporter: Shows progress.
        shares: Where processes hand each other vectors that are in no file.
        normalize: As `Corpus` has it.
        timed: What the corpus is encoded within.
        documents: The retriever whose corpus is searched, where this one encodes queries alone.
    """

    encoder: TextEncoder
    params: Any
    texts: Mapping[str, str]
    path: pathlib.Path
    dtype: str
    search: SearchSettings
    processes: Processes
    reporter: Reporter
    shares: pathlib.Path
    normalize: Normalize
    timed: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    documents: "CorpusRetriever | None" = None
    _encoded: Counter[tuple[Kind, bool]] = dataclasses.field(
        default_factory=Counter, init=False, repr=False, compare=False
    )  # Texts that `encode` was given, by whether they were cut.

    @functools.cached_property
    def corpus(self) -> Corpus:
        """The corpus as it is encoded; all processes ask for it together, and wait the first time.

        Raises:
            NotFiniteError: A vector is not finite, naming its document.
        """
        if self.documents is not None:
            return self.documents.corpus
        main, task = self.processes.is_main, f"{self.path.stem}: documents encoded"
        with self.timed():
            with self.reporter.progress(task, len(self.texts)) as shown:
                cut = self._encode_corpus(shown)
            if cut:
                length = self.encoder.retriever.max_length
                self.reporter.say(
                    f"{cut} of {len(self.texts)} documents ({100 * cut / len(self.texts):.1f} %) "
                    f"are longer than retriever.max_length, {length} tokens, and lost the rest"
                )
            vectors = open_vectors(self.path) if main else None
            corpus = Corpus(
                ids_of(self.texts), vectors, self.search, self.path, normalize=self.normalize
            )
            # They must agree on how they search.
            able = [is_within_reach(self.path), corpus.is_exact]
            if self.processes.count > 1 and self.processes.gather(able) == (
                [[True, corpus.is_exact]] * self.processes.count
            ):
                corpus = dataclasses.replace(corpus, processes=self.processes, shares=self.shares)
                searched = [corpus, corpus.exact] if corpus.approximate else [corpus]
                # Opened now: this process answers searches by them.
                divided = [each.index for each in searched if each.is_divided]
                self._fetch([span for index in divided for span in index.spans])
        return corpus

    def _fetch(self, spans: Sequence[Span]) -> None:
        """Brings the vectors here that this process searches, where the file is elsewhere."""
        if self.path.exists():
            return
        rows = sum(end - start for start, end in spans)
        with self.reporter.progress(f"{self.path.stem}: vectors fetched", rows) as shown:
            fetch_rows(self.path, spans, self.dtype, self.processes.files.read, shown)

    def release(self) -> None:
        """Lets go of the index that searches made: another retriever's is next, or training.

        Says how many of the texts that were encoded since the last time were cut.
        """
        for kind, name in _READ_AS.items():
            if cut := self._encoded[kind, True]:
                of = cut + self._encoded[kind, False]
                retriever = self.encoder.retriever
                shorter = retriever.query_length if kind == "query" else 0
                length = shorter or retriever.max_length
                self.reporter.say(
                    f"{self.path.stem}: {cut} of {of} texts that are read as {name} "
                    f"({100 * cut / of:.1f} %) are longer than {length} tokens, and lost the rest"
                )
        self._encoded.clear()
        if "corpus" in self.__dict__:
            self.corpus.release()

    def encode(
        self,
        texts: Sequence[str],
        kind: Kind,
        ids: Sequence[str] = (),
        progress: Progress | None = None,
        *,
        main_alone: bool = False,
    ) -> np.ndarray:
        """`TextEncoder.encode` of texts that all processes have: [len(texts), dim] in each of them.

        With `main_alone` process 0 alone reads what the others have encoded, which get [0, dim].

        Raises:
            NotFiniteError: A vector is not finite, naming its text by its id, if it has one.
        """
        processes = self.processes
        starts = share_starts(len(texts), processes.count)
        share = slice(starts[processes.index], starts[processes.index + 1])
        own = texts[share]
        tell = progress and progress_of_all(progress, share, len(texts))
        with _naming(ids[share]):
            cut: list[bool] = []
            vectors = self.encoder.encode(self.params, own, kind, tell, cut.extend)
        if processes.count == 1:
            self._count(kind, len(texts), sum(cut))
            return vectors
        paths = [self.shares / f"vectors.process-{i}.npz" for i in range(processes.count)]
        own_path = paths[processes.index]
        self.shares.mkdir(parents=True, exist_ok=True)
        write_arrays(own_path, vectors=vectors)
        processes.barrier()
        read = paths if processes.is_main or not main_alone else []
        parts = [read_arrays(path)["vectors"] for path in read]
        # Nobody writes the next ones before all have read these.
        self._count(kind, len(texts), sum(processes.gather(sum(cut))))
        with contextlib.suppress(OSError):
            own_path.unlink()
        return np.concatenate([part for part in parts if len(part)] or [vectors[:0]])

    def _count(self, kind: Kind, texts: int, cut: int) -> None:
        self._encoded[kind, True] += cut
        self._encoded[kind, False] += texts - cut

    @property
    def separator(self) -> str:
        """What the retriever reads between two texts."""
        return getattr(self.encoder.retriever.tokenizer, "sep_token", None) or ""

    def find(self, queries: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and rows of the corpus, [queries, k] each, in each process."""
        vectors, corpus = self.encode(queries, "query"), self.corpus
        return found_by_all(lambda: corpus.index.search(vectors, k), self.processes, self.shares)

    def _encode_corpus(self, progress: Progress) -> int:
        """Makes a file of vectors, where there are several processes of what each has encoded.

        Returns how many documents were cut; those of a file that several made are told once.
        """
        ids, values = ids_of(self.texts), texts_of(self.texts)

        def encode(to: pathlib.Path, share: slice, known: Known | None) -> None:
            tell = progress_of_all(progress, share, len(values))

            def advance(count: int) -> None:
                tell(count)
                self.processes.files.push(later=True)

            dtype = self.dtype if to == self.path else "float32"
            made = {"vectors": known} if known else {"progress": advance}
            with _naming(ids[share], "document "):
                encode_to_file(
                    to, self.encoder, self.params, values[share], "document", dtype=dtype, **made
                )

        return encode_together(self.path, len(values), self.processes, encode)


@contextlib.contextmanager
def _naming(ids: Sequence[str], what: str = "") -> Iterator[None]:
    """Has an error of one of the texts say which one, where they have ids; `what` precedes it."""
    try:
        yield
    except NotFiniteError as error:
        if error.row is None or not ids:
            raise
        raise NotFiniteError(f"{what}{ids[error.row]}: {error}", row=error.row) from None
