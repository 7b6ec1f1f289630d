"""What a run takes of each host, reckoned from its config and how much data it has.

A row a stage: what a process holds at most meanwhile, what the stage leaves in the workdir, what a
host has to fetch from others, and the seconds that are in no compiled program. They follow from the
sizes of arrays and texts, and from a few constants. What a process really holds at small scales is
what `train.rehearse` measures.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from expandr_jax.config import Config
from expandr_jax.mining import QUERIES_AT_ONCE
from expandr_jax.objectives.figret import PASSAGE_PROMPTS
from expandr_jax.objectives.packed_examples import TRIPLES_AT_ONCE
from expandr_jax.planning.planned import LENGTH, of_retriever_alone
from expandr_jax.planning.planned_encoding import sparse_encoding
from expandr_jax.planning.planned_generator import RANK_TOKENS, GeneratorShapes
from expandr_jax.planning.planned_retriever import WORD, RetrieverShapes
from expandr_jax.planning.synthetic import Counts
from expandr_jax.planning.topology import Topology
from expandr_jax.ranking.listwise import LISTWISE, windows
from expandr_jax.ranking.systems import (
    ALL_LABELS,
    SPLADE,
    TURNS,
    UNTRAINED,
    System,
    parse_systems,
)
from expandr_jax.report.tables import Bold, render
from expandr_jax.rewards.search import BLOCK_ROWS, BLOCKS
from expandr_jax.runtime.chips import GIB
from expandr_jax.vectors.encoder import TEXTS_AT_ONCE
from expandr_jax.vectors.sparse import SPARSE_TEXTS
from expandr_jax.vectors.stored import storage_type

# Bytes.
PROCESS_BYTES = GIB  # What a process begins with: libraries, and the programs that it has compiled.
TOKEN_BYTES = 5  # A token as text.
NUMBER = 36  # A token's number in a list.
ENTRY = 300  # A text beside its letters, with its id and its place in a mapping.
LINE = 200  # A line of JSON beside its text.
INDEX = 80  # A text in a journal, while it is put in order.
DOCUMENT_BYTES = 40  # A document, while its store is written.
FOUND = 60  # A line of a ranking, and half of what it is in memory.
TERMS = 256  # Components of a text in a sparse index, about.
CHECKPOINT_FILES = 16  # In a checkpoint, for each process.
# Seconds of one core, for a thousand of each, of 512 tokens: `python -m tests.host_rates`.
CORE_SECONDS = {
    "document read": 0.03, "text encoded": 0.35, "text sampled": 0.06, "example": 1.1,
    "example kept": 0.04,
    "candidate rewarded": 0.03, "query ranked": 0.23, "MB exported": 0.71,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class HostRow:
    """A stage of a run, as its hosts have it.

    Attributes:
        stage: Its name.
        bytes_memory: What a process needs at most.
        bytes_disk: That it adds to the workdir.
        files: That it adds there.
        bytes_network: That the host which fetches most has from others, in all.
        seconds: In no compiled program.
        bytes_capacity: Memory of a host.
    """

    stage: str
    bytes_memory: float
    bytes_disk: float
    files: int
    bytes_network: float
    seconds: float
    bytes_capacity: float

    @property
    def fits(self) -> bool:
        return self.bytes_memory <= self.bytes_capacity


class _Stages:
    """Makes the rows, of which each holds what all do."""

    def __init__(self, held: float, hosts: int, memory: float):
        self.rows: list[HostRow] = []
        self.hosts, self._held, self._memory = hosts, held, memory

    def add(
        self,
        stage: str,
        *,
        memory: float = 0,
        disk: float = 0,
        files: int = 0,
        network: float = 0,
        seconds: float = 0,
    ) -> None:
        """`network` is what a host fetches that has nothing yet; with one host nothing is."""
        network *= (self.hosts - 1) / self.hosts
        values = self._held + memory, disk, files, network, seconds, self._memory
        self.rows.append(HostRow(stage, *values))

    def add_sampled(self, stage: str, texts: int, tokens: int, copies: int = 1) -> None:
        """A stage whose texts are divided, and end in a journal; `copies`: files with all."""
        size = texts * (tokens * TOKEN_BYTES + LINE)
        seconds = CORE_SECONDS["text sampled"] * texts / self.hosts / 1000
        self.add(stage, memory=INDEX * texts, disk=copies * size, files=copies, network=size,
                 seconds=seconds)  # fmt: skip


def host_rows(config: Config, counts: Counts, topology: Topology, memory: float) -> list[HostRow]:
    """The rows of a run's stages, in their order.

    Args:
        config: The whole config.
        counts: What there is of its data; of a retriever's own training the triples, as
            `retriever_train`, and the documents of data.dev.
        topology: What the hosts are counted by.
        memory: Bytes that each has.

    Raises:
        UserError: No shape of a model is found.
    """
    retriever, hosts = RetrieverShapes(config, topology), topology.hosts
    if of_retriever_alone(config):
        return _of_retriever(config, counts, retriever, hosts, memory)
    generator, longest = GeneratorShapes(config, topology), config.retriever.max_length
    base, encoder = _bytes(generator.params), _bytes(retriever.params)
    width, turns = retriever.width, len(TURNS) if config.figret.rank else 0
    document, query = longest * TOKEN_BYTES, config.dpo.prompt_length * TOKEN_BYTES
    systems = parse_systems(config.evaluation.systems)
    named = set[str]().union(*(s.retrievers for s in systems))
    baselines = named & {"fine-tuned", ALL_LABELS}
    trained = config.rounds + len(baselines)
    encoded = trained + turns + bool(config.mining.per_query or UNTRAINED in named)
    all_queries = sum(dataclasses.astuple(counts)[1:])
    # Queries and judgements, every retriever, and where devices share the base, all of it, too.
    held = PROCESS_BYTES + all_queries * (query + 2 * ENTRY) + (1 + trained + turns) * encoder
    stages = _Stages(held + (base if hosts > 1 else 0), hosts, memory)
    texts = counts.documents * document
    written = all_queries * (query + 2 * LINE)
    stages.add(
        "data", memory=counts.documents * DOCUMENT_BYTES + all_queries * ENTRY,
        disk=2 * texts + written, files=9, network=written,
        seconds=CORE_SECONDS["document read"] * counts.documents / 1000,
    )  # fmt: skip
    stages.add("models", memory=_largest(generator.params), network=base + encoder)
    kind, shape = storage_type(config.retriever.vectors, width)
    vectors = counts.documents * kind.itemsize * math.prod(shape)
    stages.add(
        f"corpus, encoded {encoded} times",
        memory=TEXTS_AT_ONCE * (document + longest * NUMBER + 3 * 4 * width),
        disk=encoded * vectors, files=2 * encoded, network=encoded * (texts / hosts + vectors),
        seconds=encoded * CORE_SECONDS["text encoded"] * counts.documents / hosts / 1000,
    )  # fmt: skip
    new, samples = config.expansion.max_new_tokens, config.expansion.train_samples
    expanded = config.rounds * counts.retriever_train * samples
    stages.add_sampled("expansions", expanded, new, copies=2)
    each = 1 + samples + config.contrastive.negatives
    rows = counts.retriever_train
    # One baseline learns from the generator's queries, too.
    examples = [rows] * trained
    examples[0] += counts.generator_train * (ALL_LABELS in named)
    _add_training(stages, "step A", config, retriever, examples, each, samples)
    add = _add_on_policy if config.step_b_kind.on_policy else _add_from_files
    add(stages, config, counts, width, generator)
    if turns:
        failed = min(config.figret.queries or math.inf, rows)
        found = 4 * width + min(config.figret.rank, counts.documents) * 8
        stages.add(
            "queries that fail", memory=min(rows, QUERIES_AT_ONCE) * found, files=1,
            disk=failed * (query + each * document),
            seconds=CORE_SECONDS["text encoded"] * rows / hosts / 1000,
        )  # fmt: skip
        stages.add_sampled("easier passages", len(PASSAGE_PROMPTS) * failed, new)
        triples = (1 + len(PASSAGE_PROMPTS)) * failed
        each = 1 + max(1, config.contrastive.negatives)
        _add_training(stages, "FiGRet", config, retriever, turns * [triples], each)
    asked = (counts.dev + counts.test) * max(config.evaluation.samples)
    generators = len({leaf.generator for s in systems for leaf in s.leaves if leaf.strategy})
    stages.add_sampled("expansions for evaluation", generators * asked, new, copies=2)
    _add_ranking(stages, config, counts, topology, systems)
    systems, queries = len(systems) + turns, counts.dev + counts.test
    ranked = systems * queries * config.evaluation.depth
    stages.add(
        "evaluation", memory=2 * FOUND * ranked + 3 * 4 * width * (queries + asked),
        disk=FOUND * ranked, files=systems + 6, network=4 * width * systems * (queries + asked),
        seconds=CORE_SECONDS["query ranked"] * systems * queries / 1000,
    )  # fmt: skip
    size = jnp.dtype(config.export.dtype).itemsize
    exported = _bytes(generator.params, size) + (1 + bool(turns)) * _bytes(retriever.params, size)
    stages.add("export", memory=3 * _largest(generator.params), disk=exported, files=30,
               seconds=CORE_SECONDS["MB exported"] * exported / 1e9)  # fmt: skip
    return stages.rows


def _of_retriever(
    config: Config, counts: Counts, retriever: RetrieverShapes, hosts: int, memory: float
) -> list[HostRow]:
    """The rows of a run that trains a retriever and nothing else."""
    document = config.retriever.max_length * TOKEN_BYTES
    query = config.dpo.prompt_length * TOKEN_BYTES
    encoder, triples = _bytes(retriever.params), counts.retriever_train
    each = 1 + config.contrastive.negatives
    texts = triples * (query + ENTRY + each * (document + ENTRY))
    held, size = PROCESS_BYTES + texts + 2 * encoder, jnp.dtype(config.export.dtype).itemsize
    if config.data.dev:
        held += counts.documents * (document + ENTRY)
    stages = _Stages(held, hosts, memory)
    stages.add("data", files=1, seconds=CORE_SECONDS["document read"] * (1 + each) * triples / 1000)
    stages.add("models", memory=_largest(retriever.params), network=encoder)
    if config.llara.epochs:
        words = config.llara.passage_words * WORD
        pairs = triples * each * max(1, config.retriever.max_length // words - 1)
        pairs = min(pairs, config.llara.pairs or math.inf)
        state, pair = 3 * _bytes(retriever.trained), 2 * (words * TOKEN_BYTES + ENTRY)
        stages.add(
            "LLaRA", memory=pairs * pair + 2 * state / hosts, disk=2 * state,
            files=2 * CHECKPOINT_FILES * hosts, network=encoder,
            seconds=CORE_SECONDS["example"] * config.llara.epochs * pairs * words / LENGTH / 1000,
        )  # fmt: skip
    _add_training(stages, "step A", config, retriever, [triples], each)
    if config.data.dev:
        kept = 8 * TERMS if retriever.retriever.pooling == SPLADE else 4 * retriever.width
        stages.add(
            "each evaluation on dev", memory=counts.documents * kept,
            seconds=CORE_SECONDS["text encoded"] * counts.documents / 1000,
        )  # fmt: skip
    exported = _bytes(retriever.params, size)
    stages.add("export", memory=3 * _largest(retriever.params), disk=exported, files=12,
               seconds=CORE_SECONDS["MB exported"] * exported / 1e9)  # fmt: skip
    return stages.rows


def _add_training(
    stages: _Stages, name: str, config: Config, retriever: RetrieverShapes,
    counts: Sequence[int], each: int, samples: int = 0,
) -> None:  # fmt: skip
    """The row of a retriever's trainings on so many examples, with `each` texts beside a query.

    In memory are those that are tokenized together; of the others, where they are on disk; two
    batches. `samples` of the texts are expansions. Each host tokenizes a share and sends it to all.
    """
    longest, hosts, times = config.retriever.max_length, stages.hosts, len(counts)
    document, query = longest * TOKEN_BYTES, config.dpo.prompt_length * TOKEN_BYTES
    example = (1 + each) * ENTRY + query + each * (document + longest * NUMBER)
    batch = config.contrastive.batch_size * (1 + each) * longest * 8 / hosts
    made = TRIPLES_AT_ONCE * example + max(counts) * (ENTRY + samples * INDEX)
    kept, state = config.keep + 1, 3 * _bytes(retriever.trained)
    stages.add(
        f"{name}, {times} training{'s' * (times > 1)}",
        memory=made + 2 * batch + 2 * state / hosts,
        disk=times * kept * state, files=times * kept * CHECKPOINT_FILES * hosts,
        network=times * _bytes(retriever.params) + sum(counts) * (1 + each) * longest * 4,
        seconds=(CORE_SECONDS["example"] / hosts + CORE_SECONDS["example kept"])
        * sum(counts) / 1000,
    )  # fmt: skip


def _add_ranking(
    stages: _Stages, config: Config, counts: Counts, topology: Topology, systems: Sequence[System]
) -> None:
    """The rows of what the systems need beside vectors of the corpus; one process has it all."""
    parts = {part.name: part for system in systems for part in system.with_parts()}
    lists = sum(part.stage == LISTWISE for part in parts.values())
    if lists:
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
    if any(SPLADE in part.retrievers for part in parts.values()):
        wide = sparse_encoding(config, topology).module.config.vocab_size
        stages.add(
            "sparse index", memory=4 * wide * SPARSE_TEXTS, files=4,
            disk=8 * TERMS * counts.documents,
            seconds=CORE_SECONDS["text encoded"] * counts.documents / 1000,
        )  # fmt: skip


def _saved(config: Config, generator: GeneratorShapes) -> tuple[int, dict[str, int]]:
    """Bytes of step B's state, and what its checkpoints take, of all rounds together."""
    state, number = 3 * _bytes(generator.adapter), config.rounds * (config.keep + 1)
    return state, {"disk": number * state, "files": number * CHECKPOINT_FILES}


