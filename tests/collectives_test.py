"""Collectives counted in programs: against ones whose collectives are known by construction."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from expandr_jax.planning.collectives import Collectives, count_collectives
from expandr_jax.planning.compiled import compile_program, roofline
from expandr_jax.sharding import make_mesh
from tests.eight_devices import CHIP


def compiled(function, *shapes, specs, out):
    mesh = make_mesh(8)
    body = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
    places = [NamedSharding(mesh, spec) for spec in specs]
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)
        for shape, place in zip(shapes, places, strict=True)
    ]
    return jax.jit(body).lower(*arguments).compile().as_text()


ROWS = PartitionSpec("data")


@pytest.mark.parametrize(
    ("kind", "function", "size"),
    [
        ("all-gather", lambda x: jax.lax.all_gather(x, "data", tiled=True), 4 * 64 * 16),
        ("all-reduce", lambda x: jax.lax.psum(x, "data"), 4 * 8 * 16),
        (
            "reduce-scatter",
            lambda x: jax.lax.psum_scatter(x, "data", tiled=True),
            4 * 8 * 16,
        ),
        (
            "collective-permute",
            lambda x: jax.lax.ppermute(x, "data", [(i, (i + 1) % 8) for i in range(8)]),
            4 * 8 * 16,
        ),
    ],
)
def test_one_of_a_kind(kind, function, size):
    out = PartitionSpec() if kind in ("all-gather", "all-reduce") else ROWS
    text = compiled(function, (64, 16), specs=(ROWS,), out=out)
    assert count_collectives(text) == {kind: Collectives(1, size, size)}


def test_a_loop_counts_every_turn():
    def function(x):
        def turn(carry, _):
            return jnp.tanh(jax.lax.psum(carry, "data")), None

        return jax.lax.scan(turn, x, length=5)[0]

    found = count_collectives(compiled(function, (64, 16), specs=(ROWS,), out=ROWS))
    assert found == {"all-reduce": Collectives(5, 5 * 512, 512)}


def test_a_loop_inside_a_loop_and_a_branch():
    def function(x):
        def inner(carry, _):
            return jnp.tanh(jax.lax.psum(carry, "data")), None

        def outer(carry, _):
            return jax.lax.scan(inner, carry, length=3)[0] + 1, None

        x = jax.lax.scan(outer, x, length=4)[0]
        gather = functools.partial(jax.lax.all_gather, axis_name="data", tiled=True)
        return jax.lax.cond(x[0, 0] > 0, lambda x: gather(x)[:8], lambda x: x, x)

    found = count_collectives(compiled(function, (64, 16), specs=(ROWS,), out=ROWS))
    assert found["all-reduce"].count == 12
    assert found["all-gather"] == Collectives(1, 4 * 64 * 16, 4 * 64 * 16)


def test_a_loop_of_unknown_length_counts_once():
    def function(x, n):
        def turn(state):
            i, x = state
            return i + 1, jnp.tanh(jax.lax.psum(x, "data"))

        return jax.lax.while_loop(lambda state: state[0] < n[0], turn, (0.0, x))[1]

    text = compiled(function, (64, 16), (1,), specs=(ROWS, PartitionSpec()), out=ROWS)
    assert count_collectives(text)["all-reduce"].count == 1


# As TPU's compiler writes what it has started and goes on from, in half precision.
STARTED = """
HloModule m

%region (a: bf16[], b: bf16[]) -> bf16[] {
  ROOT %add = bf16[] add(bf16[] %a, bf16[] %b)
}

