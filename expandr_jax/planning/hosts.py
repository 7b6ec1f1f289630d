"""What a run takes of each host, reckoned from its config and how much data it has.

A row a stage: what a process holds at most meanwhile, what the stage leaves in the workdir and what
else of a disk it needs until it is over, what a host has to fetch from others, and the seconds that
are in no compiled program. They follow from the sizes of arrays and texts, and from a few
constants. What a process really holds at small scales is what `train.rehearse` measures.
"""

import dataclasses
import itertools
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
from expandr_jax.planning.host_corpora import (
    add_data,
    add_expansions,
    add_indexes,
    add_orders,
    add_results,
    add_tests,
    add_vectors,
    approximate_indexes,
)
from expandr_jax.planning.host_stages import (
    CHECKPOINT_FILES,
    CORE_SECONDS,
    ENTRY,
    INDEX,
    LENGTH,
    LINE,
    LISTED,
    NUMBER,
    PROCESS_BYTES,
    STORED_EXAMPLE,
    STORED_TEXT,
    TERMS,
    TOKEN_BYTES,
    WORKER,
    HostRow,
    Stages,
)
from expandr_jax.planning.planned import of_retriever_alone
from expandr_jax.planning.planned_generator import GeneratorShapes
from expandr_jax.planning.planned_retriever import WORD, RetrieverShapes
from expandr_jax.planning.synthetic import Counts
from expandr_jax.planning.topology import Topology
from expandr_jax.ranking.systems import (
    ALL_LABELS,
    TURNS,
    UNTRAINED,
    parse_systems,
)
from expandr_jax.ranking.teacher import TAUGHT_AT_ONCE
from expandr_jax.report.tables import Bold, render
from expandr_jax.rewards.search import BLOCK_ROWS, BLOCKS
from expandr_jax.runtime.chips import GIB
from expandr_jax.weights.sparse_encoder import SPLADE_POOLING


def host_rows(
    config: Config,
    counts: Counts,
    topology: Topology,
    memory: float,
    tests: Sequence[Counts] = (),
) -> list[HostRow]:
    """The rows of a run's stages, in their order.

    Args:
        config: The whole config.
        counts: What there is of its data; of a retriever's own training the triples, as
            `retriever_train`, and the documents of data.dev.
        topology: What the hosts are counted by.
        memory: Bytes that each has.
        tests: Documents and test queries of each of data.tests.

    Raises:
        UserError: No shape of a model is found.
    """
    retriever, hosts = RetrieverShapes(config, topology), topology.hosts
    if of_retriever_alone(config):
        return _of_retriever(config, counts, retriever, hosts, memory)
    generator = GeneratorShapes(config, topology)
    base, encoder = _bytes(generator.params), _bytes(retriever.params)
    width, turns = retriever.width, len(TURNS) if config.figret.rank else 0
    towers = 1 + config.distill.control if config.distill.epochs else 0
    document = config.retriever.max_length * TOKEN_BYTES
    query = config.dpo.prompt_length * TOKEN_BYTES
    systems = parse_systems(config.evaluation.systems)
    named = set[str]().union(*(s.retrievers for s in systems))
    baselines = named & {"fine-tuned", ALL_LABELS}
    trained = config.rounds + len(baselines)
    encoded = trained + turns + bool(config.mining.per_query or UNTRAINED in named)
    all_queries = sum(dataclasses.astuple(counts)[1:])
    # Queries and judgements, every retriever, and where devices share the base, all of it, too.
    held = (
        PROCESS_BYTES + all_queries * (query + 2 * ENTRY) + (1 + trained + turns + towers) * encoder
    )
    stages = Stages(held + (base if hosts > 1 else 0), hosts, memory)
    add_data(stages, config, counts.documents, all_queries)
    stages.add("models", memory=_largest(generator.params), network=base + encoder)
    add_vectors(stages, config, counts.documents, width, encoded)
    approximate = approximate_indexes(config, encoded)
    add_indexes(stages, config, counts.documents, width, systems, topology, approximate)
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
    if towers:
        _add_distillation(stages, config, counts, retriever, towers)
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
    add_expansions(stages, config, counts, systems)
    add_orders(stages, config, counts, systems)
    ranked = len(systems) + turns + towers
    add_results(stages, config, counts, width, ranked)
    encoded = trained + turns + (UNTRAINED in named)
    add_tests(stages, config, tests, width, systems, topology, encoded, ranked)
    size = jnp.dtype(config.export.dtype).itemsize
    exported = (1 + bool(turns) + bool(towers)) * _bytes(retriever.params, size)
    exported += _bytes(generator.params, size)
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
    stages = Stages(held, hosts, memory)
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
        kept = 8 * TERMS if retriever.retriever.pooling == SPLADE_POOLING else 4 * retriever.width
        stages.add(
            "each evaluation on dev", memory=counts.documents * kept,
            seconds=CORE_SECONDS["text encoded"] * counts.documents / 1000,
        )  # fmt: skip
    exported = _bytes(retriever.params, size)
    stages.add("export", memory=3 * _largest(retriever.params), disk=exported, files=12,
               seconds=CORE_SECONDS["MB exported"] * exported / 1e9)  # fmt: skip
    return stages.rows


