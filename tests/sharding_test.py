"""Meshes, and where parameters go."""

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from expandr_jax import sharding
from expandr_jax.errors import UserError
from expandr_jax.models.decoder import Decoder, DecoderConfig, token_positions
from expandr_jax.models.mask import causal_mask
from expandr_jax.models.stack import initial_shapes
from expandr_jax.sharding import (
    batch_divisor,
    batch_sharding,
    device_put_rows,
    device_put_shared,
    gathered,
    make_mesh,
    param_shardings,
    replicated,
    rows_here,
)
from tests.commands import ROOT, ended, free_port

CONFIG = DecoderConfig(
    vocab_size=64, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4,
    mlp_dim=32, max_positions=32,
)  # fmt: skip


def test_one_axis_takes_what_the_others_leave():
    mesh = make_mesh(data=-1, fsdp=2, tensor=2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert batch_divisor(mesh) == 4


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (-1, -1, 1), (0, 1, 1)])
def test_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(UserError, match="does not fit 8 devices"):
        make_mesh(*sizes)


def test_parameters_follow_their_logical_axes():
    mask = jnp.ones((1, 4), jnp.int32)
    inputs = jnp.zeros((1, 4), jnp.int32), token_positions(mask), causal_mask(mask)
    shardings = param_shardings(make_mesh(data=2, fsdp=2, tensor=2), Decoder(CONFIG), *inputs)
    specs = jax.tree.map(lambda s: s.spec, shardings)
    attention, mlp = specs["layers"]["self_attn"], specs["layers"]["mlp"]
    assert specs["embedding"] == PartitionSpec("tensor", "fsdp")
    assert attention["q_proj"]["kernel"] == PartitionSpec(None, "fsdp", "tensor")
    assert attention["o_proj"]["kernel"] == PartitionSpec(None, "tensor", "fsdp")
    assert mlp["down_proj"]["kernel"] == PartitionSpec(None, "tensor", "fsdp")
    # Only norms are on every device: they are as wide as one vector.
    replicated = [
        jax.tree_util.keystr(path)
        for path, spec in jax.tree_util.tree_leaves_with_path(
            specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)
        )
        if not any(spec)
    ]
    assert all("norm" in name for name in replicated)


def test_shapes_are_those_of_init_whose_numbers_stay():
    mask = jnp.ones((1, 4), jnp.int32)
    inputs = jnp.zeros((1, 4), jnp.int32), token_positions(mask), causal_mask(mask)
    module, key = Decoder(CONFIG), jax.random.key(0)
    before = module.init(key, *inputs)
    shapes = initial_shapes(module, *inputs)
    assert jax.tree.structure(shapes) == jax.tree.structure(before)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, before)
    after = jax.jit(module.init)(key, *inputs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), before, after)


def test_an_axis_that_stays_whole_is_said(caplog):
    mask = jnp.ones((1, 4), jnp.int32)
    inputs = jnp.zeros((1, 4), jnp.int32), token_positions(mask), causal_mask(mask)
    odd = Decoder(dataclasses.replace(CONFIG, vocab_size=CONFIG.vocab_size + 1))
    for _ in range(2):
        shardings = param_shardings(make_mesh(data=2, fsdp=2, tensor=2), odd, *inputs)
    assert shardings["embedding"].spec == PartitionSpec(None, "fsdp")
    said = f"vocab {CONFIG.vocab_size + 1} over tensor 2: every device holds these axes whole"
    assert [said in record.message for record in caplog.records] == [True]


def test_devices_in_the_hosts_memory_share_what_all_of_them_hold():
    mesh = make_mesh(data=4, tensor=2)
    whole, halved = jnp.arange(4096.0).reshape(64, 64), jnp.ones((64, 64))
    shardings = {
        "whole": replicated(mesh),
        "halved": jax.sharding.NamedSharding(mesh, PartitionSpec("tensor")),
    }
    placed = device_put_shared({"whole": whole, "halved": halved}, shardings)
    for name, value in (("whole", whole), ("halved", halved)):
        assert placed[name].sharding == shardings[name]
        np.testing.assert_array_equal(placed[name], value)
    copies = {shard.data.unsafe_buffer_pointer() for shard in placed["whole"].addressable_shards}
    assert copies == {whole.unsafe_buffer_pointer()}
    assert len({s.data.unsafe_buffer_pointer() for s in placed["halved"].addressable_shards}) == 8
    # So do layers cut out of a stack by numpy.
    layer = np.asarray(whole)[32]
    shared = device_put_shared(layer, replicated(mesh))
    (copy,) = {shard.data.unsafe_buffer_pointer() for shard in shared.addressable_shards}
    assert copy == whole.unsafe_buffer_pointer() + 32 * 64 * 4


