"""How much data a run has at its full size, as the programs that look ahead are told."""

import dataclasses
from collections.abc import Mapping, Sequence

from absl import flags

from expandr_jax.config import Config
from expandr_jax.errors import UserError
from expandr_jax.planning.synthetic import Counts

# The paper's run, and MS MARCO's passages, where a config has no limit and nothing is said.
PAPER_COUNTS = Counts(
    documents=8_841_823, retriever_train=637_866, generator_train=100_000, dev=1000, test=1000
)


def full_counts(config: Config, given: Mapping[str, int | None]) -> Counts:
    """What a run of the config has: what is given, else its own limits, else the paper's."""
    counts = dataclasses.asdict(PAPER_COUNTS)
    for name in counts:
        limit = getattr(config.data, f"max_{name}", 0)
        counts[name] = given.get(name) or limit or counts[name]
    return Counts(**counts)


def told_counts(config: Config) -> Counts:
    """`full_counts` with the numbers that flags give."""
    return full_counts(
        config, {name: flags.FLAGS[name].value for name in dataclasses.asdict(PAPER_COUNTS)}
    )


def counts_of_tests(paths: Sequence[str], given: Sequence[str], own: Counts) -> list[Counts]:
    """Documents and test queries of each of `data.tests`.

    Args:
        paths: What `data.tests` has.
        given: Documents of each, or one number for all; (): as many as the run's own data have.
        own: These data, as which queries are counted.

    Raises:
        UserError: What is given is not a number for each, nor one for all.
    """
    numbers = [*given] or [str(own.documents)]
    wanted = {1, len(paths)} if paths else {0}
    if (given and len(given) not in wanted) or not all(n.isdecimal() and int(n) for n in numbers):
        raise UserError(
            f"--test_documents={','.join(given)}: expected a number above 0 for each of "
            f"data.tests, of which there are {len(paths)}, or one for all"
        )
    numbers *= len(paths) // len(numbers)
    return [Counts(int(number), 0, 0, 0, own.test) for number in numbers]


def define_counts() -> None:
    """Defines a flag for each number, and for the memory and the disk of a host."""
    flags.DEFINE_float("host_memory", 192.0, "GiB of a host; 192 has one of 4 v5e chips.")
    flags.DEFINE_float("disk", None, "GiB of a host's disk; any, if not given.", lower_bound=0)
    for name, number in dataclasses.asdict(PAPER_COUNTS).items():
        what = "Documents" if name == "documents" else f"Queries, {name.replace('_', ' ')}"
        limit = "" if name == "documents" else f"the config's data.max_{name}, or "
        flags.DEFINE_integer(
            name, None, f"{what}, in all; if not given: {limit}{number}.", lower_bound=1
        )
