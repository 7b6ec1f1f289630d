"""A finished run as programs ask it: its models, its documents and what it chose on dev."""

import copy
import dataclasses
import functools
import importlib.util
import json
import math
import pathlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from expandr_jax.config import Config, read_run_config, with_settings
from expandr_jax.data.batches import encoding_lengths
from expandr_jax.data.beir import corpus_key, read_beir
from expandr_jax.data.documents import Documents, open_documents
from expandr_jax.data.places import only_collection
from expandr_jax.errors import UserError
from expandr_jax.expansion.combine import WAYS
from expandr_jax.expansion.expand import Expander, SearchTexts, make_expander
from expandr_jax.files.records import hash_json
from expandr_jax.generation.sampler import Sampler
from expandr_jax.loading import make_sampler
from expandr_jax.models.retriever import Retriever
from expandr_jax.pair import GeneratorModel, phase_mesh
from expandr_jax.ranking.choices import Choice
from expandr_jax.ranking.gate import read_gates
from expandr_jax.ranking.gate_features import BEFORE
from expandr_jax.runtime.processes import Processes
from expandr_jax.runtime.progress import Reporter
from expandr_jax.search import Index, ScannIndex, kept_bm25, kept_index
from expandr_jax.serving.cache import Cache
from expandr_jax.serving.documents import MERGE_FROM, LiveDocuments
from expandr_jax.serving.expansions import ServedExpansions, SlotSampler
from expandr_jax.serving.gate import QueryGate
from expandr_jax.serving.pair import Pair, Searchable
from expandr_jax.serving.queries import QueryEncoder
from expandr_jax.serving.snapshots import Base, BaseVectors
from expandr_jax.sharding import batch_divisor, device_put_shared, make_mesh
from expandr_jax.vectors.corpus import Corpus
from expandr_jax.vectors.encoder import TextEncoder
from expandr_jax.vectors.file import content_key
from expandr_jax.vectors.stored import open_vectors
from expandr_jax.weights.hf import load_generator, load_retriever
from expandr_jax.weights.trees import hash_tree