def test_an_axis_may_take_a_part_of_a_torus_axis(monkeypatch):
    def refuses(*_, **__):  # As it does an axis of 8 on 4 x 4 chips.
        raise NotImplementedError

    whole = make_mesh(2, 1, 4)
    monkeypatch.setattr(jax, "make_mesh", refuses)
    mesh = make_mesh(2, 1, 4)
    assert dict(mesh.shape) == dict(whole.shape)
    assert mesh.axis_types == whole.axis_types
    assert set(mesh.devices.flat) == set(jax.devices())


@pytest.mark.parametrize("blocks", [1, 7, 50])
@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((200, 24), PartitionSpec("tensor", "fsdp")),
        ((200, 24), PartitionSpec(None, ("fsdp", "tensor"))),
        ((5, 8, 6), PartitionSpec(None, "fsdp", "tensor")),
        ((8, 3, 2), PartitionSpec(("tensor", "data", "fsdp"))),
        ((16,), PartitionSpec("fsdp")),
    ],
)
def test_what_is_spread_is_gathered_by_blocks(monkeypatch, shape, spec, blocks):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    host = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    spread = jax.device_put(host, jax.sharding.NamedSharding(mesh, spec))
    monkeypatch.setattr(sharding, "WHOLE_BYTES", host.nbytes // blocks)
    np.testing.assert_array_equal(gathered(spread), host)


@pytest.mark.parametrize("axes", [(8, 1, 1), (2, 2, 2), (1, 1, 8)])
def test_rows_of_this_process_are_placed_as_a_whole_batch_is(axes):
    mesh, batch = make_mesh(*axes), np.arange(96).reshape(32, 3)
    here = rows_here(mesh, 16)
    np.testing.assert_array_equal(here, np.arange(16))
    placed = device_put_rows({"a": batch[:16], "b": batch}, mesh, here, 16)
    for ours, whole_batch in ((placed["a"], batch[:16]), (placed["b"], batch)):
        np.testing.assert_array_equal(ours, whole_batch)
        assert ours.sharding == batch_sharding(mesh)


GATHER = """
import sys
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from expandr_jax import sharding
from expandr_jax.runtime import processes

jax.config.update("jax_num_cpu_devices", 1)
processes.start(sys.argv[1], 2, int(sys.argv[2]))
compiled = []

def listen(name, _, **__):
    if name.endswith("backend_compile_duration"):
        compiled.append(name)

jax.monitoring.register_event_duration_secs_listener(listen)
mesh, sharding.WHOLE_BYTES = sharding.make_mesh(1, 2, 1), 1000
for rows in (20, 200, 2000):
    host = np.arange(rows * 64, dtype=np.int32).reshape(rows, 64)
    spread = sharding.device_put(host, NamedSharding(mesh, PartitionSpec(None, "fsdp")))
    compiled.clear()
    np.testing.assert_array_equal(sharding.whole(spread), host)
    print("programs", len(compiled))
mesh = sharding.make_mesh(2, 1, 1)
here, batch = sharding.rows_here(mesh, 6), np.arange(24).reshape(12, 2)
assert here.tolist() == [[0, 1, 2], [3, 4, 5]][int(sys.argv[2])]
own = {"two": batch.reshape(6, 2, 2)[here].reshape(6, 2), "one": batch[:6, 0][here]}
placed = sharding.device_put_rows(own, mesh, here, 6)
np.testing.assert_array_equal(sharding.whole(placed["two"]), batch)
np.testing.assert_array_equal(sharding.whole(placed["one"]), batch[:6, 0])
processes.current().finish()
"""


@pytest.mark.slow
def test_processes_gather_by_one_program_and_hand_over_their_own_rows():
    """A program for each row of an embedding took over an hour at every start."""
    address = f"127.0.0.1:{free_port()}"
    environment = {**os.environ, "XLA_FLAGS": ""}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", GATHER, address, str(i)],
            env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for i in range(2)
    ]  # fmt: skip
    for output in ended(children):
        counts = [int(line.split()[1]) for line in output.splitlines() if "programs" in line]
        assert counts == [1, 1, 1], output
