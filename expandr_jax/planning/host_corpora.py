"""What hosts have of a collection: its documents, their vectors and indexes, and its results."""

import math
from collections.abc import Sequence

import numpy as np

from expandr_jax.config import Config
from expandr_jax.expansion.strategies import Search, strategy
from expandr_jax.planning.host_stages import (
    CORE_SECONDS,
    DOCUMENT_BYTES,
    ENTRY,
    FOUND,
    INDEX,
    LINE,
    NUMBER,
    TERMS,
    TOKEN_BYTES,
    Stages,
)
from expandr_jax.planning.planned_encoding import sparse_encoding
from expandr_jax.planning.planned_generator import RANK_TOKENS
from expandr_jax.planning.synthetic import Counts
from expandr_jax.planning.topology import Topology
from expandr_jax.ranking.listwise import LISTWISE, windows
from expandr_jax.ranking.systems import BM25, EXPANSION, SPLADE, System
from expandr_jax.search.divided import SHARD_ROWS
from expandr_jax.search.postings import MOST_THREADS
from expandr_jax.search.scann import method_of
from expandr_jax.search.word_counts import COUNTS_AT_ONCE
from expandr_jax.vectors.encoder import TEXTS_AT_ONCE
from expandr_jax.vectors.sparse import SPARSE_TEXTS
from expandr_jax.vectors.stored import storage_type

# Bytes.
POSTING = 8  # A word in a text that has it: a weight and the text's number.
COUNTED = 80  # The same while BM25's index is made of it, as search/word_counts.py says.
LENGTHS = 40  # A text's length meanwhile: five arrays of 8 bytes a number.
# A text, for each query that is searched for at the same time: an estimate, as if each had one or
# two words of the query. `Postings.best` takes 24 for one word in every text, and 64 for four.
SCORED = 32
HASHED = 8  # A vector's leaf and norm in an index of ScaNN, beside its hash.
# Different words of all texts, for the root of their words: an estimate by Heaps' law, whose factor
# is 30 to 100 (Manning et al., Introduction to Information Retrieval, 5.1.1).
WORDS = 50


def add_data(
    stages: Stages, config: Config, documents: int, queries: int, *, own: bool = True
) -> None:
    """The row of documents and queries; of what is not a run's own there is the store alone."""
    texts = documents * config.retriever.max_length * TOKEN_BYTES
    written = own * queries * (config.dpo.prompt_length * TOKEN_BYTES + 2 * LINE)
    stages.add(
        "data", memory=documents * DOCUMENT_BYTES + queries * ENTRY,
        disk=(1 + own) * texts + written,
        files=3 + 6 * own, network=written,
        seconds=CORE_SECONDS["document read"] * documents / 1000,
    )  # fmt: skip


def add_vectors(stages: Stages, config: Config, documents: int, width: int, times: int) -> None:
    """The row of a corpus that so many retrievers encode, one after the other.

    What each process encoded, in float32, lies beside the joined file until that is whole.
    """
    longest, hosts = config.retriever.max_length, stages.hosts
    vectors, texts = documents * vector_bytes(config, width), documents * longest * TOKEN_BYTES
    stages.add(
        f"corpus, encoded {times} times",
        memory=TEXTS_AT_ONCE * (longest * (TOKEN_BYTES + NUMBER) + 3 * 4 * width),
        disk=times * vectors, scratch=4 * width * documents * (hosts > 1), files=2 * times,
        network=times * (texts / hosts + vectors),
        seconds=times * CORE_SECONDS["text encoded"] * documents / hosts / 1000,
    )  # fmt: skip


def vector_bytes(config: Config, width: int) -> int:
    """Bytes of a document's vector in its file."""
    kind, shape = storage_type(config.retriever.vectors, width)
    return kind.itemsize * math.prod(shape)


def add_indexes(
    stages: Stages, config: Config, documents: int, width: int, systems: Sequence[System],
    topology: Topology, approximate: int,
) -> None:  # fmt: skip
    """The rows of a corpus' indexes, of which process 0 makes those of words.

    Args:
        approximate: How many retrievers' vectors ScaNN indexes; see `approximate_indexes`.
    """
    if approximate and method_of(config.search.scann, documents) != "brute":
        _add_scann(stages, config, documents, width, approximate)
    if _has_words(config, systems):
        _add_bm25(stages, documents)
    if any(SPLADE in part.retrievers for system in systems for part in system.with_parts()):
        wide = sparse_encoding(config, topology).module.config.vocab_size
        size = POSTING * TERMS * documents
        # Blocks wait in a file until the numbers of all are known.
        stages.add(
            "sparse index", memory=4 * wide * SPARSE_TEXTS + MOST_THREADS * SCORED * documents,
            disk=size, scratch=2 * size, files=4,
            seconds=CORE_SECONDS["text encoded"] * documents / 1000,
        )  # fmt: skip


def approximate_indexes(config: Config, encoded: int) -> int:
    """Retrievers whose vectors of the run's corpus ScaNN indexes; of `encoded` results are made.

    Training searches before a round, for negatives or passages that prompts show, and after it,
    for rewards and what follows the last one.
    """
    if config.search.backend == "exact":
        return 0
    reward = config.reward
    before = config.contrastive.negatives and config.mining.per_query
    before = before or "dense" in _shown_by(config, ())
    after = (reward.corpus or reward.gain) and reward.search != BM25
    after = after or config.figret.rank or config.distill.epochs
    trained = config.rounds + bool(before and after) if before or after else 0
    return max(trained, approximate_results(config, encoded))


def approximate_results(config: Config, encoded: int) -> int:
    """Retrievers by whose indexes results are searched, if not exactly."""
    section = config.search
    return encoded if section.evaluation == "index" and section.backend != "exact" else 0


