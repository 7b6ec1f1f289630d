"""One table from several seeds: `python -m eval.seeds runs/pydoc-0 runs/pydoc-1 runs/pydoc-2`.

The runs must have the same test queries and, but for the seed, the same config. Systems are
compared by two paired t-tests. The one over queries, each with its mean over the runs, asks whether
these trainings differ on other queries; seeds are not counted as new queries. The one over runs,
each with its mean over the queries, asks whether other trainings would differ on these queries.
The interval is the percentile bootstrap's of the mean difference, over queries as the first test.
"""

import collections
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

from eval.cells import other_settings
from eval.checks import read_results
from expandr_jax import metrics
from expandr_jax.data.beir import Qrels
from expandr_jax.errors import UserError
from expandr_jax.files.records import write_text
from expandr_jax.metrics import METRICS
from expandr_jax.ranking.samples import (
    RANK,
    REWARD,
    SAMPLE_METRICS,
    mean_by_query,
    read_samples,
)
from expandr_jax.report.tables import render
from expandr_jax.runtime.formats import read_record
from expandr_jax.runtime.progress import plain_console
from train.launch import launch

SAMPLES = {
    RANK: "1 / rank of the relevant document for a single fresh passage searched on its own",
    REWARD: "Reward in the corpus (reward.corpus_measure) of a single fresh passage",
}
SeedValues = Mapping[str, Mapping[str, np.ndarray]]  # system -> measure -> [runs, queries]


def read_runs(workdirs: Sequence[pathlib.Path]) -> tuple[SeedValues, dict[str, Any]]:
    """Per-query values of every system in every run, and results.json of the first.

    Raises:
        UserError: A run is not finished or damaged, two have the same seed, or they differ in
            settings, queries, judgements or systems.
    """
    _check_configs(workdirs)
    values = collections.defaultdict(lambda: collections.defaultdict(list))
    first: tuple[Qrels, set[str]] | None = None
    for workdir in workdirs:
        results, qrels, found = read_results(workdir)
        queries = sorted(qrels)
        if first is None:
            first, told = (qrels, set(found)), results
        elif first != (qrels, set(found)):
            raise UserError(
                f"{workdir}: has other test queries, judgements or systems than {workdirs[0]}"
            )
        for system, of in found.items():
            for measure, scores in of.items():
                values[system][measure].append(scores)
        samples = read_samples(workdir / "evaluation" / "samples.jsonl")
        for system in sorted({row["system"] for row in samples}):
            for field, measure in SAMPLE_METRICS.items():
                if scores := mean_by_query(samples, system, "test", field):
                    if missing := set(queries) - set(scores):
                        raise UserError(
                            f"{workdir / 'evaluation' / 'samples.jsonl'}: nothing of {system} for "
                            f"query {min(missing)}; run train.joint again, which makes it anew"
                        )
                    values[system][measure].append([scores[query] for query in queries])
    for system, measure in ((s, m) for s, of in values.items() for m in of):
        if len(values[system][measure]) < len(workdirs):
            raise UserError(
                f"evaluation/samples.jsonl has nothing of {system} in some of the runs; run "
                "train.joint again, which makes it anew"
            )
    arrays = {
        system: {measure: np.array(rows) for measure, rows in columns.items()}
        for system, columns in values.items()
    }
    return arrays, told


def _check_configs(workdirs: Sequence[pathlib.Path]) -> None:
    """Refuses what is no finished run, and runs that do not differ by their seed alone."""
    seeds: dict[str, pathlib.Path] = {}
    first: dict[str, Any] = {}
    for workdir in workdirs:
        if not (workdir / "results.json").exists():
            raise UserError(f"{workdir}: not a finished run; it has no results.json")
        config = read_record(workdir / "config.json")
        if "seed" not in config:
            raise UserError(f"{workdir / 'config.json'}: not a run's config: it has no seed")
        seed = repr(config.pop("seed"))
        if (other := seeds.setdefault(seed, workdir)) != workdir:
            raise UserError(f"{workdir}: has the seed of {other}; it would count twice")
        first = first or config
        for name, before, now in other_settings(first, config):
            raise UserError(
                f"{workdir}: {name} is {now!r}, in {workdirs[0]} {before!r}; expected runs that "
                "differ by their seed alone"
            )


def table(workdirs: Sequence[pathlib.Path], reference: str) -> str:
    """Markdown: means over runs and queries, spread over runs, and tests against `reference`."""
    values, results = read_runs(workdirs)
    if reference not in values:
        raise UserError(f"no system {reference!r}; there are {', '.join(sorted(values))}")
    rows, queries = [], values[reference][METRICS[0]].shape[1]
    for system in (row["system"] for row in results["rows"]):
        cells = []
        for measure in METRICS:
            means = values[system][measure].mean(axis=1)
            spread = means.std(ddof=1) if len(means) > 1 else 0.0
            cells.append(f"{means.mean():.4f} ({spread:.4f})")
        last = [""] * 4
        if system != reference:
            ours, theirs = (values[name][METRICS[0]] for name in (reference, system))
            test = metrics.paired_test(ours.mean(axis=0), theirs.mean(axis=0))
            low, high = metrics.bootstrap_interval(ours.mean(axis=0) - theirs.mean(axis=0))
            last = [f"{test['difference']:+.4f}", f"{low:+.4f} to {high:+.4f}"]
            last += [f"{test['p_value']:.2g}", ""]
            if len(workdirs) > 1:
                test = metrics.paired_test(ours.mean(axis=1), theirs.mean(axis=1))
                last[3] = f"{test['p_value']:.2g}"
        rows.append([system, *cells, *last])
    title = (
        f"{results.get('dataset')}, {queries} test queries, {len(workdirs)} runs: mean (standard "
        f"deviation over runs); {reference} against the row: the bootstrap's interval, over "
        "queries, and paired t-tests over queries and over runs"
    )
    difference = f"difference in {METRICS[0]}"
    header = ["system", *METRICS, difference, "95 %", "p, queries", "p, runs"]
    text = render(title, header, rows, "markdown")
    pair = reference, f"{reference}-base-generator"
    for field, measure in SAMPLE_METRICS.items():
        if all(measure in values.get(system, {}) for system in pair):
            ours, theirs = (values[system][measure].mean(axis=0) for system in pair)
            test = metrics.paired_test(ours, theirs)
            text += (
                f"\n{SAMPLES[field]}: {ours.mean():.4f} trained generator, {theirs.mean():.4f} "
                f"untrained; difference {test['difference']:+.4f}, p {test['p_value']:.2g}\n"
            )
    return text


def main(arguments: Sequence[str]) -> None:
    workdirs = [pathlib.Path(argument) for argument in arguments[1:]]
    if not workdirs:
        raise UserError("no runs given: python -m eval.seeds WORKDIR [WORKDIR ...]")
    if len({workdir.resolve() for workdir in workdirs}) < len(workdirs):
        raise UserError("a run is named twice; it would count as two")
    text = table(workdirs, flags.FLAGS.system)
    plain_console(soft_wrap=True).print(text)
    if flags.FLAGS.out:
        write_text(pathlib.Path(flags.FLAGS.out), text)


def define_flags() -> None:
    flags.DEFINE_string("system", "expandr", "The system that the others are compared with.")
    flags.DEFINE_string("out", "", "Also write the table to this Markdown file.")


if __name__ == "__main__":
    launch(main, define_flags, words=True)
