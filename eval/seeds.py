"""One table from several seeds: `python -m eval.seeds runs/pydoc-0 runs/pydoc-1 runs/pydoc-2`.

Each query's value is its mean over the runs, which must have the same test queries; systems are
then compared query by query with a paired t-test, so seeds are not counted as new queries.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags
from rich.console import Console

from eval.systems import MEASURES
from expandr_jax import metrics
from expandr_jax.data.records import write_text
from expandr_jax.errors import UserError
from expandr_jax.samples import MEASURES as SAMPLE_MEASURES
from expandr_jax.samples import RANK, REWARD, mean_by_query, read_samples
from train.launch import launch

SAMPLES = {
    RANK: "1 / rank of the right document for a single fresh passage searched on its own",
    REWARD: "Reward in the corpus (reward.corpus_measure) of a single fresh passage",
}
Values = Mapping[str, Mapping[str, np.ndarray]]  # system -> measure -> [runs, queries]


def read_runs(workdirs: Sequence[pathlib.Path]) -> tuple[Values, int]:
    """Per-query values of every system in every run, and the number of test queries.

    Raises:
        UserError: A run is not finished, or the runs differ in queries or systems.
    """
    values: dict[str, dict[str, list[list[float]]]] = {}
    first: tuple[set[str], set[str]] | None = None
    for workdir in workdirs:
        if not (workdir / "results.json").exists():
            raise UserError(f"{workdir}: not a finished run; it has no results.json")
        qrels = metrics.read_qrels(workdir / "qrels.trec")
        queries = sorted(qrels)
        systems = {path.stem for path in (workdir / "runs").glob("*.trec")}
        if first is None:
            first = set(queries), systems
        elif first != (set(queries), systems):
            raise UserError(f"{workdir}: has other test queries or systems than {workdirs[0]}")
        for system in systems:
            run = metrics.read_trec(workdir / "runs" / f"{system}.trec")
            for measure, scores in metrics.evaluate(run, qrels, MEASURES).items():
                column = values.setdefault(system, {}).setdefault(measure, [])
                column.append([scores[query] for query in queries])
        samples = read_samples(workdir / "evaluation" / "samples.jsonl")
        for system in {row["system"] for row in samples}:
            for field, measure in SAMPLE_MEASURES.items():
                if scores := mean_by_query(samples, system, "test", field):
                    column = values[system].setdefault(measure, [])
                    column.append([scores[query] for query in queries])
    arrays = {
        system: {measure: np.array(rows) for measure, rows in columns.items()}
        for system, columns in values.items()
    }
    return arrays, len(first[0])


def table(workdirs: Sequence[pathlib.Path], reference: str) -> str:
    """Markdown: means over runs and queries, spread over runs, and tests against `reference`."""
    values, queries = read_runs(workdirs)
    if reference not in values:
        raise UserError(f"no system {reference!r}; there are {', '.join(sorted(values))}")
    dataset = json.loads((workdirs[0] / "results.json").read_text(encoding="utf-8"))["dataset"]
    order = [row["system"] for row in _rows(workdirs[0])]
    lines = [
        f"{dataset}, {queries} test queries, {len(workdirs)} runs: mean (standard deviation over "
        f"runs); p: {reference} against the row, paired t-test over queries",
        "",
        f"| system | {' | '.join(MEASURES)} | difference in {MEASURES[0]} | p |",
        "|---|" + "---:|" * (len(MEASURES) + 2),
    ]
    for system in order:
        cells = []
        for measure in MEASURES:
            means = values[system][measure].mean(axis=1)
            spread = means.std(ddof=1) if len(means) > 1 else 0.0
            cells.append(f"{means.mean():.4f} ({spread:.4f})")
        ours, theirs = (values[name][MEASURES[0]].mean(axis=0) for name in (reference, system))
        test = metrics.paired_test(ours, theirs)
        last = (
            ["", ""]
            if system == reference
            else [f"{test['difference']:+.4f}", f"{test['p_value']:.2g}"]
        )
        lines.append(f"| {system} | {' | '.join([*cells, *last])} |")
    pair = reference, f"{reference}-base-generator"
    for field, measure in SAMPLE_MEASURES.items():
        if all(measure in values.get(system, {}) for system in pair):
            ours, theirs = (values[system][measure].mean(axis=0) for system in pair)
            test = metrics.paired_test(ours, theirs)
            lines += [
                "",
                f"{SAMPLES[field]}: {ours.mean():.4f} trained generator, {theirs.mean():.4f} "
                f"untrained; difference {test['difference']:+.4f}, p {test['p_value']:.2g}",
            ]
    return "\n".join(lines) + "\n"


def _rows(workdir: pathlib.Path) -> list[dict[str, Any]]:
    return json.loads((workdir / "results.json").read_text(encoding="utf-8"))["rows"]


def main(arguments: Sequence[str]) -> None:
    workdirs = [pathlib.Path(argument) for argument in arguments[1:]]
    if not workdirs:
        raise UserError("no runs given: python -m eval.seeds WORKDIR [WORKDIR ...]")
    if len({workdir.resolve() for workdir in workdirs}) < len(workdirs):
        raise UserError("a run is named twice; it would count as two")
    text = table(workdirs, flags.FLAGS.system)
    Console(highlight=False, soft_wrap=True).print(text, markup=False)
    if flags.FLAGS.out:
        write_text(pathlib.Path(flags.FLAGS.out), text)


def define_flags() -> None:
    flags.DEFINE_string("system", "expandr", "The system that the others are compared with.")
    flags.DEFINE_string("out", "", "Also write the table to this Markdown file.")


if __name__ == "__main__":
    launch(main, define_flags, words=True)