def _add_on_policy(
    stages: _Stages, config: Config, _: Counts, width: int, generator: GeneratorShapes
) -> None:
    """The row of a step B that samples in its steps, of all rounds together."""
    settings, (state, saved) = config.learned, _saved(config, generator)
    new = settings.max_new_tokens
    step = settings.texts * (new * TOKEN_BYTES + ENTRY + 2 * new * NUMBER + 6 * 4 * width)
    name, network = config.step_b_kind.phase, settings.steps * step
    stages.add(name, memory=step + 2 * state, network=network, **saved)


def _add_from_files(
    stages: _Stages, config: Config, counts: Counts, width: int, generator: GeneratorShapes
) -> None:
    """The rows of a step B that learns from files, of all rounds together."""
    new, (state, saved) = config.rewarded.max_new_tokens, _saved(config, generator)
    text = new * TOKEN_BYTES
    asked, number = counts.generator_train, len(config.candidates.all_temperatures)
    texts = config.rounds * asked * number
    stages.add_sampled("candidates", texts, new)
    stages.add_sampled("self-answers", config.rounds * asked, config.answer.max_new_tokens)
    # A block's texts and vectors, and what is found for half of it.
    block = BLOCKS * BLOCK_ROWS * (text + ENTRY + 6 * 4 * width)
    block += BLOCK_ROWS * config.reward.depth * 16
    lines = texts * (text + LINE)
    stages.add(
        "rewards", memory=block + INDEX * texts / config.rounds,
        disk=lines + config.rounds * asked * 2 * (text + LINE), files=2 * config.rounds,
        network=config.rounds * asked * (number + 2) * 4 * width,
        seconds=(CORE_SECONDS["candidate rewarded"] + CORE_SECONDS["text encoded"] / stages.hosts)
        * texts / 1000,
    )  # fmt: skip
    prompt, response = config.dpo.prompt_length, config.dpo.response_length
    pair = 3 * ENTRY + (prompt + 2 * response) * (TOKEN_BYTES + 4)
    stages.add("step B's training", memory=asked * pair + 2 * state,
               seconds=CORE_SECONDS["example"] * config.rounds * asked / 1000, **saved)  # fmt: skip


