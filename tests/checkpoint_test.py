"""Checkpoints: what is saved comes back, and what is damaged is found and set aside."""

import errno
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from expandr_jax.errors import NotFiniteError, UserError
from expandr_jax.sharding import make_mesh
from expandr_jax.training.checkpoint import Checkpoints, checksum_tree
from expandr_jax.weights.trees import hash_tree

TREE = {"a": jnp.arange(6.0).reshape(2, 3), "b": {"c": jnp.array([1, 2], jnp.int32)}}
OTHER = {"a": TREE["a"] + 1, "b": {"c": TREE["b"]["c"]}}
IDENTITY = {"model": "x"}


def test_the_newest_step_comes_back_bit_for_bit(tmp_path):
    checkpoints = Checkpoints(tmp_path, IDENTITY)
    assert checkpoints.restore(TREE) is None
    checkpoints.save(1, TREE)
    checkpoints.save(2, OTHER)
    checkpoints.wait()
    step, tree = Checkpoints(tmp_path, IDENTITY).restore(TREE)
    assert step == 2
    np.testing.assert_array_equal(tree["a"], OTHER["a"])
    assert tree["b"]["c"].dtype == jnp.int32
    assert Checkpoints(tmp_path, IDENTITY).restore(TREE, at_most=1)[0] == 1
    assert Checkpoints(tmp_path, IDENTITY).restore(TREE, after=2) is None


