"""A row a stage of what hosts have of a run, and the sizes and rates that rows are reckoned by."""

import dataclasses
from collections.abc import Sequence

from expandr_jax.runtime.chips import GIB

# Bytes.
PROCESS_BYTES = GIB  # What a process begins with: libraries, and the programs that it has compiled.
TOKEN_BYTES = 5  # A token as text.
NUMBER = 36  # A token's number in a list.
# Step A's text in files, beside its tokens: where it ends, its hash and score; and an example: its
# counts, where its parts begin, and how easy it is.
STORED_TEXT, STORED_EXAMPLE = 24, 48
WORKER = GIB / 8  # What a process that makes batches begins with: 104 MiB of its own were measured.
ENTRY = 300  # A text beside its letters, with its id and its place in a mapping.
LISTED = 100  # A query's list or array of numbers, beside these.
LINE = 200  # A line of JSON beside its text.
INDEX = 80  # A text in a journal, while it is put in order.
DOCUMENT_BYTES = 40  # A document, while its store is written.
FOUND = 60  # A line of a ranking, and half of what it is in memory.
CHECKPOINT_FILES = 16  # In a checkpoint, for each process.
# Components of a text in a sparse index, or different words in BM25's: an estimate, as if half of
# the 512 tokens of a long text were words that had not stood in it before.
TERMS = 256
LENGTH = 512  # Tokens of those texts whose seconds are known.
# Seconds of one core, for a thousand of each, of so many tokens: `python -m tests.host_rates`.
CORE_SECONDS = {
    "document read": 0.03, "text encoded": 0.35, "text sampled": 0.06, "example": 1.1,
    "example kept": 0.04,
    "candidate rewarded": 0.03, "query ranked": 0.23, "MB exported": 0.71,
    "text in BM25": 0.23, "vector indexed": 0.13,  # 768 numbers, among 480,000 vectors.
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class HostRow:
    """A stage of a run, as its hosts have it.

    Attributes:
        stage: Its name.
        bytes_memory: What a process needs at most.
        bytes_disk: That it adds to the workdir.
        bytes_scratch: That it needs of a disk besides, until it is over.
        files: That it adds to the workdir.
        bytes_network: That the host which fetches most has from others, in all.
        seconds: In no compiled program.
        bytes_capacity: Memory of a host.
    """

    stage: str
    bytes_memory: float
    bytes_disk: float
    bytes_scratch: float
    files: int
    bytes_network: float
    seconds: float
    bytes_capacity: float

    @property
    def fits(self) -> bool:
        return self.bytes_memory <= self.bytes_capacity


class Stages:
    """Makes the rows, of which each holds what all do.

    Args:
        held: Bytes that a process holds all the time.
        hosts: How many there are.
        memory: Bytes that each has.
    """

    def __init__(self, held: float, hosts: int, memory: float):
        self.rows: list[HostRow] = []
        self.hosts, self._held, self._memory = hosts, held, memory

    def add(
        self,
        stage: str,
        *,
        memory: float = 0,
        disk: float = 0,
        scratch: float = 0,
        files: int = 0,
        network: float = 0,
        seconds: float = 0,
    ) -> None:
        """`network` is what a host fetches that has nothing yet; with one host nothing is."""
        network *= (self.hosts - 1) / self.hosts
        values = self._held + memory, disk, scratch, files, network, seconds, self._memory
        self.rows.append(HostRow(stage, *values))

    def add_together(self, stage: str, rows: Sequence[HostRow]) -> None:
        """One stage of all of some rows of `Stages` that held nothing."""
        left, most = 0.0, 0.0
        for row in rows:
            left += row.bytes_disk
            most = max(most, left + row.bytes_scratch)
        memory = self._held + max(row.bytes_memory for row in rows)
        files, network, seconds = (
            sum(getattr(row, name) for row in rows)
            for name in ("files", "bytes_network", "seconds")
        )
        values = memory, left, most - left, files, network, seconds, self._memory
        self.rows.append(HostRow(stage, *values))

    def add_sampled(
        self, stage: str, texts: int, tokens: int, copies: int = 1, held: float = 0
    ) -> None:
        """A stage whose texts are divided, and end in a journal; `copies`: files with all.

        What each process wrote lies beside the journal while process 0 puts it together, and all
        wait for that. `held`: what else of memory each has.
        """
        size = texts * (tokens * TOKEN_BYTES + LINE)
        self.add(stage, memory=held + INDEX * texts, disk=copies * size, scratch=size, files=copies,
                 network=size, seconds=CORE_SECONDS["text sampled"] * texts / 1000)  # fmt: skip
