"""The programs of on-policy training, planned: what they gather, sum and hold beside them."""

import dataclasses
import math

import jax
import pytest

from configs import smoke
from expandr_jax.config import read_config, with_settings
from expandr_jax.errors import UserError
from expandr_jax.loading import load_models, sampling_stages
from expandr_jax.objectives.registry import STEP_B
from expandr_jax.pair import adapter_shapes
from expandr_jax.planning import compiled
from expandr_jax.planning.hosts import host_rows
from expandr_jax.planning.planned import PROMPT_TOKENS, REFERENCE
from expandr_jax.planning.planned_generator import GeneratorShapes
from expandr_jax.planning.planned_policy import OLD, POLICY_DECODE, POLICY_STEP
from expandr_jax.planning.programs import planned_programs
from expandr_jax.training.train_state import TrainState
from tests.eight_devices import CHIP, PROGRAMS, QUIET, machine, smoke_on_meshes
from tests.planned_generator_test import wide_model
from train import plan
from train.counts import PAPER_COUNTS

SAMPLES, NEW = 4, 16
GRPO = {
    "step_b": "grpo", "grpo.queries": 16, "grpo.samples": SAMPLES, "grpo.max_new_tokens": NEW,
    "generator.slots": 512,
}  # fmt: skip


@pytest.fixture(scope="module")
def config():
    return with_settings(smoke_on_meshes(), GRPO)


def size(tree):
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_on_policy_programs_stand_where_dpo_s_would(config):
    only = [POLICY_DECODE, REFERENCE, POLICY_STEP]
    planned = plan.plan(config, machine(), QUIET, only=only)
    rows = {row["program"]: row for row in planned["rows"]}
    assert list(rows) == only
    expected = [name for name in PROGRAMS if name not in (REFERENCE, "DPO step", "DPO dev losses")]
    at = expected.index("exact search")
    assert [*planned_programs(config, machine())] == [*expected[:at], *only, *expected[at:]]
    for row in rows.values():
        assert row["fits"]
        assert row["model_flops"] > 0
        assert row["roofline_seconds"] > 0
    fewer = "fewer grpo.queries or grpo.samples, or a larger tensor axis in mesh.sampling"
    assert rows[POLICY_DECODE]["change"] == fewer
    # As many slots as a step has texts; the KL is looked at in as few rows as the mesh takes.
    assert rows[POLICY_DECODE]["rows"] == 16 * SAMPLES
    assert rows[POLICY_STEP]["rows"] == 16
    assert rows[REFERENCE]["rows"] == 8
    # Half of the rows, and a forward pass in the place of that and a backward one.
    assert rows[POLICY_STEP]["model_flops"] == 4 * rows[REFERENCE]["model_flops"]


def test_a_policy_step_gathers_weights_for_two_passes_and_sums_the_adapter_alone(tmp_path):
    wide = with_settings(wide_model(tmp_path, layers=2), {**GRPO, "grpo.queries": 8})
    shapes = GeneratorShapes(wide, None)
    base = [4 * math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes.params)]
    made = planned_programs(wide, machine())[POLICY_STEP]()
    needs = compiled.compile_program(made.program.lower(*made.arguments), CHIP)
    assert {"all-gather", "all-reduce"} <= set(needs.collectives)
    assert sum(base) < needs.collectives["all-gather"].bytes <= 2 * sum(base)
    assert needs.collectives["all-gather"].largest <= max(base) / 2
    # Gradients, and a few metrics.
    assert 0 <= needs.collectives["all-reduce"].bytes - size(shapes.adapter) < 1000


def test_rows_are_as_long_as_all_texts_and_have_what_the_settings_need(config):
    changed = {"grpo.kl_weight": 0.1, "grpo.passes": 2, "grpo.accumulation": 2}
    programs = planned_programs(with_settings(config, changed), machine())
    step, old, reference = (programs[name]() for name in (POLICY_STEP, OLD, REFERENCE))
    batch = step.arguments[2]
    assert batch["tokens"].shape == (8, PROMPT_TOKENS + SAMPLES * NEW)
    assert batch["responses"].shape == (8, SAMPLES * NEW)
    assert {"reference", "old"} < batch.keys()
    assert (old.rows, reference.rows) == (8, 8)
    # The accumulated gradients are planned, too: adapter, two moments and these.
    shapes = GeneratorShapes(config, None)
    state = step.arguments[0]
    assert isinstance(state, TrainState)
    assert 4 * size(shapes.adapter) <= size(state) < 4.1 * size(shapes.adapter)


