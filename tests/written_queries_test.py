"""Queries that a generator writes for documents, and the file that they are kept in."""

import io
import types

from rich.console import Console

from configs import base
from expandr_jax.config import read_config
from expandr_jax.data.beir import Collection
from expandr_jax.data.generated import EMPTY, REPEATED, TESTED
from expandr_jax.data.training_data import TrainingData
from expandr_jax.expansion.written_queries import generated_queries, write_queries
from expandr_jax.files.records import read_jsonl
from expandr_jax.runtime.processes import Processes
from expandr_jax.runtime.progress import Reporter

WRITTEN = {
    "d0": "Questions:\n1. How are gradients clipped?\n2. Or?",
    "d1": "How is a LIST sorted?",
    "d2": "what pads an array?",
    "d3": "",
}
COLLECTION = Collection(
    "toy", {name: f"all of {name}" for name in WRITTEN}, {"q0": "how is a list sorted"},
    {"train": {"q0": {"d1": 1}}},
)  # fmt: skip


class Writer:
    """Writes `WRITTEN`, and notes what it is asked."""

    processes = Processes()
    generator = types.SimpleNamespace(opens_thought=False)

    def __init__(self):
        self.asked, self.output = [], io.StringIO()
        self.reporter = Reporter(Console(file=self.output, width=200))

    def fits(self, message):
        return True

    def generate(self, adapter, _, requests):
        assert adapter is None  # By the generator before training.
        for request in requests:
            self.asked.append(request.prompt)
            completion = types.SimpleNamespace(
                id=request.id, sample=request.sample, tokens=[1], finished="eos", near_ties=0,
                log_probs=None,
            )  # fmt: skip
            yield completion, WRITTEN[request.id.rpartition("/")[2]]


def test_queries_are_written_once_and_a_damaged_file_again(tmp_path):
    data, path = TrainingData(COLLECTION, ["q0"], []), tmp_path / "queries.jsonl"

    def write(tested, characters=100):
        writer = Writer()
        write_queries(
            data, writer, read_config(base.get_config()).expansion, lambda: tested, documents=4,
            each=1, most_characters=characters, seed=0, journal=tmp_path / "texts.jsonl", path=path,
        )  # fmt: skip
        return writer

    assert generated_queries(path) == {}
    writer = write({"What pads an array"}, characters=6)
    assert len(writer.asked) == 4
    assert all("all of" in asked and "all of d" not in asked for asked in writer.asked)
    rows = [row for _, row in read_jsonl(path, {"query_id": str})]
    assert [[*row.values()] for row in rows] == [
        ["d2q/d0/0", "d0", "How are gradients clipped?", ""],
        ["d2q/d1/0", "d1", "How is a LIST sorted?", REPEATED],
        ["d2q/d2/0", "d2", "what pads an array?", TESTED],
        ["d2q/d3/0", "d3", "", EMPTY],
    ]
    told = "; ".join(f"1 left out: {why}" for why in sorted([REPEATED, TESTED, EMPTY]))
    assert f"  1 queries written for 4 documents; {told}\n" in writer.output.getvalue()
    assert generated_queries(path) == {"d2q/d0/0": "How are gradients clipped?"}

    before = path.read_bytes()
    assert not write({"how are gradients clipped"}).asked
    assert path.read_bytes() == before  # What a run once took, it keeps.
    path.write_bytes(before[:-9])
    assert not write({"how are gradients clipped"}).asked
    assert generated_queries(path) == {"d2q/d2/0": "what pads an array?"}