FILES_READ = (  # What is read of a run.
    "config.json", "results.json", "qrels.trec", "data", "export/retriever", "export/generator",
    "export/query-encoder", "work/vectors/expandr.*", "work/documents", "work/bm25.index-*",
    "runs/expandr.trec", "runs/expandr-plain.trec", "evaluation/expansions.jsonl",
    "evaluation/gates.json",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Finished:
    """A finished run.

    Attributes:
        workdir: Where it lies; nothing is written there.
        config: Its settings.
        chosen: What its system "expandr" chose on dev.
    """

    workdir: pathlib.Path
    config: Config
    chosen: Choice

    @property
    def vectors_path(self) -> pathlib.Path:
        """The file of its documents' vectors."""
        return self.workdir / "work" / "vectors" / "expandr.npy"

    @property
    def distilled_path(self) -> pathlib.Path:
        """The encoder of queries that `train.distill` exports."""
        return self.workdir / "export" / "query-encoder"

    @functools.cached_property
    def retriever(self) -> tuple[Retriever, Any]:
        """The exported retriever and its parameters."""
        mesh = fitting_mesh(self.config, "encoding")
        where = str(self.workdir / "export" / "retriever")
        return load_retriever(where, mesh=mesh, query_length=self.config.retriever.query_length)

    @functools.cached_property
    def retriever_key(self) -> str:
        """A hash of all that vectors depend on beside the texts."""
        retriever, params = self.retriever
        return hash_json([retriever.identity, hash_tree(params)])

    @functools.cached_property
    def corpus_key(self) -> str:
        """A hash of the documents' files."""
        return corpus_key(only_collection(self.workdir / "data"))

    def documents(self, store: pathlib.Path | None = None) -> Documents:
        """The run's documents; kept in `store` where the run's own copy is damaged."""
        own = self.workdir / "work" / "documents" / "data"
        found = open_documents(own, self.corpus_key) if own.exists() else None
        return found or read_beir(self.workdir / "data", store=store).corpus

    def base(self, corpus: Documents) -> Base:
        """The run's documents with their vectors and, if search misses some, the index."""
        path = self.vectors_path
        vectors = open_vectors(path)
        indexed = Corpus(corpus.ids, vectors, self.config.search, path, writes=False)
        return Base.of(corpus, vectors, indexed.index if indexed.approximate else None)

    def live_documents(
        self, state: pathlib.Path, merge_from: int = MERGE_FROM, gate: QueryGate | None = None
    ) -> LiveDocuments:
        """The documents of a service of this run, in a state that was taken.

        After a merge the gate, if there is one, counts their words anew.
        """
        corpus = self.documents(state / "documents")
        key = hash_json([self.corpus_key, content_key(self.vectors_path), self.retriever_key])
        base = self.base(corpus)
        options = self.config.search.scann
        return LiveDocuments(
            state,
            key,
            base,
            self.encode_documents,
            _type_of(self.vectors_path),
            None if base.index is None else functools.partial(_scann, options),
            merge_from,
            *([gate.count_words] if gate else ()),
        )

    @functools.cached_property
    def encode_documents(self) -> Callable[[Sequence[str]], np.ndarray]:
        """Encodes documents as the run did, to the last bit."""
        retriever, params = self.retriever
        # Another thread than that of queries tokenises.
        retriever = dataclasses.replace(retriever, tokenizer=copy.deepcopy(retriever.tokenizer))
        most, mesh = self.config.retriever.tokens_per_batch, fitting_mesh(self.config, "encoding")
        encoder, one = TextEncoder(retriever, mesh, tokens_per_batch=most), threading.Lock()

        def encode(texts: Sequence[str]) -> np.ndarray:
            with one:  # The library's tokenizers are for one thread.
                return encoder.encode(params, texts, "document")

        return encode

    def compile_documents(self) -> None:
        """Encodes a text of every length that has a program."""
        lengths = encoding_lengths(self.retriever[0].max_length)
        self.encode_documents([" a" * max(1, length - 4) for length in lengths])

    @functools.cached_property
    def gate(self) -> QueryGate | None:
        """What says whether a query should be expanded, if the run has fitted a gate for that."""
        path = self.workdir / "evaluation" / "gates.json"
        gate = read_gates(path).get(BEFORE) if path.exists() else None
        if gate is None:
            return None
        work = self.workdir / "work"
        try:
            return QueryGate(gate, functools.partial(kept_bm25, work, write=False))
        except UserError as error:
            raise UserError(f"{path}: {error}; use the version that fitted it") from None

    def pair(self, documents: Searchable, gate: QueryGate | None = None) -> Pair:
        """The pair, with the query encoder that train.distill made, if it has."""
        encoder, distilled = QueryEncoder(*self.retriever), None
        if self.distilled_path.exists():
            length = self.config.retriever.query_length
            distilled = QueryEncoder(*load_retriever(str(self.distilled_path), query_length=length))
        weight, normalize = self.chosen.query_weight, self.config.contrastive.normalize
        how = self.chosen.combine
        depth = self.config.evaluation.depth  # As deep as when it was chosen.
        kind = self.config.expansion.kind
        return Pair(encoder, documents, weight, normalize, distilled, how, depth, gate, kind)

    def expansions(
        self,
        pair: Pair,
        console: Console,
        slots: int,
        temperature: float | None = None,
        cache: Cache | None = None,
    ) -> ServedExpansions:
        """What expands queries.

        Args:
            pair: What encodes.
            console: Where is said what is cut.
            slots: Texts that are sampled at once.
            temperature: 0 has the likeliest text, once; None: as the run chose on dev.
            cache: Where they are kept; None: nowhere.
        """
        config = self.config
        if temperature is not None:
            config = with_settings(config, {"expansion.temperature": temperature})
        sampler = self.sampler(console, hashed=cache is not None)
        sampling = SlotSampler(sampler, config.expansion, slots)
        expander = self._expander(sampler, pair, config)
        asks = len(expander.strategy.asks)
        samples = 1 if temperature == 0 else self.chosen.samples // asks
        content = hash_json([self.retriever_key, self.corpus_key])
        return ServedExpansions(expander, sampling, samples, pair.passages, content, cache)

    def sampler(self, console: Console, hashed: bool = False) -> Sampler:
        """Samples with the exported generator, as the run did for its evaluation.

        Its weights' hash takes time, and is only told if it is asked for.
        """
        settings, mesh = self.config.generator, fitting_mesh(self.config, "sampling")
        compute = jnp.dtype(settings.compute_dtype)
        source = str(self.workdir / "export" / "generator")
        generator, params = load_generator(source, dtype=compute, compute_dtype=compute, mesh=mesh)
        # Devices of a processor have one copy between them.
        params = device_put_shared(params, jax.tree.map(lambda leaf: leaf.sharding, params))
        generator = dataclasses.replace(generator, **settings.chat)
        divisor = batch_divisor(mesh)  # This machine's devices may not divide the run's slots.
        slots = math.ceil(settings.slots / divisor) * divisor
        weights = hash_tree(params) if hashed else ""
        model = GeneratorModel(mesh, mesh, generator, params, params, weights)
        config = with_settings(self.config, {"generator.slots": slots})
        return make_sampler(model, config, Processes(), Reporter(console))

    def _expander(self, sampler: Sampler, pair: Pair, config: Config) -> Expander:
        """Expands queries by a config; steps that search see the run's own documents."""
        corpus = self.documents()

        @functools.cache
        def words() -> Index:
            return kept_bm25(self.workdir / "work", corpus.values(), write=False)

        return make_expander(
            config.expansion,
            sampler,
            corpus,
            lambda *asked: words().search(*asked),
            self._dense(pair, corpus),
            most_characters=config.answer.max_characters,
            drop_identical_ids=config.evaluation.drop_identical_ids,
        )

    def _dense(self, pair: Pair, corpus: Documents) -> SearchTexts:
        """Searches the run's documents by vectors."""
        base = self.base(corpus)
        nothing = np.zeros(len(base), bool)

        def search(queries: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
            vectors = pair.encoder.encode(queries, ["query"] * len(queries))
            scores, rows = zip(*base.search(vectors, k, nothing), strict=True)
            return np.stack(scores), np.stack(rows)

        return search


def check_installed(extra: str, *packages: str) -> None:
    """Says, by a UserError, what to install where one of an extra's packages is not there."""
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{name} is not installed: pip install 'expandr-jax[{extra}]'")


def open_finished(workdir: pathlib.Path) -> Finished:
    """A finished run of train.joint.

    Raises:
        UserError: It is none.
    """
    try:
        chosen = json.loads((workdir / "results.json").read_text(encoding="utf-8"))["chosen"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{workdir}: not a finished run; train.joint makes one") from None
    config = read_run_config(workdir / "config.json")
    if "expandr" not in chosen or not (workdir / "export" / "generator").exists():
        raise UserError(
            f"{workdir}: has no expandr system or no exports; let train.joint finish it"
        )
    try:
        choice = Choice(**chosen["expandr"])
        whole = 0 <= choice.query_weight <= 1 and choice.samples >= 1 and choice.combine in WAYS
    except TypeError:
        whole = False
    if not whole:
        message = "what dev chose for expandr is damaged; train.joint's same command mends it"
        raise UserError(f"{workdir / 'results.json'}: {message}")
    return Finished(workdir, config, choice)


def fitting_mesh(config: Config, phase: str) -> Mesh:
    """The run's mesh of a phase, or one of all devices where it does not fit this machine."""
    try:
        return phase_mesh(config.mesh, phase)
    except UserError:
        return make_mesh()


def _type_of(path: pathlib.Path) -> str:
    """The type in which a file keeps its vectors."""
    kind = np.load(path, mmap_mode="r", allow_pickle=False).dtype
    return kind.name if kind.names is None else kind.names[-1]


def _scann(options: Any, vectors: BaseVectors, directory: pathlib.Path) -> Index:
    """ScaNN's index of a snapshot, which is kept beside it."""
    key = hash_json(vars(options))[:16]
    return kept_index(directory / f"vectors.index-{key}", lambda: ScannIndex(vectors, options))