def _bytes(tree: Any, itemsize: int | None = None) -> int:
    """Bytes of a tree of shapes, in the type of each or in one for all."""
    return sum(leaf.size * (itemsize or leaf.dtype.itemsize) for leaf in jax.tree.leaves(tree))


def _largest(params: Mapping[str, Any]) -> int:
    """Bytes of a base's largest tensor in float32, of one layer where layers are stacked."""
    layers = (leaf.size // leaf.shape[0] for leaf in jax.tree.leaves(params["layers"]))
    others = (tree for name, tree in params.items() if name != "layers")
    return 4 * max(*layers, *(leaf.size for leaf in jax.tree.leaves([*others])))


def show_hosts(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Prints the rows as a table, and what they come to."""
    header = ("stage", "memory of a process", "fits", "disk", "files", "network of a host",
              "s outside programs")  # fmt: skip
    cells = [
        [
            row["stage"],
            f"{row['bytes_memory'] / GIB:.2f}",
            "yes" if row["fits"] else Bold("NO"),
            f"{row['bytes_disk'] / GIB:.2f}",
            f"{row['files']}",
            f"{row['bytes_network'] / GIB:.2f}",
            f"{row['seconds']:.0f}",
        ]
        for row in rows
    ]
    whole = {name: sum(row[name] for row in rows)
             for name in ("bytes_disk", "files", "bytes_network", "seconds")}  # fmt: skip
    cells.append(
        ["all", "", "", f"{whole['bytes_disk'] / GIB:.2f}", f"{whole['files']}",
         f"{whole['bytes_network'] / GIB:.2f}", f"{whole['seconds']:.0f}"]
    )  # fmt: skip
    title = f"hosts: GiB, of {rows[0]['bytes_capacity'] / GIB:.4g} of memory"
    console.print(render(title, header, cells))
