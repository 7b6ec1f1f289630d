"""train.plan --repeats: what is run, what is timed, and what is said where it cannot be."""

import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from expandr_jax.errors import UserError
from expandr_jax.losses.contrastive import same_text
from expandr_jax.objectives.packing import PADDING
from expandr_jax.planning.planned import Planned
from expandr_jax.planning.planned_generator import TIMED, GeneratorShapes
from expandr_jax.planning.planned_pairs import PAIR_STEP, PairShapes
from expandr_jax.planning.planned_retriever import RetrieverShapes
from expandr_jax.planning.timing import made_up, time_program
from expandr_jax.runtime import chips
from tests.commands import command, finish
from tests.eight_devices import CHIP, PROGRAMS, QUIET, machine, smoke_on_meshes
from train import plan


@pytest.fixture(scope="module")
def config():
    return smoke_on_meshes()


@pytest.mark.slow
def test_what_fits_is_run_where_it_was_asked_for(config):
    only = ["corpus encoding", "decode", "exact search"]
    rows = plan.plan(config, machine(), QUIET, only, repeats=2)["rows"]
    for row in rows:
        # The chip is made up: a bound by its peaks may well be above what was measured.
        assert row["seconds"] > 0
        assert row["share_of_bound"] == pytest.approx(row["roofline_seconds"] / row["seconds"])
        devices = 1 if row["mesh"] is None else 8
        utilisation = row["model_flops"] / devices / CHIP.flops / row["seconds"]
        assert row["model_flops_utilisation"] == pytest.approx(utilisation)
    text = io.StringIO()
    plan.show_plan(
        {"topology": "", "rows": rows, "paper_chip_hours": None}, Console(file=text, width=250)
    )
    assert " MFU " in text.getvalue()
    assert f"{rows[1]['share_of_bound']:.1%}" in text.getvalue()


@pytest.mark.slow
def test_all_programs_run_on_a_mesh(config):
    rows = plan.plan(config, machine(), QUIET, repeats=1)["rows"]
    assert [row["program"] for row in rows] == PROGRAMS
    assert all(row["seconds"] > 0 for row in rows)


def test_the_command_runs_what_it_planned(tmp_path):
    out = tmp_path / "plan.json"
    only = "--only=prefill,exact search"
    arguments = ["--config=configs/smoke.py", only, "--repeats=1", f"--out={out}"]
    printed = finish(command("train.plan", *arguments, "--topology=cpu:1"))
    assert "of bound" in printed
    assert all(row["seconds"] > 0 for row in json.loads(out.read_text())["rows"])


def test_memory_that_ran_out_is_said():
    row = {"program": "decode", "fits": True, "seconds": None}
    assert plan.lost([row, {**row, "fits": False}, {**row, "seconds": 1.0}]) == [
        "decode: ran out of memory when it was run"
    ]
    assert plan.lost([{"program": "decode", "fits": True}]) == []


def test_a_program_that_does_not_fit_is_not_run(config):
    small = machine(chips.Chip("cpu", 1000, 1e12, 1, 1, ""))
    (row,) = plan.plan(config, small, QUIET, ["exact search"], repeats=1)["rows"]
    assert row["seconds"] is None
    assert row["model_flops_utilisation"] is None
    text = io.StringIO()
    plan.show_plan(
        {"topology": "", "rows": [row | {"collectives": None}], "paper_chip_hours": None},
        Console(file=text, width=250),
    )
    assert " unknown " in text.getvalue()


def test_programs_of_a_slice_that_is_not_here_cannot_be_run(config):
    slice_ = dataclasses.replace(machine(), name="v5e:4x2")
    with pytest.raises(UserError, match="--repeats=3: v5e:4x2 is compiled for, not here"):
        plan.plan(config, slice_, QUIET, repeats=3)


@pytest.mark.slow
def test_what_is_timed_is_the_work_that_was_planned(config):
    """Every slot decodes TIMED tokens, and no number of a step is lost to NaN."""
    shapes = GeneratorShapes(config, machine())
    decode = shapes.decode()
    shapes_of = tuple(decode.arguments)
    arguments = jax.tree.map(
        lambda value, shape: jax.device_put(value, shape.sharding),
        decode.values(*jax.tree.map(made_up, shapes_of)),
        shapes_of,
    )
    slots = decode.program(*arguments)
    assert (slots.count == TIMED).sum() > 0.9 * decode.rows  # Some may have ended: 512 tokens.
    assert (slots.cache.length == 100 + TIMED).sum() > 0.9 * decode.rows

    step = PairShapes(config, machine(), shapes).learning()[PAIR_STEP]()
    batch = step.values(*jax.tree.map(made_up, tuple(step.arguments)))[2]
    assert (batch["segments"] != PADDING).sum() == 16 * (100 + 2 * 512)
    assert len(np.unique(batch["tokens"])) > 50
    chosen, rejected = (batch["tokens"][batch["segments"] == i] for i in (1, 2))
    assert (chosen != rejected).any()

    step = RetrieverShapes(config, machine()).contrastive()
    state, batch, _ = step.values(*jax.tree.map(made_up, tuple(step.arguments)))
    assert batch["query_mask"].all()
    assert batch["negative_ids"].shape[0] == 1024
    texts = np.concatenate([batch["positive_texts"], batch["negative_texts"]])
    assert same_text(texts, batch["relevant"]).sum() == 1024  # Each query's own.
    assert all(not leaf.any() for leaf in jax.tree.leaves(state.opt_state))


def test_a_state_that_a_step_takes_is_replaced_by_the_one_it_gives():
    """`time_program` runs a donating program again and again; the times are its own."""
    state = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(
        jax.devices()[0]))  # fmt: skip
    seen = []

    def step(state, add):
        return state + add, state.sum()

    program = jax.jit(step, donate_argnums=0)
    compiled_ = program.lower(state, state).compile()

    def called(*arguments):
        seen.append([float(x[0]) for x in arguments])
        return compiled_(*arguments)

    timed = Planned(
        program, (state, state), None, (), None, 1, 1, 1, 1.0, "",
        values=lambda state, add: (state, jnp.ones(4)), units=2,
    )  # fmt: skip
    assert time_program(timed, called, repeats=3) > 0
    first = seen[0][0]
    assert [value for value, _ in seen] == pytest.approx([first + i for i in range(4)])


def test_memory_that_does_not_suffice_after_all_is_a_row_without_a_time():
    def fails(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    planned = Planned(None, (), None, (), None, 1, 1, 1, 1.0, "")
    assert time_program(planned, fails, repeats=1) is None