def _shown_by(config: Config, systems: Sequence[System]) -> set[str]:
    """What finds the passages that prompts show, of the config's strategy and those of systems."""
    leaves = (leaf.strategy for system in systems for leaf in system.leaves if leaf.strategy)
    own = config.expansion.strategy, config.expansion.template
    names = {own, *((name, "") for name in leaves if name != EXPANSION)}
    steps = (step for name in names for step in strategy(*name).steps)
    return {step.by for step in steps if isinstance(step, Search)}


def _has_words(config: Config, systems: Sequence[System]) -> bool:
    """Whether a run searches by BM25."""
    reward = config.reward
    rewarded = (reward.corpus or reward.gain) and reward.search != "dense"
    named = any(BM25 in system.retrievers for system in systems)
    return bool(named or rewarded or config.figret.rank or BM25 in _shown_by(config, systems))


def _add_scann(stages: Stages, config: Config, documents: int, width: int, times: int) -> None:
    """The row of ScaNN's indexes, whose shards processes share; one is built and then opened."""
    options, shards = config.search.scann, -(-documents // SHARD_ROWS)
    exact = {"float32": 4, "bfloat16": 2, "int8": 1}[options.storage]
    each = exact * width + -(-width // options.dimensions_per_block) + HASHED
    most = min(documents, SHARD_ROWS)
    own = min(documents, -(-shards // stages.hosts) * SHARD_ROWS)
    # ScaNN gets a copy of vectors whose files are of another type.
    copied = 4 * width * (storage_type(config.retriever.vectors, width)[0] != np.float32)
    stages.add(
        f"ScaNN, {times} index{'es' * (times > 1)}", memory=each * own + (each + copied) * most,
        disk=times * documents * each, files=9 * times * shards,
        seconds=times * CORE_SECONDS["vector indexed"] * width / 768 * own / 1000,
    )  # fmt: skip


def _add_bm25(stages: Stages, documents: int) -> None:
    """The row of BM25's index, which process 0 makes in files beside it, and all open.

    In memory are a part of it, the words, and at the search what each query has of all texts. The
    seconds are those of one core, of which several can save two thirds.
    """
    entries = documents * TERMS
    words = WORDS * math.sqrt(entries)
    making = COUNTED * COUNTS_AT_ONCE + LENGTHS * documents
    searching = MOST_THREADS * SCORED * documents
    stages.add(
        "BM25's index", memory=words * ENTRY + max(making, searching),
        disk=POSTING * entries, scratch=2 * POSTING * entries, files=7,
        seconds=CORE_SECONDS["text in BM25"] * documents / 1000,
    )  # fmt: skip


def add_orders(stages: Stages, config: Config, counts: Counts, systems: Sequence[System]) -> None:
    """The row of passages that the generator orders, which one process asks for."""
    parts = {part.name: part for system in systems for part in system.with_parts()}
    lists = sum(part.stage == LISTWISE for part in parts.values())
    if not lists:
        return
    section = config.evaluation.listwise
    queries, depth = counts.test, max(section.depth, *section.depths, 0)
    queries += counts.dev if section.depths else 0
    texts = lists * queries * len(windows(depth, section.window, section.stride))
    prompt = max(config.generator.prompt_buckets) * TOKEN_BYTES
    stages.add(
        "orders of passages", memory=queries * (prompt + ENTRY) + INDEX * texts, files=1,
        disk=texts * (RANK_TOKENS * section.window * TOKEN_BYTES + LINE),
        seconds=CORE_SECONDS["text sampled"] * texts / 1000,
    )  # fmt: skip


def add_expansions(
    stages: Stages, config: Config, counts: Counts, systems: Sequence[System]
) -> None:
    """The row of what is written for a collection's dev and test queries."""
    generators = len({leaf.generator for s in systems for leaf in s.leaves if leaf.strategy})
    texts = generators * (counts.dev + counts.test) * max(config.evaluation.samples)
    new = config.expansion.max_new_tokens
    stages.add_sampled("expansions for evaluation", texts, new, copies=2)


def add_results(stages: Stages, config: Config, counts: Counts, width: int, systems: int) -> None:
    """The row of so many systems' rankings of a collection, and what is told of them."""
    queries = counts.dev + counts.test
    vectors = queries * (1 + max(config.evaluation.samples))
    ranked = systems * queries * config.evaluation.depth
    stages.add(
        "evaluation", memory=2 * FOUND * ranked + 3 * 4 * width * vectors,
        disk=FOUND * ranked, files=systems + 6, network=4 * width * systems * vectors,
        seconds=CORE_SECONDS["query ranked"] * systems * queries / 1000,
    )  # fmt: skip


def add_tests(
    stages: Stages, config: Config, tests: Sequence[Counts], width: int, systems: Sequence[System],
    topology: Topology, encoded: int, ranked: int,
) -> None:  # fmt: skip
    """The row of further collections, one after the other; what is kept of each stays.

    Args:
        tests: Their documents, and queries as those of `test`.
        encoded: Retrievers that encode each of them.
        ranked: Systems that are ranked.
    """
    rows = []
    for counts in tests:
        own = Stages(0, stages.hosts, 0)
        add_data(own, config, counts.documents, counts.test, own=False)
        add_vectors(own, config, counts.documents, width, encoded)
        indexed = approximate_results(config, encoded)
        add_indexes(own, config, counts.documents, width, systems, topology, indexed)
        add_expansions(own, config, counts, systems)
        add_orders(own, config, counts, systems)
        add_results(own, config, counts, width, ranked)
        rows += own.rows
    if rows:
        stages.add_together(f"{len(tests)} further test{'s' * (len(tests) > 1)}", rows)
