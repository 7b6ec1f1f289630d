"""200 seeded ways each of spoiling gates and a table's cells: a line, or they are read."""

import gzip
import random

from eval.cells import read_cell, write_cell
from expandr_jax.errors import UserError
from expandr_jax.ranking.gate import fit_gate, read_gates, write_gates
from expandr_jax.ranking.gate_features import BEFORE
from tests.beir_test import mutate
from tests.gate_test import drawn
from tests.mutations_test import check_complaint
from tests.table_test import cell  # noqa: F401


def refused_of(path, read, spoilt):
    """How many of 200 contents a reader refuses, each in one line that begins with the path."""
    refused = 0
    for number in range(200):
        path.write_bytes(spoilt(number))
        try:
            read(path)
        except UserError as error:
            refused += 1
            check_complaint(str(error), path)
    return refused


def test_a_spoilt_file_of_gates(tmp_path):
    path, rng = tmp_path / "gates.json", random.Random(0)
    write_gates(path, {BEFORE: fit_gate(*drawn(1, 64, told=3))})
    data = path.read_bytes()
    found = refused_of(path, lambda p: read_gates(p, [BEFORE]), lambda _: mutate(data, rng))
    assert found > 150, found


def test_a_spoilt_cell(cell, tmp_path):  # noqa: F811
    path, rng = tmp_path / "pydoc-seed-0.json.gz", random.Random(0)
    write_cell(path, cell)
    packed = path.read_bytes()
    whole = gzip.decompress(packed)

    def spoilt(number):
        return mutate(packed, rng) if number % 2 else gzip.compress(mutate(whole, rng), 1)

    found = refused_of(path, read_cell, spoilt)
    assert found > 120, found
