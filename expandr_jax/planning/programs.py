"""The programs of a run, as shapes: what `train.joint` calls with arrays, `train.plan` compiles.

Each comes from the builder that the run uses; only the arguments are made here, and those by the
functions that make a run's batches. The workload is the same for every config, so that "fits" and
a time mean the same; model, meshes, types, micro-batch and recomputation are the config's.
"""

from collections.abc import Callable

from expandr_jax.config import Config
from expandr_jax.planning.planned import Planned
from expandr_jax.planning.planned_generator import GeneratorShapes
from expandr_jax.planning.planned_pairs import PairShapes
from expandr_jax.planning.planned_policy import PolicyShapes
from expandr_jax.planning.planned_retriever import RetrieverShapes
from expandr_jax.planning.topology import Topology


def step_b_shapes(config: Config) -> type[PairShapes] | type[PolicyShapes]:
    """What makes the programs of a config's step B."""
    return PolicyShapes if config.step_b_kind.on_policy else PairShapes


def planned_programs(config: Config, topology: Topology) -> dict[str, Callable[[], Planned]]:
    """Every program of a run, by name; each is made when it is asked for.

    Raises:
        UserError: A model's shape cannot be found; when a program is made, also if its mesh does
            not fit the devices or the workload.
    """
    retriever, generator = RetrieverShapes(config, topology), GeneratorShapes(config, topology)

    def beside(make: Callable[[], Planned], *held: Callable[[], int]) -> Callable[[], Planned]:
        return lambda: make().beside(sum(part() for part in held))

    both = retriever.resident, generator.resident
    step = step_b_shapes(config)(config, topology, generator)
    rewarding = *both, step.held
    programs = {
        "contrastive step": beside(
            retriever.contrastive, retriever.beside_training, generator.resident
        ),
        "corpus encoding": beside(retriever.encoding, *rewarding),
        "prefill": beside(generator.prefill, *both),
        "decode": beside(generator.decode, *both),
        **{name: beside(make, *both) for name, make in step.sampling().items()},
        # The base that is held is their own argument.
        **{name: beside(make, retriever.resident) for name, make in step.learning().items()},
        "exact search": beside(retriever.search, *rewarding),
        "rewards": beside(lambda: retriever.rewards(step.rewarded_rows), *rewarding),
        "retriever restored": beside(
            retriever.restore, retriever.beside_training, generator.resident
        ),
        "adapter restored": beside(step.restore, *both),
        "base to the engine": beside(generator.to_engine, *both),
        "adapter merged, to export": beside(generator.merge, *both),
    }
    if config.distill.epochs:
        programs["distillation step"] = beside(
            retriever.distillation, retriever.beside_training, generator.resident
        )
    if generator.gathers:
        programs["base to every host"] = beside(generator.gather, *both)
    if retriever.gathers:
        programs["retriever to every host"] = beside(retriever.gather, *both)
    return programs