ENTRY %main (p: bf16[32,16]) -> bf16[512,16] {
  %p = bf16[32,16]{1,0:T(8,128)(2,1)} parameter(0)
  %s = (bf16[32,16]{1,0:T(8,128)(2,1)}, bf16[512,16]{1,0:T(8,128)(2,1)}) all-gather-start(%p), \
replica_groups=[1,16]<=[16], dimensions={0}
  ROOT %d = bf16[512,16]{1,0:T(8,128)(2,1)} all-gather-done(%s)
}
"""


def test_a_started_collective_counts_once():
    size = 2 * 512 * 16
    assert count_collectives(STARTED) == {"all-gather": Collectives(1, size, size)}


# A loop as TPU's compiler leaves it: no count, a bound in its condition, two turns in one; and a
# collective that runs beside it, so that it stands in three computations.
UNROLLED = """
HloModule m

%piece (a: f32[8]) -> f32[64] {
  %a = f32[8]{0} parameter(0)
  ROOT %g1 = f32[64]{0} all-gather(%a), channel_id=7, replica_groups=mesh['x'=2,'y'=8] {'y'}
}

%condition (s: (f32[8], u32[])) -> pred[] {
  %s = (f32[8]{0}, u32[]{:T(128)}) parameter(0)
  %limit = u32[]{:T(128)} constant(8)
  %i = u32[]{:T(128)} get-tuple-element(%s), index=1
  ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (t: (f32[8], u32[])) -> (f32[8], u32[]) {
  %t = (f32[8]{0}, u32[]{:T(128)}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%t), index=0
  %j = u32[]{:T(128)} get-tuple-element(%t), index=1
  %f1 = f32[64]{0} fusion(%x), kind=kCustom, calls=%piece.1
  %p = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%x), channel_id=2
  %q = f32[8]{0} collective-permute-done(%p)
  %two = u32[]{:T(128)} constant(2)
  %next = u32[]{:T(128)} add(%j, %two)
  ROOT %state = (f32[8]{0}, u32[]{:T(128)}) tuple(%q, %next)
}

%piece.1 (b: f32[8]) -> f32[64] {
  %b = f32[8]{0} parameter(0)
  ROOT %g2 = f32[64]{0} all-gather(%b), channel_id=7, replica_groups=mesh['x'=2,'y'=8] {'y'}
}

ENTRY %main (c: f32[8]) -> f32[8] {
  %c = f32[8]{0} parameter(0)
  %zero = u32[]{:T(128)} constant(0)
  %f = f32[64]{0} fusion(%c), kind=kCustom, calls=%piece
  %start = (f32[8]{0}, u32[]{:T(128)}) tuple(%c, %zero)
  %w = (f32[8]{0}, u32[]{:T(128)}) while(%start), condition=%condition, body=%body
  %r = f32[8]{0} get-tuple-element(%w), index=0
  ROOT %z = f32[1]{0} reduce-scatter(%r), replica_groups=mesh['x'=2,'y'=8] {'y'}, to_apply=%add
}
"""


def test_loops_and_pieces_of_a_program_for_a_tpu():
    assert count_collectives(UNROLLED) == {
        "all-gather": Collectives(1, 256, 256),
        "reduce-scatter": Collectives(1, 32, 32),
        "collective-permute": Collectives(4, 4 * 32, 32),
    }


def test_lines_between_are_passed_over_and_no_program_has_none():
    body = "  %a = f32[8]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add\n"
    text = "HloModule m\n\nENTRY %main (x: f32[8]) -> f32[8] {\n" + body + "\n/* a line */\n" + body
    assert count_collectives(text + "}\n")["all-reduce"].count == 2
    assert count_collectives("") == {}


def test_a_program_that_the_compiler_cannot_print_has_its_memory_without_collectives():
    made = jax.jit(jnp.sin).lower(jnp.ones(8)).compile()

    class Compiled:
        memory_analysis = made.memory_analysis

        def as_text(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure: async-update")

    class Lowered:
        def compile(self):
            return Compiled()

    needs = compile_program(Lowered(), CHIP)
    assert (needs.argument, needs.collectives) == (64, None)
    assert roofline(CHIP, 2, 1e10, 3e11, needs.collectives) == (3.0, "memory")
