"""FiGRet in a run: after its last round, an extra turn on queries that the retriever fails.

The trained generator writes easier passages for them, and the turn goes from easy to hard. Another
turn beside it, the control, has as many ordinary triples of the same queries in no order.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from expandr_jax.data.training_data import TrainingData
from expandr_jax.data.triples import Triple
from expandr_jax.files.records import read_jsonl
from expandr_jax.generation.sampler import Sampler
from expandr_jax.objectives.figret import easier_passages, find_failed, triple_of, write_easier
from expandr_jax.pair import Models
from expandr_jax.ranking.systems import FIGRET, FIGRET_CONTROL
from expandr_jax.runtime.run import Run
from expandr_jax.sharding import batch_divisor
from expandr_jax.vectors.corpus import CorpusRetriever
from train.encoding import run_retriever
from train.retriever import train_retriever


def figret(
    run: Run,
    models: Models,
    data: TrainingData,
    sampler: Sampler,
    ours: CorpusRetriever,
    adapter: Any,
) -> dict[str, CorpusRetriever]:
    """The retrievers after the turn and after the control's, by their rows.

    Writes round-R/figret.jsonl, the turn's triples.

    Args:
        run, models, data: The run, when all of its rounds are done.
        sampler: Writes, by the config's section `expansion`.
        ours: The trained retriever.
        adapter: The trained generator's.
    """
    config, round_name = run.config, f"round-{run.config.rounds - 1}"
    failed, name = f"work/{round_name}/figret-failed.jsonl", f"{round_name}/figret.jsonl"
    if not run.checksums.intact(failed):
        _ = ours.corpus  # All processes encode it, as a phase of its own.
        with run.phase("queries that fail"):
            limits = config.figret.rank, config.figret.queries
            drop = config.evaluation.drop_identical_ids
            find_failed(*limits, config.mining, drop, data, ours, run.path(failed))
        run.checksums.record(failed)
    own = _read(run.path(failed))
    run.reporter.say(f"{len(own)} queries have no relevant document above the rank")
    if not run.checksums.intact(name):
        with run.phase("easier passages"):
            path = run.path("work", round_name, "figret-texts.jsonl")
            most = config.answer.max_characters
            asked = config.expansion, most, sampler, adapter, own, path
            write_easier(ours, own, easier_passages(*asked) if own else {}, run.path(name))
        run.checksums.record(name)
    ours.release()
    given = _read(run.path(name))
    ids = [row["query_id"] for row in given]
    ordinary = {row["query_id"]: triple_of(row) for row in own}
    turns = {FIGRET: [*map(triple_of, given)], FIGRET_CONTROL: [ordinary[query] for query in ids]}
    retrievers = {}
    for row, triples in turns.items():
        params = _turn(run, models, ours.params, ids, triples, row)
        retrievers[row] = run_retriever(run, models, data.collection.corpus, params, row)
    return retrievers


def _read(path: pathlib.Path) -> list[dict[str, Any]]:
    return [row for _, row in read_jsonl(path, {"query_id": str})]


def _turn(
    run: Run, models: Models, start: Any, ids: Sequence[str], triples: Sequence[Triple], row: str
) -> Any:
    """A retriever's parameters after a turn on triples, the control's in no order."""
    config = run.config.contrastive
    unit = config.micro_batch or batch_divisor(models.contrastive_mesh)
    size = min(config.batch_size, len(triples) // unit * unit)
    if not size:
        run.reporter.say(f"{row}: {len(triples)} triples fill no batch; it is expandr's retriever")
        return start
    settings = dataclasses.replace(
        config,
        batch_size=size,
        negatives=max(1, config.negatives) * any(triple.negatives for triple in triples),
        curriculum=row == FIGRET,
        length_window=0,
    )
    phase = f"{row}-{run.config.rounds - 1}"
    with run.phase(row):
        return train_retriever(
            run, models, start, triples, phase=phase, round_=0, samples=0, ids=ids,
            settings=settings,
        )  # fmt: skip
