"""Writes what teaches a generator to order passages, from triples: those of a run, say.

    python -m train.orders --config=configs/listwise.py \\
        --triples=RUN/round-0/triples.jsonl --to=orders.jsonl

A line has a prompt, the better answer and a worse one, as pairs ("chosen", "rejected") and as
rewarded candidates: `train.generator` learns the same file by DPO or, with
--config.step_b=reward-sft, the better answers alone. What they ask is in
expandr_jax/ranking/orders.py; prompts are those of the rows `listwise:SYSTEM`, which the trained
generator then writes for.
"""

import collections
import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from absl import flags
from rich.console import Console

from expandr_jax.config import Config, read_config
from expandr_jax.data.triples import read_triples
from expandr_jax.errors import UserError
from expandr_jax.files.records import write_jsonl
from expandr_jax.ranking.listwise import ListPrompts, check_listwise
from expandr_jax.ranking.orders import ORDER, TASKS, order_rows
from expandr_jax.runtime.progress import Reporter, plain_console
from expandr_jax.weights.hf import load_generator
from train.launch import define_config, launch


def make_orders(
    config: Mapping[str, Any] | Config,
    triples: str | os.PathLike,
    to: pathlib.Path,
    console: Console,
    *,
    lists: int = 1,
    auxiliary: float = 1.0,
) -> dict[str, int]:
    """Writes the rows of `order_rows`.

    Args:
        config: As from configs/listwise.py, whose generator's tokenizer and chat template are used.
        triples: A file of them.
        to: The file to write.
        console: Where progress is shown.
        lists, auxiliary: As of `order_rows`.

    Returns:
        How many rows there are of each task.

    Raises:
        UserError: A file or a setting is wrong, or no query has negatives.
    """
    config, reporter = read_config(config), Reporter(console)
    settings, source = config.evaluation.listwise, config.generator
    check_listwise(settings)
    found, _ = read_triples(triples, config.data.on_bad)
    generator, _ = load_generator(source.source, sha256=source.sha256, in_files=True)
    generator = dataclasses.replace(generator, **source.chat)
    prompts = ListPrompts(generator, settings, source.prompt_buckets)
    counts: collections.Counter[str] = collections.Counter()

    def rows() -> Iterator[dict[str, Any]]:
        with reporter.progress("lists", len(found) * lists) as advance:
            for row in order_rows(
                found,
                lambda *asked: generator.chat_text(prompts.message(*asked)),
                window=settings.window,
                lists=lists,
                auxiliary=auxiliary,
                seed=config.seed,
            ):
                counts[row["task"]] += 1
                advance(row["task"] == ORDER)
                yield row
        if not counts:
            raise UserError(f"{triples}: no query has a negative; those that a run mined have some")

    write_jsonl(to, rows())
    told = ", ".join(f"{counts[task]} {task}" for task in TASKS)
    reporter.say(
        f"{to}: {told}; none is longer than dpo.prompt_length {prompts.longest} and "
        f"dpo.response_length {prompts.answer_tokens}"
    )
    return {task: counts[task] for task in TASKS}


def main(_: Any) -> None:
    values = flags.FLAGS
    for name in ("triples", "to"):
        if not values[name].value:
            raise UserError(f"--{name} is missing: a file of JSON lines")
    make_orders(
        values.config, values.triples, pathlib.Path(values.to), plain_console(soft_wrap=True),
        lists=values.lists, auxiliary=values.auxiliary,
    )  # fmt: skip


def define_flags() -> None:
    define_config("configs/listwise.py")
    flags.DEFINE_string("triples", None, "Queries with relevant passages and others.")
    flags.DEFINE_string("to", None, "The file to write; one that is there is replaced.")
    flags.DEFINE_integer("lists", 1, "Lists of a query.", lower_bound=1)
    flags.DEFINE_float("auxiliary", 1.0, "Share of lists of which two orders are compared, too.",
                       lower_bound=0.0, upper_bound=1.0)  # fmt: skip


if __name__ == "__main__":
    launch(main, define_flags)
