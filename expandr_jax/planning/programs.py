"""The programs of a run, as shapes: what `train.joint` calls with arrays, `train.plan` compiles.

Each comes from the builder that the run uses; only the arguments are made here, and those by the
functions that make a run's batches. The workload is the same for every config, so that "fits" and
a time mean the same; model, meshes, types, micro-batch and recomputation are the config's.
"""

import dataclasses
from collections.abc import Callable

from expandr_jax.config import Config
from expandr_jax.planning.planned import Planned
from expandr_jax.planning.planned_generator import GeneratorShapes
from expandr_jax.planning.planned_retriever import RetrieverShapes
from expandr_jax.planning.topology import Topology


def planned_programs(config: Config, topology: Topology) -> dict[str, Callable[[], Planned]]:
    """Every program of a run, by name; each is made when it is asked for.

    Raises:
        UserError: A model's shape cannot be found; when a program is made, also if its mesh does
            not fit the devices or the workload.
    """
    retriever, generator = RetrieverShapes(config, topology), GeneratorShapes(config, topology)

    def beside(
        make: Callable[[], Planned], *holders: RetrieverShapes | GeneratorShapes
    ) -> Callable[[], Planned]:
        def made() -> Planned:
            planned = make()
            held = planned.resident + sum(holder.resident() for holder in holders)
            return dataclasses.replace(planned, resident=held)

        return made

    programs = {
        "contrastive step": beside(retriever.contrastive, retriever, generator),
        "corpus encoding": beside(retriever.encoding, retriever, generator),
        "prefill": beside(generator.prefill, retriever, generator),
        "decode": beside(generator.decode, retriever, generator),
        # The base that is held is their own argument.
        "reference log-probabilities": beside(generator.reference, retriever),
        "DPO step": beside(generator.dpo, retriever),
        "exact search": beside(retriever.search, retriever, generator),
    }
    if generator.gathers:
        programs["base to every host"] = beside(generator.gather, retriever, generator)
    return programs
