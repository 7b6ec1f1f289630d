"""Checkpoints: what is saved comes back, and what is damaged is found and set aside."""

import jax.numpy as jnp
import numpy as np
import pytest

from expandr_jax.checkpoint import Checkpoints, hash_tree
from expandr_jax.errors import UserError

TREE = {"a": jnp.arange(6.0).reshape(2, 3), "b": {"c": jnp.array([1, 2], jnp.int32)}}
OTHER = {"a": TREE["a"] + 1, "b": {"c": TREE["b"]["c"]}}
IDENTITY = {"model": "x"}


def test_the_newest_step_comes_back_bit_for_bit(tmp_path):
    checkpoints = Checkpoints(tmp_path, IDENTITY)
    assert checkpoints.restore(TREE) is None
    checkpoints.save(1, TREE)
    checkpoints.save(2, OTHER)
    step, tree = Checkpoints(tmp_path, IDENTITY).restore(TREE)
    assert step == 2
    np.testing.assert_array_equal(tree["a"], OTHER["a"])
    assert tree["b"]["c"].dtype == jnp.int32
    assert Checkpoints(tmp_path, IDENTITY).restore(TREE, at_most=1)[0] == 1
    assert Checkpoints(tmp_path, IDENTITY).restore(TREE, after=2) is None


def data_files(directory):
    return [path for path in directory.rglob("*") if path.is_file() and path.parent.name == "d"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "delete"])
def test_a_damaged_step_is_set_aside_and_the_one_before_is_used(tmp_path, damage):
    directory = tmp_path / "checkpoints"
    checkpoints = Checkpoints(directory, IDENTITY)
    checkpoints.save(1, TREE)
    checkpoints.save(2, OTHER)
    for path in data_files(directory / "2" / "state"):
        content = bytearray(path.read_bytes())
        if damage == "delete":
            path.unlink()
        elif damage == "flip":
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        else:
            path.write_bytes(content[: len(content) // 2] if damage == "truncate" else b"")
    step, tree = Checkpoints(directory, IDENTITY).restore(TREE)
    assert step == 1
    np.testing.assert_array_equal(tree["a"], TREE["a"])
    assert (tmp_path / "checkpoints-damaged" / "2").exists()
    assert not (directory / "2").exists()


def test_another_model_s_checkpoint_is_refused(tmp_path):
    Checkpoints(tmp_path, IDENTITY).save(1, TREE)
    with pytest.raises(UserError, match="another base model"):
        Checkpoints(tmp_path, {"model": "y"}).restore(TREE)


def test_another_type_or_shape_is_refused(tmp_path):
    Checkpoints(tmp_path, IDENTITY).save(1, TREE)
    narrow = {**TREE, "a": TREE["a"].astype(jnp.bfloat16)}
    with pytest.raises(UserError, match="other"):
        Checkpoints(tmp_path, IDENTITY).restore(narrow)


def test_last_steps_of_rounds_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, IDENTITY, keep=1, keep_period=4)
    for step in (2, 4, 6, 7):
        checkpoints.save(step, TREE)
    names = {path.name for path in tmp_path.iterdir() if path.name.isdigit()}
    assert names == {"4", "7"}


def test_hash_tells_types_shapes_and_bytes_apart():
    assert hash_tree(TREE) == hash_tree(dict(TREE))
    assert hash_tree(TREE) != hash_tree(OTHER)
    assert hash_tree({"a": np.zeros(2)}) != hash_tree({"a": np.zeros((2, 1))})
    assert hash_tree({"a": np.zeros(2, np.int32)}) != hash_tree({"a": np.zeros(2, np.float32)})
