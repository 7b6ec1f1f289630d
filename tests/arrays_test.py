"""Arrays that processes hand each other: as they were written, or refused by their file's name."""

import random

import numpy as np
import pytest

from expandr_jax.errors import UserError
from expandr_jax.files.arrays import read_arrays, write_arrays
from tests.beir_test import mutate, refusal

ARRAYS = {"scores": np.arange(12, dtype=np.float32).reshape(3, 4), "rows": np.arange(12)[::-1]}


def test_they_are_read_as_they_were_written(tmp_path):
    write_arrays(tmp_path / "found.npz", **ARRAYS, none=np.zeros((0, 7), np.float16))
    found = read_arrays(tmp_path / "found.npz")
    assert found.pop("none").shape == (0, 7)
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_what_is_damaged_is_named(tmp_path):
    path, rng, refused = tmp_path / "found.npz", random.Random(0), 0
    write_arrays(path, **ARRAYS)
    data = path.read_bytes()
    for number in range(300):
        at = rng.randrange(len(data))
        flipped = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        path.write_bytes(mutate(data, rng) if number % 2 else flipped)
        if said := refusal(read_arrays, path):
            refused += 1
            assert said.startswith(f"{path}: ")
        else:  # Dates and the like were changed.
            found = read_arrays(path)
            assert all(np.array_equal(found[name], array) for name, array in ARRAYS.items())
    assert refused > 150
    path.unlink()
    with pytest.raises(UserError, match=r"found\.npz: cannot read it: No such file"):
        read_arrays(path)
    with pytest.raises(UserError, match=r"absent.*: cannot write it: No such file"):
        write_arrays(tmp_path / "absent" / "found.npz", **ARRAYS)
