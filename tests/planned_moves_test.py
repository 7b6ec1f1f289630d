"""What moves between the steps of a run, planned: bytes counted by hand, and what is beside it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from expandr_jax.config import with_settings
from expandr_jax.planning import compiled
from expandr_jax.planning.planned_generator import GeneratorShapes
from expandr_jax.planning.planned_pairs import PairShapes
from expandr_jax.planning.planned_retriever import RetrieverShapes
from expandr_jax.planning.programs import planned_programs
from expandr_jax.sharding import bytes_on_device
from expandr_jax.training.checkpoint import checksum_tree
from expandr_jax.vectors.query import fuse_each
from tests.eight_devices import CHIP, machine, smoke_on_meshes
from tests.planned_generator_test import wide_model


@pytest.fixture(scope="module")
def config():
    return smoke_on_meshes()


def needs_of(planned):
    lowered = planned.program.lower(*planned.arguments)
    return compiled.compile_program(lowered, CHIP, planned.resident)


def test_a_restored_state_stands_beside_the_one_it_takes_the_place_of(config):
    planned = RetrieverShapes(config, machine()).restore()
    _, state, _ = RetrieverShapes(config, machine())._training()
    (leaf,) = planned.arguments
    assert planned.resident + bytes_on_device(leaf) == 2 * bytes_on_device(state)
    assert bytes_on_device(leaf) == max(map(bytes_on_device, jax.tree.leaves(state)))
    # It is what a restore runs: of this leaf, and it says of every word that it is there.
    numbers = jax.device_put(np.ones(leaf.shape, leaf.dtype), leaf.sharding)
    _, finite = planned.program.lower(*planned.arguments).compile()(numbers)
    assert finite
    _, bad = checksum_tree({"leaf": numbers.at[(0,) * numbers.ndim].set(jnp.nan)})
    assert bad
    assert needs_of(planned).total >= 2 * bytes_on_device(state)


def test_the_layers_of_a_base_take_the_place_of_their_stack_one_parameter_at_a_time(tmp_path):
    wide = wide_model(tmp_path, layers=2)
    shapes = GeneratorShapes(wide, machine())
    planned = shapes.to_engine()
    (leaf,) = planned.arguments
    _, variables = shapes.engine()
    # Two axes of tensor: each device has half of every matrix; two layers of 2048 x 4096 here.
    assert bytes_on_device(leaf) == 2 * 2048 * 4096 * 4 / 2
    needs = needs_of(planned)
    total = bytes_on_device(variables) + bytes_on_device(leaf)
    assert needs.total - needs.temporary == pytest.approx(total, rel=1e-3)
    assert needs.collectives == {}


def test_candidates_are_fused_a_block_at_a_time_as_they_are_rewarded(config):
    config = with_settings(
        config, {"candidates.temperatures": (0.8, 1.0), "reward.query_weight": 0.3}
    )
    planned = planned_programs(config, machine())["rewards"]()
    (query, each, present) = planned.arguments
    # Blocks of 16,384 candidates, whatever number a query has of them.
    count = len(config.candidates.all_temperatures)
    assert count == 2 * config.candidates.per_temperature
    rows = 2 * (8192 // count) * count
    assert query.shape == (rows, 32)
    assert (each.shape, present.shape) == ((rows, 1, 32), (rows, 1))
    drawn = np.random.default_rng(0)
    vectors = drawn.normal(size=query.shape), drawn.normal(size=each.shape)
    vectors = [np.asarray(x, np.float32) for x in vectors]
    found = planned.program(*vectors, np.ones(present.shape, bool))
    expected = fuse_each(
        vectors[0], vectors[1], np.ones(present.shape, bool),
        query_weight=0.3, normalize=config.contrastive.normalize,
    )  # fmt: skip
    np.testing.assert_array_equal(found, expected[:, 0])


def test_an_export_merges_the_largest_matrix_of_the_adapter(tmp_path):
    wide = wide_model(tmp_path, layers=2)
    planned = GeneratorShapes(wide, machine()).merge()
    a, b = planned.arguments
    assert a.shape[1] == b.shape[0] == wide.lora.rank
    assert (a.shape[0], b.shape[1]) == (2048, 2048)
    needs = needs_of(planned)
    assert needs.total >= 4 * 2048 * 2048
    assert planned.model_flops == 2 * 2048 * wide.lora.rank * 2048


def test_what_stays_on_the_devices_is_beside_them(config):
    topology = machine()
    retriever, generator = RetrieverShapes(config, topology), GeneratorShapes(config, topology)
    both = retriever.resident() + generator.resident()
    programs = planned_programs(config, topology)
    assert programs["adapter merged for export"]().resident == both
    pairs = PairShapes(config, topology, generator)
    beside = programs["adapter restored"]().resident - pairs.restore().resident
    assert beside == both
    rewarded = programs["rewards"]().resident - both
    assert rewarded == config.search.exact.held_bytes(32, 100)
    assert math.isclose(programs["base to the engine"]().resident,
                        both + generator.to_engine().resident)  # fmt: skip
