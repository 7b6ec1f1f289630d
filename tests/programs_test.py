"""What the engine's compiled programs are made of, and what they leave behind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from expandr_jax.generation.engine import Engine
from expandr_jax.generation.slots import Prefilled
from expandr_jax.sharding import make_mesh
from tests.engine_test import SETTINGS, make_requests, random_decoder

SORTS = ("stablehlo.sort", "chlo.top_k")  # What jax makes of sort, argsort and top_k.


@pytest.fixture(scope="module")
def tiny():
    return random_decoder(37, 2.5)


@pytest.fixture(scope="module", params=[None, {"data": 2, "fsdp": 2, "tensor": 2}])
def engine(request, tiny):
    """On one device and on a mesh, with a repetition penalty."""
    mesh = None if request.param is None else make_mesh(**request.param)
    return Engine(*tiny, slots=16, mesh=mesh, repetition_penalty=True, **SETTINGS)


def test_engines_of_one_shape_share_their_programs(tiny):
    first, second = (Engine(*tiny, slots=4, **SETTINGS) for _ in range(2))
    assert first._programs is second._programs
    assert first._programs is not Engine(*tiny, slots=8, **SETTINGS)._programs


def test_slots_move_no_cache_between_devices(tiny):
    engine = Engine(*tiny, slots=16, mesh=make_mesh(data=8), **SETTINGS)
    slots, idle = engine._programs.empty(None), np.zeros(16, bool)
    text = engine._programs.decode.lower(engine._variables, slots, idle, 4, 0).compile().as_text()
    assert "all-gather" not in text
    assert "all-to-all" not in text


def prompts(engine):
    rows, bucket = engine.shape.prefill_rows(4), 4
    tokens, length = np.full((rows, bucket), 5, np.int32), np.full(rows, 3, np.int32)
    prefilled = engine._programs.prefill(engine._variables, tokens, length, None)
    assert isinstance(prefilled, Prefilled)
    return prefilled


def decoded(engine, slots):
    return engine._variables, slots, np.zeros(engine.shape.slots, bool), 4, 0


def test_decoding_sorts_nothing(engine):
    slots = engine._programs.empty(None)
    text = engine._programs.decode.lower(*decoded(engine, slots)).as_text()
    assert not any(name in text for name in SORTS)
    # They would be seen.
    for found in (jnp.sort, jnp.argsort, lambda x: jax.lax.top_k(x, 3)):
        text = jax.jit(found).lower(jnp.zeros((2, 50))).as_text()
        assert any(name in text for name in SORTS)


def test_slots_are_donated_and_nothing_else(engine):
    """The old cache's memory is the new one's: else there would be two of it at every call."""
    slots, prefilled = engine._programs.empty(None), prompts(engine)
    source = np.full(engine.shape.slots, -1, np.int32)
    source[:2] = 0
    filled = engine._programs.insert(slots, prefilled, source, engine._idle)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(slots))
    program = engine._programs.decode.lower(*decoded(engine, filled)).compile()
    bytes_a_device = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(filled))
    assert program.memory_analysis().alias_size_in_bytes == bytes_a_device
    engine._programs.decode(*decoded(engine, filled))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(filled))
    kept = jax.tree.leaves((prefilled, engine._variables))
    assert not any(leaf.is_deleted() for leaf in kept)


def test_programs_are_few_and_compiled_once(tiny):
    compiled = []

    def listen(name, _, **__):
        if name.endswith("backend_compile_duration"):
            compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    # What jax compiles once in a process, whatever the engine, is there before.
    assert list(Engine(*tiny, slots=2, **SETTINGS).generate(make_requests(2, 1)))
    engine = Engine(*tiny, slots=8, **{**SETTINGS, "seed": 12})  # No test has this shape.
    compiled.clear()
    assert list(engine.generate(make_requests(2, 1, seed=3) + make_requests(9)))
    # The empty slots, the decoder, and two programs for each bucket.
    assert len(compiled) <= 2 + 2 * len(SETTINGS["prompt_buckets"])
    compiled.clear()
    assert list(engine.generate(make_requests(20, 3, seed=4)))
    assert not compiled


@pytest.mark.parametrize("axes", [None, {"data": 8}])
def test_weights_are_in_memory_once(tiny, axes):
    module, params = tiny
    mesh = None if axes is None else make_mesh(**axes)
    stack = params["layers"]["mlp"]["up_proj"]["kernel"]
    engine = Engine(module, params, slots=8, mesh=mesh, **SETTINGS)
    for i in range(2):
        kernel = engine._variables["params"][f"layer_{i}"]["mlp"]["up_proj"]["kernel"]
        (place,) = {shard.data.unsafe_buffer_pointer() for shard in kernel.addressable_shards}
        assert place == stack.unsafe_buffer_pointer() + i * stack.nbytes // 2