def test_each_is_planned_beside_what_the_other_keeps(config):
    """The engine's weights while training, the optimizer while sampling, both for rewards."""
    config = with_settings(config, {
        "mesh.dpo": (1, 8, 1), "mesh.sampling": (8, 1, 1), "mesh.contrastive": (8, 1, 1),
    })  # fmt: skip
    programs, plain = (
        planned_programs(each, machine())
        for each in (config, with_settings(config, {"step_b": "dpo"}))
    )
    shapes = GeneratorShapes(config, None)
    engine, step = size(shapes.params) + size(shapes.adapter), programs[POLICY_STEP]()
    assert step.resident - plain["DPO step"]().resident == engine
    state = programs[POLICY_DECODE]().resident - plain["decode"]().resident
    assert state == plan.bytes_on_device(step.arguments[0]) > size(shapes.adapter) * 3 / 8
    for name in ("corpus encoding", "exact search"):
        assert programs[name]().resident - plain[name]().resident == engine + state
    assert programs["decode"]().resident == plain["decode"]().resident


def test_queries_that_the_mesh_cannot_divide_are_refused(config):
    wrong = with_settings(config, {"grpo.queries": 12})
    with pytest.raises(UserError, match=r"grpo\.queries 12 must be a multiple of 8"):
        planned_programs(wrong, machine())[POLICY_STEP]()


def test_chip_hours_are_those_of_as_many_queries(config, monkeypatch):
    config = with_settings(config, {"grpo.passes": 2, "grpo.minibatches": 4})
    names = ["prefill", POLICY_DECODE, REFERENCE, OLD, POLICY_STEP, "contrastive step"]
    rows = {name: {"roofline_seconds": 0.0, "rows": 16, "shares": 2} for name in names}
    rows[POLICY_STEP]["roofline_seconds"] = 0.5
    rows[POLICY_DECODE]["roofline_seconds"] = 0.01
    hours = plan.paper_chip_hours(rows, 8, config)
    # 6,250 steps of 16 queries; four updates twice each; 64 texts, 32 at once, of 16 tokens.
    assert hours["GRPO"] == pytest.approx(6250 * 8 * 0.5 * 8 / 3600)
    assert hours["candidates"] == pytest.approx(6250 * 2 * 16 * 0.01 * 8 / 3600)
    assert hours["all"] == pytest.approx(hours["GRPO"] + hours["candidates"])
    monkeypatch.setitem(STEP_B, "mine", dataclasses.replace(STEP_B["grpo"], phase="MINE"))
    mine = plan.paper_chip_hours(rows, 8, with_settings(config, {"step_b": "mine"}))
    assert mine == {"MINE" if part == "GRPO" else part: time for part, time in hours.items()}


def test_a_run_knows_before_it_begins_what_sampling_on_policy_takes(monkeypatch):
    """The optimizer is counted; candidates, of which there are none, are not."""
    plans = []
    monkeypatch.setattr("expandr_jax.loading.check_memory", lambda plan, _: plans.append(plan))
    config = with_settings(
        read_config(smoke.get_config()),
        {"step_b": "grpo", "grpo.max_new_tokens": 40, "candidates.max_new_tokens": 400},
    )
    models = load_models(config, lambda _: None)
    others, own = plans
    assert own["slots"] / others["slots"] == (96 + 40) / (96 + 8)
    assert "adapter and optimizer" not in others
    adapter = size(adapter_shapes(models.generator.module, models.generator_params))
    # With both moments of AdamW and a few counters.
    assert 0 < own["adapter and optimizer"] - 3 * adapter < 100


@pytest.mark.parametrize("like", ["grpo", "reward-sft"])
def test_another_kind_of_step_b_is_a_record(config, monkeypatch, like):
    """Read, planned and counted as the kind that it is like, whatever it is called."""
    monkeypatch.setitem(STEP_B, "mine", dataclasses.replace(STEP_B[like], phase="MINE"))
    theirs = with_settings(config, {"step_b": like})
    mine = read_config(dataclasses.asdict(with_settings(config, {"step_b": "mine"})))
    topology = machine()
    assert [*planned_programs(mine, topology)] == [*planned_programs(theirs, topology)]
    own, others = (
        [dataclasses.astuple(row) for row in host_rows(each, PAPER_COUNTS, topology, 1)]
        for each in (mine, theirs)
    )
    renamed = [("MINE" if stage == "GRPO" else stage, *rest) for stage, *rest in others]
    assert own == renamed
    assert sampling_stages(mine) == sampling_stages(theirs)