def damages(content: bytes):
    """Ways in which a file can be damaged: what is left of it, None where nothing is."""
    yield None
    yield b""
    yield content[: len(content) // 2]
    for place in {0, len(content) // 3, len(content) // 2, len(content) - 1}:
        yield content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def test_whatever_file_of_a_step_is_damaged_it_is_whole_or_set_aside(tmp_path):
    """Every file of a checkpoint, flipped, cut, emptied and deleted in turn."""
    whole = Checkpoints(tmp_path / "whole", IDENTITY)
    whole.save(1, TREE)
    whole.save(2, OTHER)
    whole.wait()
    names = [p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole" / "2").rglob("*")]
    aside = 0
    for name in names:
        if not (tmp_path / "whole" / name).is_file():
            continue
        content = (tmp_path / "whole" / name).read_bytes()
        for damage in damages(content) if content else [None]:
            directory = tmp_path / "damaged"
            shutil.rmtree(directory, ignore_errors=True)
            shutil.rmtree(tmp_path / "damaged-damaged", ignore_errors=True)
            shutil.copytree(tmp_path / "whole", directory)
            if damage is None:
                (directory / name).unlink()
            else:
                (directory / name).write_bytes(damage)
            step, tree = Checkpoints(directory, IDENTITY).restore(TREE)
            wanted = {1: TREE, 2: OTHER}[step]
            np.testing.assert_array_equal(tree["a"], wanted["a"])
            np.testing.assert_array_equal(tree["b"]["c"], wanted["b"]["c"])
            assert (directory / "2").exists() == (step == 2)
            assert (tmp_path / "damaged-damaged" / "2").exists() == (step == 1)
            aside += step == 1
    assert aside >= 20


def test_a_save_goes_on_while_the_next_step_overwrites_its_arrays(tmp_path):
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    tree = {"a": jnp.arange(3e6), "b": jnp.arange(1e6).astype(jnp.bfloat16)}
    expected = jax.tree.map(np.array, tree)
    checkpoints = Checkpoints(tmp_path, IDENTITY)
    checkpoints.save(1, tree)
    jax.block_until_ready(overwrite(tree))
    _, found = checkpoints.restore(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_directory_that_cannot_be_written_is_named_in_one_line(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, IDENTITY)

    def full(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: ... [No space left on device]\nand more")

    monkeypatch.setattr(checkpoints._manager, "wait_until_finished", full)
    with pytest.raises(UserError, match="no space left on the disk") as raised:
        checkpoints.wait()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied"),
        OSError(errno.EMFILE, "Too many open files"),
        MemoryError("no room"),
        ValueError("PERMISSION_DENIED: Error opening file [OS error 13: EACCES]"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 17 bytes"),
    ],
)
def test_a_step_that_cannot_be_read_now_is_not_taken_for_damaged(tmp_path, monkeypatch, error):
    saved = Checkpoints(tmp_path / "c", IDENTITY)
    saved.save(1, TREE)
    saved.wait()
    checkpoints = Checkpoints(tmp_path / "c", IDENTITY)

    def fails(*_, **__):
        raise error

    match = r"a checkpoint cannot be read: .*the same command goes on"
    with monkeypatch.context() as patch:
        patch.setattr(ocp.StandardCheckpointHandler, "restore", fails)
        with pytest.raises(UserError, match=match):
            checkpoints.restore(TREE)
    assert not (tmp_path / "c-damaged").exists()
    assert Checkpoints(tmp_path / "c", IDENTITY).restore(TREE)[0] == 1


def test_what_is_not_finite_is_not_saved(tmp_path):
    checkpoints = Checkpoints(tmp_path, IDENTITY)
    with pytest.raises(NotFiniteError, match=r"step 3, \['a'\] is not finite"):
        checkpoints.save(3, {**TREE, "a": TREE["a"].at[0, 0].set(jnp.inf)})
    assert checkpoints.restore(TREE) is None


def test_a_checksum_is_of_the_values_not_of_the_mesh():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.int8, jnp.uint32, bool):
        values = jnp.arange(96).reshape(4, 8, 3).astype(dtype)
        here, bad = checksum_tree({"x": values})
        spread = jax.device_put(values, NamedSharding(mesh, PartitionSpec("data", "fsdp")))
        assert checksum_tree({"x": spread}) == (here, bad) == (here, [])
        swapped = values.at[0, 0, 0].set(values[0, 0, 1]).at[0, 0, 1].set(values[0, 0, 0])
        other_shape = values.reshape(8, 4, 3)
        assert len({here, *(checksum_tree({"x": x})[0] for x in (swapped, other_shape))}) == 3
    assert checksum_tree({"x": jnp.array([1.0, jnp.nan])})[1] == ["['x']"]


def test_any_flipped_bit_changes_the_checksum():
    values = np.random.default_rng(0).normal(size=7).astype(np.float32)
    seen = {checksum_tree(values)[0]}
    for bit in range(values.nbytes * 8):
        flipped = values.copy()
        flipped.view(np.uint8)[bit // 8] ^= 1 << bit % 8
        seen.add(checksum_tree(flipped)[0])
    assert len(seen) == values.nbytes * 8 + 1


def test_another_model_s_checkpoint_is_refused(tmp_path):
    saved = Checkpoints(tmp_path, IDENTITY)
    saved.save(1, TREE)
    saved.wait()
    with pytest.raises(UserError, match="another base model"):
        Checkpoints(tmp_path, {"model": "y"}).restore(TREE)


def test_an_older_version_s_checkpoint_names_less_and_is_taken(tmp_path):
    checkpoints = Checkpoints(tmp_path, {"model": "a", "steps": 3})
    checkpoints.save(1, TREE)
    checkpoints.wait()
    now = {"model": "a", "steps": 3, "examples": "of all that is trained on"}
    assert Checkpoints(tmp_path, now).restore(TREE)[0] == 1
    for other in ({**now, "steps": 4}, {"model": "a", "examples": "some"}):
        with pytest.raises(UserError, match="another base model or other settings"):
            Checkpoints(tmp_path, other).restore(TREE)
    newer = Checkpoints(tmp_path, now)
    newer.save(2, TREE)
    newer.wait()
    with pytest.raises(UserError, match="another base model or other settings"):
        Checkpoints(tmp_path, {**now, "examples": "others"}).restore(TREE)


def test_an_older_version_s_checkpoint_may_name_what_follows_from_all_else(tmp_path):
    """It takes long to find, and is looked for where nothing else tells."""
    saved, asked = Checkpoints(tmp_path, {"model": "a", "tokens": "t"}), []
    saved.save(1, TREE)
    saved.wait()

    def now(tokens, **changed):
        def older():
            asked.append(tokens)
            return {"tokens": tokens}

        return Checkpoints(tmp_path, {"model": "a", "texts": "x", **changed}, older=older)

    assert now("t").restore(TREE)[0] == 1
    for other in (now("u"), now("t", model="b")):
        with pytest.raises(UserError, match="another base model or other settings"):
            other.restore(TREE)
    newer = now("t")
    newer.save(2, TREE)
    newer.wait()
    asked.clear()
    assert now("u").restore(TREE)[0] == 2
    with pytest.raises(UserError, match="another base model or other settings"):
        now("t", texts="y").restore(TREE)
    assert not asked


def test_another_type_or_shape_is_refused(tmp_path):
    saved = Checkpoints(tmp_path, IDENTITY)
    saved.save(1, TREE)
    saved.wait()
    narrow = {**TREE, "a": TREE["a"].astype(jnp.bfloat16)}
    with pytest.raises(UserError, match="other"):
        Checkpoints(tmp_path, IDENTITY).restore(narrow)


def test_last_steps_of_rounds_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, IDENTITY, keep=1, keep_period=4)
    for step in (2, 4, 6, 7):
        checkpoints.save(step, TREE)
    checkpoints.wait()
    names = {path.name for path in tmp_path.iterdir() if path.name.isdigit()}
    assert names == {"4", "7"}


def test_hash_tells_types_shapes_and_bytes_apart():
    assert hash_tree(TREE) == hash_tree(dict(TREE))
    assert hash_tree(TREE) != hash_tree(OTHER)
    assert hash_tree({"a": np.zeros(2)}) != hash_tree({"a": np.zeros((2, 1))})
    assert hash_tree({"a": np.zeros(2, np.int32)}) != hash_tree({"a": np.zeros(2, np.float32)})
