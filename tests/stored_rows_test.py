"""Rows and step B's examples on disk: what is read back, and what is held."""

import errno
import gc
import os
import tracemalloc
from array import array

import pytest

from expandr_jax.errors import UserError
from expandr_jax.files import stored_rows
from expandr_jax.files.stored_rows import Picked, StoredRows
from expandr_jax.objectives import stored_responses
from expandr_jax.objectives.packing import Example
from expandr_jax.objectives.stored_responses import StoredResponses, pack_responses

ROWS = [{"text": "π\n", "number": 0.1}, {}, {"list": [None, -1]}, {"half": "\ud800"}]


def test_rows_and_some_of_them_are_as_they_were():
    rows = StoredRows(iter(ROWS), "rows")
    assert [*rows] == ROWS
    assert (len(rows), rows[-1], [*rows[1:3]]) == (4, ROWS[-1], ROWS[1:3])
    some = Picked(rows, array("q", [3, 0, 2]))
    assert [*some] == [ROWS[3], ROWS[0], ROWS[2]]
    assert [*some[::-1][:2]] == [ROWS[2], ROWS[0]]
    assert (some[-1], len(some), bool(Picked(rows, []))) == (ROWS[2], 3, False)
    assert [*StoredRows([], "rows")] == []
    assert [*Picked([[1], [2, 3], []], range(3), len)[1:]] == [2, 0]
    with pytest.raises(IndexError):
        rows[4]


def test_a_file_of_rows_has_their_bytes_and_is_closed_with_them():
    rows = StoredRows([{"text": "глубина " * 100}], "rows")
    file = rows._file
    assert os.fstat(file.fileno()).st_size < 1600  # Escaped it would be 4,300.
    del rows
    gc.collect()
    assert file.closed


@pytest.mark.parametrize("extras", [{}, {"weight": 0.1, "other": -2.0}])
def test_examples_are_as_they_were(extras):
    parts = [([5], [[1], [2, 3]]), ([], [[7, 8, 9]]), ([2**31 - 1, 0], [[4], [], [6]])]
    examples = [
        Example(array("i", prompt), [array("i", r) for r in responses], extras, f"ä {number}\ud800")
        for number, (prompt, responses) in enumerate(parts)
    ]
    blocks = [examples[:2], [], examples[2:]]
    stored = StoredResponses(map(pack_responses, blocks), [*extras])
    assert [*stored] == examples
    assert [example.name for example in stored] == [example.name for example in examples]
    assert [example.ids for example in stored[::-1]] == [[p, *r] for p, r in parts[::-1]]
    assert stored[-1].size == examples[-1].size
    assert [*StoredResponses([])] == []


def test_what_is_held_of_an_example_and_a_row_does_not_grow_with_them():
    held = []
    for length in (10, 1000):
        tracemalloc.start()
        kept = (
            StoredRows(({"text": "word " * length} for _ in range(100)), "rows"),
            StoredResponses(
                pack_responses([Example([1] * length, [[2] * length])]) for _ in range(100)
            ),
        )
        held.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        assert [len(part) for part in kept] == [100, 100]
    assert held[1] - held[0] < 1000


@pytest.mark.parametrize(
    ("module", "make"),
    [(stored_rows, lambda: StoredRows([{}], "pairs")),
     (stored_responses, lambda: StoredResponses([pack_responses([Example([1], [[2]])])]))],
)  # fmt: skip
def test_a_full_disk_is_told_in_a_line(monkeypatch, module, make):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.tempfile, "TemporaryFile", full)
    with pytest.raises(UserError, match=r"cannot write .*: No space left on device; make room"):
        make()
