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
from expandr_jax.data.records import read_jsonl, write_text
from expandr_jax.errors import UserError
from train.launch import launch

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
        for system, scores in _sample_values(workdir).items():
            column = values[system].setdefault("sample 1/rank", [])
            column.append([scores[query] for query in queries])
    arrays = {
        system: {measure: np.array(rows) for measure, rows in columns.items()}
        for system, columns in values.items()
    }
    return arrays, len(first[0])


def _sample_values(workdir: pathlib.Path) -> dict[str, dict[str, float]]:
    """System -> test query -> mean 1 / rank of the right document over its single samples."""
    fields = {"query_id": str, "split": str, "system": str, "reciprocal_rank": float}
    collected: dict[str, dict[str, list[float]]] = {}
    for _, row in read_jsonl(workdir / "evaluation" / "samples.jsonl", fields):
        if row["split"] == "test":
            by_query = collected.setdefault(row["system"], {})
            by_query.setdefault(row["query_id"], []).append(row["reciprocal_rank"])
    return {
        system: {query: float(np.mean(several)) for query, several in by_query.items()}
        for system, by_query in collected.items()
    }


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
    name, pair = "sample 1/rank", (reference, f"{reference}-base-generator")
    if all(name in values.get(system, {}) for system in pair):
        ours, theirs = (values[system][name].mean(axis=0) for system in pair)
        test = metrics.paired_test(ours, theirs)
        lines += [
            "",
            f"1 / rank of the right document for a single fresh passage searched on its own: "
            f"{ours.mean():.4f} trained generator, {theirs.mean():.4f} untrained; difference "
            f"{test['difference']:+.4f}, p {test['p_value']:.2g}",
        ]
    return "\n".join(lines) + "\n"


def _rows(workdir: pathlib.Path) -> list[dict[str, Any]]:
    return json.loads((workdir / "results.json").read_text(encoding="utf-8"))["rows"]


def main(arguments: Sequence[str]) -> None:
    workdirs = [pathlib.Path(argument) for argument in arguments[1:]]
    if not workdirs:
        raise UserError("no runs given: python -m eval.seeds WORKDIR [WORKDIR ...]")
    text = table(workdirs, flags.FLAGS.system)
    Console(highlight=False, soft_wrap=True).print(text, markup=False)
    if flags.FLAGS.out:
        write_text(pathlib.Path(flags.FLAGS.out), text)


def define_flags() -> None:
    flags.DEFINE_string("system", "expandr", "The system that the others are compared with.")
    flags.DEFINE_string("out", "", "Also write the table to this Markdown file.")


if __name__ == "__main__":
    launch(main, define_flags, words=True)
