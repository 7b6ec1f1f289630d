"""Has a generator score the passages of triples: `python -m eval.teach --workdir=DIR`.

    python -m eval.teach --config=configs/quickstart.py --workdir=runs/teach \
        --config.data.path=triples.jsonl --config.generator.source=MODEL

reads triples as train.retriever does, a run's RUN/round-0/triples.jsonl among them, and asks the
generator, which may be a run's RUN/export/generator, for the log-likelihood of each query given
each passage. DIR/export/triples.jsonl has the same lines with "teacher_scores", which
train.retriever learns with contrastive.kl_weight above 0. Lines are read as they are needed and
scores written as they are made; the same command again goes on.
"""

import contextlib
import itertools
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from absl import flags
from rich.console import Console

from expandr_jax.config import Config, read_config
from expandr_jax.data.download import data_path
from expandr_jax.data.triples import stream_triples
from expandr_jax.errors import UserError
from expandr_jax.files.records import Journal, hash_file, read_jsonl, write_jsonl
from expandr_jax.loading import load_generator_model
from expandr_jax.objectives.query_likelihood import LikelihoodSettings, QueryLikelihood
from expandr_jax.pair import check_meshes, model_hashes
from expandr_jax.runtime.progress import Reporter, plain_console
from expandr_jax.runtime.run import Run
from train.launch import define_config, define_workdir, launch

AT_ONCE = 256  # Triples whose batches are made together, and are lost together by a kill.
TRIPLES_FILE = "export/triples.jsonl"


def teach(
    config: Mapping[str, Any] | Config,
    workdir: str | os.PathLike,
    settings: LikelihoodSettings,
    console: Console,
) -> pathlib.Path:
    """Scores the triples of data.path or data.url, or goes on; returns the file of them.

    Args:
        config: As from configs/; its `generator`, `mesh` and `data` are used.
        workdir, console: Where files and progress go.
        settings: How queries are scored.

    Raises:
        UserError: A line or a setting is wrong, or the file is another than when this began.
    """
    config = read_config(config)
    check_meshes(config.mesh, ("sampling", "dpo"))
    with contextlib.closing(Run(workdir, config, console)) as run:
        path = run.path(TRIPLES_FILE)
        with run.phase("data"):
            given = data_path(config.data, run.reporter)
            passages = sum(len(triple.passages) for triple in stream_triples(given))
            if not passages:
                raise UserError(
                    f'{given}: no triples; expected {{"query", "pos", "neg"}} on each line'
                )
            source = {"name": given.name, "sha256": hash_file(given), **vars(settings)}
            begun = run.noted(run.path("data", "SOURCE.json"), source)
            if other := [n for n in source if begun.get(n) != source[n]]:
                told = f"{other[0]} was {begun.get(other[0])!r} when this run began"
                raise UserError(f"{given}: {told}, now {source[other[0]]!r}; use a new --workdir")
        if not run.checksums.intact(TRIPLES_FILE):
            with run.phase("model"):
                model = load_generator_model(run.config)
                run.check_models(model_hashes(model))
            with run.phase("teacher"):
                journal = Journal(run.path("work", "teacher-scores.jsonl"))
                likelihood = QueryLikelihood(model, settings)
                _score(journal, likelihood, given, passages, run.reporter)
                rows = zip(read_jsonl(given, {}), journal.rows, strict=True)
                named = ({**row, "teacher_scores": s["teacher_scores"]} for (_, row), s in rows)
                write_jsonl(path, named)
            run.checksums.record(TRIPLES_FILE)
        console.print(f"triples: {run.where(path)}", soft_wrap=True)
    return path


def _score(
    journal: Journal,
    likelihood: QueryLikelihood,
    path: pathlib.Path,
    passages: int,
    reporter: Reporter,
) -> None:
    """Fills the journal of the scores of a file's triples, a row each in their order."""
    if not journal.finished and len(journal.rows) % AT_ONCE:
        # A block is made whole again, by the batches that it would have had.
        journal.keep(len(journal.rows) // AT_ONCE * AT_ONCE)
    left = stream_triples(path)
    before = sum(len(t.passages) for t in itertools.islice(left, len(journal.rows)))
    with reporter.progress("passages scored", passages, before) as advance:
        for block in iter(lambda: [*itertools.islice(left, AT_ONCE)], []):
            scores, cut = likelihood.scores(block, advance)
            rows = [{"teacher_scores": of, "cut": 0} for of in scores]
            rows[0]["cut"] = cut
            journal.append(rows)
    if not journal.finished:
        journal.finish()
    if cut := sum(row["cut"] for row in journal.rows):
        reporter.say(f"{cut} passages or queries were cut to their limits")


def main(_: Any) -> None:
    given = flags.FLAGS
    settings = LikelihoodSettings(
        given.score == "mean", given.prompt_length, given.query_length, given.tokens_per_batch
    )
    teach(given.config, given.workdir, settings, plain_console(soft_wrap=True))


def define_flags() -> None:
    default = LikelihoodSettings()
    define_config("configs/quickstart.py")
    define_workdir()
    flags.DEFINE_enum("score", "mean", ("mean", "sum"), "A query's log-likelihood by token, so "
                      "that short and long queries are alike, or of all of it.")  # fmt: skip
    for name, least, what in (
        ("prompt_length", 64, "Tokens of a prompt with its passage, of which more are cut."),
        ("query_length", 1, "Tokens of a query, of which more are cut."),
        ("tokens_per_batch", 1, "Rows times length of a batch; TPUs want more."),
    ):
        flags.DEFINE_integer(name, getattr(default, name), what, lower_bound=least)


if __name__ == "__main__":
    launch(main, define_flags, resumes=True)
