"""The programs of a run, as shapes: what trainers call with arrays, `train.plan` compiles.

Each comes from the builder that the run uses; only the arguments are made here, and those by the
functions that make a run's batches. Batches, lengths and slots are the config's, too: what fits is
that config's run.
"""

import functools
from collections.abc import Callable

from expandr_jax.config import Config
from expandr_jax.planning.planned import Planned, of_retriever_alone
from expandr_jax.planning.planned_encoding import scored_pairs, sparse_encoding
from expandr_jax.planning.planned_generator import GeneratorShapes
from expandr_jax.planning.planned_pairs import PairShapes
from expandr_jax.planning.planned_policy import PolicyShapes
from expandr_jax.planning.planned_retriever import RetrieverShapes
from expandr_jax.planning.topology import Topology
from expandr_jax.ranking.listwise import LISTWISE
from expandr_jax.ranking.rerank import RERANKERS
from expandr_jax.ranking.systems import SPLADE, parse_systems
from expandr_jax.weights.sparse_encoder import SPLADE_POOLING

MakePlanned = Callable[[], Planned]


def step_b_shapes(config: Config) -> type[PairShapes] | type[PolicyShapes]:
    """What makes the programs of a config's step B."""
    return PolicyShapes if config.step_b_kind.on_policy else PairShapes


def planned_programs(config: Config, topology: Topology) -> dict[str, MakePlanned]:
    """Every program of a run, by name; each is made when it is asked for.

    The run is `train.retriever`'s where `of_retriever_alone` says so, and else `train.joint`'s.

    Raises:
        UserError: A model's shape cannot be found; when a program is made, also if its mesh does
            not fit the devices or the workload.
    """
    retriever = RetrieverShapes(config, topology)
    if of_retriever_alone(config):
        return _of_retriever(config, retriever)
    generator = GeneratorShapes(config, topology)
    both = retriever.resident, generator.resident
    step = step_b_shapes(config)(config, topology, generator)
    rewarding = *both, step.held
    training = retriever.beside_training, generator.resident
    programs = {
        "contrastive step": _beside(retriever.contrastive, *training),
        "corpus encoding": _beside(retriever.encoding, *rewarding),
        "prefill": _beside(generator.prefill, *both),
        "prompts to slots": _beside(generator.insert, *both),
        "decode": _beside(generator.decode, *both),
        **{name: _beside(make, *both) for name, make in step.sampling().items()},
        # The base that is held is their own argument.
        **{name: _beside(make, retriever.resident) for name, make in step.learning().items()},
        "exact search": _beside(retriever.search, *rewarding),
        "rewards": _beside(lambda: retriever.rewards(step.rewarded_rows), *rewarding),
        "retriever restored": _beside(retriever.restore, *training),
        "adapter restored": _beside(step.restore, *both),
        "base to the engine": _beside(generator.to_engine, *both),
        "adapter merged for export": _beside(generator.merge, *both),
    }
    if config.contrastive.lora.rank:
        programs["retriever merged for export"] = _beside(retriever.merge, *both)
    if config.distill.epochs:
        programs["distillation step"] = _beside(retriever.distillation, *training)
    if config.figret.rank:
        programs["FiGRet step"] = _beside(retriever.figret, *training)
    systems = parse_systems(config.evaluation.systems)
    stages = {part.stage for system in systems for part in system.with_parts()}
    if LISTWISE in stages:
        programs |= {name: _beside(make, *both) for name, make in generator.lists().items()}
    for stage in RERANKERS.keys() & stages:
        scored = functools.partial(scored_pairs, config, stage, topology)
        programs[f"pairs scored by {stage}"] = _beside(scored, *both)
    if any(SPLADE in system.retrievers for system in systems):
        programs["sparse encoding"] = _beside(lambda: sparse_encoding(config, topology), *both)
    if generator.gathers:
        programs["base to every host"] = _beside(generator.gather, *both)
    if retriever.gathers:
        programs["retriever to every host"] = _beside(retriever.gather, *both)
    return programs


def _of_retriever(config: Config, retriever: RetrieverShapes) -> dict[str, MakePlanned]:
    """The programs of a run that trains a retriever and nothing else."""
    programs = {"LLaRA step": retriever.llara} if config.llara.epochs else {}
    programs |= {"contrastive step": retriever.contrastive, "retriever restored": retriever.restore}
    programs = {name: _beside(make, retriever.beside_training) for name, make in programs.items()}
    others = {"corpus encoding": retriever.encoding}
    if retriever.retriever.pooling != SPLADE_POOLING:  # Sparse vectors are searched on the host.
        others["exact search"] = retriever.search
    if config.contrastive.lora.rank:
        others["retriever merged for export"] = retriever.merge
    if retriever.gathers:
        others["retriever to every host"] = retriever.gather
    return programs | {name: _beside(make, retriever.resident) for name, make in others.items()}


def _beside(make: MakePlanned, *held: Callable[[], int]) -> MakePlanned:
    """Makes a program beside so many bytes of a device that a run holds."""
    return lambda: make().beside(sum(part() for part in held))
