"""The programs of a run, as shapes: what `train.joint` calls with arrays, `train.plan` compiles.

Each comes from the builder that the run uses; only the arguments are made here, and those by the
functions that make a run's batches. The workload is the same for every config, so that "fits" and
a time mean the same; model, meshes, types, micro-batch and recomputation are the config's.
"""

from collections.abc import Callable

from expandr_jax.config import Config
from expandr_jax.planning.planned import Planned
from expandr_jax.planning.planned_generator import GeneratorShapes
from expandr_jax.planning.planned_policy import POLICY_DECODE, PolicyShapes
from expandr_jax.planning.planned_retriever import RetrieverShapes
from expandr_jax.planning.topology import Topology


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
    rewarding = both
    if config.step_b == "grpo":
        policy = PolicyShapes(config, topology, generator)
        # Texts are rewarded, and learned from, while the engine waits for the next step.
        rewarding = (*both, policy.engine_bytes, policy.state_bytes)
        restore = policy.restore
        learning = {
            POLICY_DECODE: beside(policy.decode, *both, policy.state_bytes),
            **{
                name: beside(make, retriever.resident, policy.engine_bytes)
                for name, make in policy.learning().items()
            },
        }
    else:
        restore = generator.restore
        # The base that is held is their own argument.
        learning = {
            "reference log-probabilities": beside(generator.reference, retriever.resident),
            "DPO step": beside(generator.dpo, retriever.resident),
        }
    programs = {
        "contrastive step": beside(
            retriever.contrastive, retriever.beside_training, generator.resident
        ),
        "corpus encoding": beside(retriever.encoding, *rewarding),
        "prefill": beside(generator.prefill, *both),
        "decode": beside(generator.decode, *both),
        **learning,
        "exact search": beside(retriever.search, *rewarding),
        "rewards": beside(retriever.rewards, *rewarding),
        "retriever restored": beside(
            retriever.restore, retriever.beside_training, generator.resident
        ),
        "adapter restored": beside(restore, *both),
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