def _add_training(
    stages: Stages, name: str, config: Config, retriever: RetrieverShapes,
    counts: Sequence[int], each: int, samples: int = 0,
) -> None:  # fmt: skip
    """The row of a retriever's trainings on so many examples, with `each` texts beside a query.

    In memory are those that are tokenized together; of the others, where they are on disk; batches.
    `samples` of the texts are expansions. Each host tokenizes a share and sends it to all, which
    keep the tokens of all examples in temporary files while a training lasts.
    """
    longest, hosts, times = config.retriever.max_length, stages.hosts, len(counts)
    document, query = longest * TOKEN_BYTES, config.dpo.prompt_length * TOKEN_BYTES
    example = (1 + each) * ENTRY + query + each * (document + longest * NUMBER)
    # Those that are ready or being made, of a process that makes them and of this one.
    batches = 2 * config.contrastive.batch_size * (1 + each) * longest * 8 / hosts
    workers, most = config.mesh.workers, max(counts)
    made = TRIPLES_AT_ONCE * example + most * (ENTRY + samples * INDEX)
    kept, state = config.keep + 1, 3 * _bytes(retriever.trained)
    stages.add(
        f"{name}, {times} training{'s' * (times > 1)}",
        memory=made + batches + workers * (WORKER + batches) + 2 * state / hosts,
        disk=times * kept * state,
        scratch=most * ((1 + each) * (4 * longest + STORED_TEXT) + STORED_EXAMPLE),
        files=times * kept * CHECKPOINT_FILES * hosts,
        network=times * _bytes(retriever.params) + sum(counts) * (1 + each) * longest * 4,
        seconds=(CORE_SECONDS["example"] / hosts + CORE_SECONDS["example kept"])
        * sum(counts) / 1000,
    )  # fmt: skip


def _add_distillation(
    stages: Stages, config: Config, counts: Counts, retriever: RetrieverShapes, towers: int
) -> None:
    """The rows of so many query towers: their queries, the teacher's passages and vectors, steps.

    Each process has the queries, and as a training begins their tokens; process 0 alone sorts out
    what was written for documents. The teacher's vectors lie in each process's file, too, until
    they are put together.
    """
    settings, width, hosts = config.distill, retriever.width, stages.hosts
    new, query = config.expansion.max_new_tokens, config.dpo.prompt_length * TOKEN_BYTES
    shown = config.retriever.query_length or config.retriever.max_length
    tokens = min(config.dpo.prompt_length, shown)
    known = counts.retriever_train + counts.generator_train
    written = min(settings.documents, counts.documents) * settings.queries_per_document
    taught = min(settings.train_queries or known, known) + written
    held = taught * (query + 2 * ENTRY)  # With what is relevant to each.
    if written:
        stages.add_sampled("queries of documents", written, new)
        sorted_out = known * (query + ENTRY) + written * (query + 3 * ENTRY)
        stages.add("queries to distill from", memory=held + sorted_out, files=1,
                   disk=written * (query + LINE), network=written * (query + LINE))  # fmt: skip
    samples = config.evaluation.samples
    most = max(settings.samples or samples)
    texts = taught * most + (counts.dev * most if most > max(samples) else 0)
    stages.add_sampled("expansions to distill", texts, new, held=held)
    vectors, each = 4 * width * taught, new * TOKEN_BYTES + ENTRY + 3 * 4 * width
    stages.add(
        "the teacher's vectors",
        memory=held + INDEX * texts + TAUGHT_AT_ONCE * (1 + most) * each,
        disk=vectors, scratch=vectors * (hosts > 1), files=2, network=vectors,
        seconds=CORE_SECONDS["text encoded"] * taught * (1 + most) / hosts / 1000,
    )  # fmt: skip
    # Rows as they are searched, put together, and kept.
    found = taught * settings.depth if settings.kl_weight else 0
    own = taught * (4 * tokens + LISTED + settings.control * (LISTED + NUMBER))
    row = tokens * 8 + 4 * width * (1 + settings.depth * bool(settings.kl_weight))
    batches, state = 2 * settings.batch_size * row / hosts, 3 * _bytes(retriever.trained)
    kept = towers * (config.keep + 1 + bool(settings.eval_every))
    stages.add(
        f"distillation, {towers} tower{'s' * (towers > 1)}",
        memory=held + own + found * (8 + 8 + 4) + batches + 2 * state / hosts,
        disk=4 * found + kept * state,
        files=bool(found) + kept * CHECKPOINT_FILES * hosts,
        network=4 * found + towers * _bytes(retriever.params),
        seconds=CORE_SECONDS["example"] * towers * taught * tokens / LENGTH / 1000,
    )  # fmt: skip


def _saved(config: Config, generator: GeneratorShapes) -> tuple[int, dict[str, int]]:
    """Bytes of step B's state, and what its checkpoints take, of all rounds together."""
    state, number = 3 * _bytes(generator.adapter), config.rounds * (config.keep + 1)
    return state, {"disk": number * state, "files": number * CHECKPOINT_FILES}


def _add_on_policy(
    stages: Stages, config: Config, _: Counts, width: int, generator: GeneratorShapes
) -> None:
    """The row of a step B that samples in its steps, of all rounds together."""
    settings, (state, saved) = config.learned, _saved(config, generator)
    new = settings.max_new_tokens
    step = settings.texts * (new * TOKEN_BYTES + ENTRY + 2 * new * NUMBER + 6 * 4 * width)
    name, network = config.step_b_kind.phase, settings.steps * step
    stages.add(name, memory=step + 2 * state, network=network, **saved)


def _add_from_files(
    stages: Stages, config: Config, counts: Counts, width: int, generator: GeneratorShapes
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
    # Texts and ids lie in temporary files; each candidate is an example, with the prompt's ids.
    responses = config.objective.responses
    examples = 1 if responses > 1 else number
    tokens = config.dpo.prompt_length + responses * config.dpo.response_length
    example = 4 * tokens + (1 + responses) * STORED_TEXT + STORED_EXAMPLE
    query = examples * example + (1 + examples * responses) * (text + LINE)
    seconds = CORE_SECONDS["example"] * config.rounds * asked / stages.hosts / 1000
    stages.add("step B's training", memory=asked * examples * INDEX + 2 * state,
               scratch=asked * query, network=4 * tokens * examples * config.rounds * asked,
               seconds=seconds, **saved)  # fmt: skip


def _bytes(tree: Any, itemsize: int | None = None) -> int:
    """Bytes of a tree of shapes, in the type of each or in one for all."""
    return sum(leaf.size * (itemsize or leaf.dtype.itemsize) for leaf in jax.tree.leaves(tree))


def _largest(params: Mapping[str, Any]) -> int:
    """Bytes of a base's largest tensor in float32, of one layer where layers are stacked."""
    layers = (leaf.size // leaf.shape[0] for leaf in jax.tree.leaves(params["layers"]))
    others = (tree for name, tree in params.items() if name != "layers")
    return 4 * max(*layers, *(leaf.size for leaf in jax.tree.leaves([*others])))


def most_disk(rows: Sequence[Mapping[str, Any]]) -> float:
    """Bytes of a disk that a run needs at one time: what was left by then, and a stage's own."""
    left = itertools.accumulate(row["bytes_disk"] for row in rows)
    return max(whole + row["bytes_scratch"] for whole, row in zip(left, rows, strict=True))


def show_hosts(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Prints the rows as a table, and what they come to."""
    header = ("stage", "memory of a process", "fits", "disk", "and for a while", "files",
              "network of a host", "s outside programs")  # fmt: skip
    cells = [
        [
            row["stage"],
            f"{row['bytes_memory'] / GIB:.2f}",
            "yes" if row["fits"] else Bold("NO"),
            f"{row['bytes_disk'] / GIB:.2f}",
            f"{row['bytes_scratch'] / GIB:.2f}",
            f"{row['files']}",
            f"{row['bytes_network'] / GIB:.2f}",
            f"{row['seconds']:.0f}",
        ]
        for row in rows
    ]
    whole = {name: sum(row[name] for row in rows)
             for name in ("bytes_disk", "files", "bytes_network", "seconds")}  # fmt: skip
    cells.append(
        ["all", "", "", f"{whole['bytes_disk'] / GIB:.2f}",
         f"{most_disk(rows) / GIB:.2f} at most", f"{whole['files']}",
         f"{whole['bytes_network'] / GIB:.2f}", f"{whole['seconds']:.0f}"]
    )  # fmt: skip
    title = f"hosts: GiB, of {rows[0]['bytes_capacity'] / GIB:.4g} of memory"
    console.print(render(title, header, cells))
