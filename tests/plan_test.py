"""train.plan: its rows against numbers counted by hand, its verdicts and its exit codes."""

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from configs import llama3_8b_anchordr, smoke
from expandr_jax.config import read_config, with_settings
from expandr_jax.errors import UserError
from expandr_jax.planning import compiled
from expandr_jax.planning import programs as plan_programs
from expandr_jax.planning import proposals as plan_search
from expandr_jax.planning.planned import param_shapes
from expandr_jax.planning.planned_generator import GeneratorShapes
from expandr_jax.planning.planned_retriever import RetrieverShapes
from expandr_jax.planning.topology import Topology, find_topology
from expandr_jax.runtime import chips
from expandr_jax.training.flops import forward_flops
from tests.commands import ROOT, SOON, command, finish
from tests.eight_devices import CHIP, MOVES, PROGRAMS, QUIET, machine, smoke_on_meshes
from train import plan


@pytest.fixture(scope="module")
def config():
    return smoke_on_meshes()


@pytest.fixture(scope="module")
def planned(config):
    """A plan of the smoke config for 8 virtual devices."""
    return plan.plan(config, machine(), QUIET)


def test_every_program_has_a_row_that_fits(planned):
    assert [row["program"] for row in planned["rows"]] == PROGRAMS
    for row in planned["rows"]:
        assert row["fits"]
        assert row["bytes_total"] >= row["bytes_argument"] + row["bytes_temporary"] > 0
        assert row["bytes_capacity"] == CHIP.capacity
        assert row["roofline_seconds"] > 0
        assert row["bound"] in ("compute", "memory", "network")
        assert (row["model_flops"] > 0) == (row["program"] not in MOVES)
    json.dumps(planned)


def test_parameters_are_split_as_the_meshes_say(planned, config):
    rows = {row["program"]: row for row in planned["rows"]}
    # tiny-bert: 4 bytes each; what fsdp cannot split is small.
    retriever = RetrieverShapes(config, None).params
    whole = 4 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(retriever))
    assert whole / 4 <= rows["contrastive step"]["bytes_parameters"] < whole / 3
    assert rows["corpus encoding"]["bytes_parameters"] == whole
    # The step holds parameters and both of Adam's moments.
    assert rows["contrastive step"]["bytes_argument"] >= 3 * whole / 4
    assert rows["decode"]["bytes_argument"] > rows["decode"]["bytes_parameters"]


def test_a_step_on_a_mesh_communicates_and_a_program_of_one_device_does_not(planned):
    rows = {row["program"]: row for row in planned["rows"]}
    assert rows["contrastive step"]["collectives"]["all-gather"]["count"] > 0
    assert rows["DPO step"]["collectives"]["all-gather"]["count"] > 0
    assert rows["corpus encoding"]["collectives"] == {}
    assert rows["exact search"]["collectives"] == {}


def test_flops_are_those_of_the_shapes():
    """A decoder's, written out."""
    config = read_config(llama3_8b_anchordr.get_config())
    generator = GeneratorShapes(config, None)
    cfg = generator.module.config
    layer = 2 * cfg.hidden_size * cfg.head_dim * (2 * cfg.num_heads + 2 * cfg.num_kv_heads)
    layer += 3 * 2 * cfg.hidden_size * cfg.mlp_dim
    attention = 2 * 2 * 7 * cfg.num_heads * cfg.head_dim
    expected = 3 * (5 * cfg.num_layers * (layer + attention))
    expected += 11 * 2 * cfg.hidden_size * cfg.vocab_size
    found = forward_flops(generator.module, generator.params, 3, 5, keys=7, logits=11)
    assert found == expected
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(generator.params))
    assert parameters == 8_030_261_248  # Llama-3-8B's, as published.


def test_flops_are_those_that_xla_counts_without_a_scan():
    config = read_config(smoke.get_config())
    retriever = RetrieverShapes(config, None)
    module = retriever.retriever.module
    texts = jax.ShapeDtypeStruct((4, 16), jnp.int32)
    one = module.clone(config=module.config.__class__(**{**vars(module.config), "num_layers": 1}))
    params = param_shapes(one, jnp.float32)
    made = jax.jit(one.apply).lower({"params": params}, texts, texts).compile()
    counted = made.cost_analysis()["flops"]
    found = forward_flops(one, params, 4, 16)
    # XLA counts softmax and the like, too.
    assert found <= counted <= 1.5 * found


def test_what_does_not_fit_is_named_with_what_to_change(config):
    small = machine(chips.Chip("cpu", 1000, 1e12, 1, 1, ""))
    programs = plan_programs.planned_programs(config, small)
    made = programs["corpus encoding"]()
    needs = compiled.compile_program(made.program.lower(*made.arguments), small.chip)
    assert not needs.fits
    row = plan._row("corpus encoding", made, needs, small, 1.0)
    [problem] = plan.plan_misfits({"rows": [row]})
    assert "corpus encoding" in problem
    assert "retriever.tokens_per_batch" in problem


REJECTION = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
    "Used 23.51G of 15.75G hbm. Exceeded hbm capacity by 7.76G.\n\nTotal hbm usage >= 24.01G:\n"
    "    reserved        258.00M \n    program          18.25G \n    arguments         5.26G \n"
)


def test_a_program_that_the_compiler_rejects_is_a_row_with_its_sizes():
    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError(REJECTION)

    needs = compiled.compile_program(Lowered(), CHIP)
    assert needs.total == int(23.51 * chips.GIB)
    assert needs.argument == int(5.26 * chips.GIB)
    assert needs.temporary == needs.total - needs.argument
    assert not needs.fits


def test_so_is_one_that_is_rejected_for_what_it_keeps_alone():
    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
                "temporaries (400.00G) exceeds available HBM (15.75G)."
            )

    needs = compiled.compile_program(Lowered(), CHIP, resident=5)
    assert (needs.total, needs.resident) == (400 * chips.GIB + 5, 5)


def test_another_error_of_the_compiler_is_not_hidden():
    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        compiled.compile_program(Lowered(), CHIP)


def test_the_slowest_of_three_is_the_roofline():
    send = {"all-reduce": compiled.Collectives(1, int(1e9), 1)}
    assert compiled.roofline(CHIP, 2, 4e12, 1e10, {}) == (2.0, "compute")
    assert compiled.roofline(CHIP, 2, 1e10, 3e11, {}) == (3.0, "memory")
    assert compiled.roofline(CHIP, 2, 1e10, 1e9, send) == (0.2, "network")


def test_chip_hours_follow_the_paper(config):
    names = ["prefill", "decode", "reference log-probabilities", "DPO step", "contrastive step"]
    rows = {name: {"roofline_seconds": 0.0, "rows": 128, "shares": 4} for name in names}
    rows["decode"]["roofline_seconds"] = 0.01
    hours = plan.paper_chip_hours(rows, 16, config)
    # 3.2 million texts, 128 at once on each of four hosts, 512 tokens each.
    assert hours["all"] == hours["candidates"] == pytest.approx(6250 * 512 * 0.01 * 16 / 3600)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9:4x4", "expected something like"),
        ("cpu:0", "expected something like"),
        ("v5e", "expected chips by rows, as v5e:4x4"),
        ("v5e:4x4x4", "expected chips by rows, as v5e:4x4"),
        ("v6e:2x2x2", "expected chips by rows, as v6e:4x4"),
        ("cpu:4096", "there are"),
        ("gpu", "finds none"),
        ("tpu", "finds none"),
    ],
)
def test_a_topology_that_is_not_there_is_refused(name, message):
    jax.devices()  # In use, with 8 of them: it gets no more.
    with pytest.raises(UserError, match=message):
        find_topology(name)


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:4x4", "v5p:2x2x2"])
def test_llama_and_anchordr_fit(topology, tmp_path):
    """The tables of docs/plan.md: all programs fit, and decode gathers no weights."""
    out = tmp_path / "plan.json"
    process = command(
        "train.plan", "--config=configs/llama3_8b_anchordr.py", f"--topology={topology}",
        f"--out={out}",
    )  # fmt: skip
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    rows = {row["program"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == [*PROGRAMS, "base to every host", "retriever to every host"]
    assert all(row["fits"] for row in rows.values())
    assert set(rows["decode"]["collectives"]) == {"all-reduce", "all-to-all"}
    # What is gathered at once is never more than the largest single weight, the vocabulary's.
    assert rows["DPO step"]["collectives"]["all-gather"]["largest"] == 128_256 * 4096 * 2


@needs_libtpu
def test_a_slice_is_described_without_a_tpu():
    topology = find_topology("v5e:4x4")
    assert len(topology.devices) == 16
    assert topology.devices[0].platform == "tpu"
    assert topology.hosts == 4
    assert len(topology.host_devices) == 4
    with pytest.raises(UserError, match="chips by rows"):
        find_topology("v5e:16")
    with pytest.raises(UserError, match="no such slice"):
        find_topology("v5e:3x5")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": "nowhere.json"}, "no such file"),
        ({"source": "owner/name"}, "generator.shape can name a config.json"),
        ({"source": "configs/tiny/tiny-bert"}, "generates no text"),
    ],
)
def test_a_shape_that_cannot_be_had_is_refused(changes, message):
    config = smoke.get_config()
    config.generator.update(changes)
    with pytest.raises(UserError, match=message):
        GeneratorShapes(read_config(config), None)


def test_a_mesh_that_does_not_fit_the_workload_is_refused(config):
    topology = machine()
    wrong = with_settings(config, {"mesh.dpo": (3, 1, 1)})
    with pytest.raises(UserError, match="does not fit 8 devices"):
        plan_programs.planned_programs(wrong, topology)["DPO step"]()
    wrong = with_settings(config, {"contrastive.micro_batch": 100})
    with pytest.raises(UserError, match="expected a divisor of 1024"):
        plan_programs.planned_programs(wrong, topology)["contrastive step"]()


def test_sampling_and_encoding_are_planned_for_the_chips_of_a_host(config, planned):
    """Half of the workload each, on half of the devices, as a run of two processes has it."""
    topology = Topology("two hosts", jax.devices("cpu")[:8], CHIP, jax.devices("cpu")[:4])
    shared = ("corpus encoding", "prefill", "prompts to slots", "decode", "base to the engine")
    two = plan.plan(config, topology, QUIET)
    rows = {row["program"]: row for row in two["rows"]}
    for one in planned["rows"]:
        row = rows[one["program"]]
        if row["program"] in shared:
            assert row["mesh"]["data"] * row["mesh"]["fsdp"] * row["mesh"]["tensor"] == 4
            assert row["shares"] == 2
        else:
            assert row["mesh"] == one["mesh"]
            assert row["shares"] == 1
    # Each samples and encodes with all of a model, of which it trains a part: blocks go around.
    fetched = rows.keys() - {row["program"] for row in planned["rows"]}
    assert fetched == {"base to every host", "retriever to every host"}
    for name in fetched:
        assert set(rows[name]["collectives"]) == {"all-gather"}
        assert rows[name]["fits"]
    whole = {row["program"]: row for row in planned["rows"]}
    assert rows["decode"]["rows"] == whole["decode"]["rows"] / 2
    assert rows["decode"]["model_flops"] == whole["decode"]["model_flops"] / 2
    # The same texts on as many chips at the same peaks: the hours change by less than half.
    hours = [result["paper_chip_hours"]["candidates"] for result in (planned, two)]
    assert 1 / 2 < hours[1] / hours[0] < 2
    wrong = with_settings(config, {"mesh.sampling": (1, 1, 8)})
    with pytest.raises(UserError, match=r"fit 4 devices.*there are 2 processes, and this"):
        plan_programs.planned_programs(wrong, topology)["decode"]()


def test_the_command_writes_the_plan(tmp_path):
    out = tmp_path / "plan.json"
    arguments = "--config=configs/smoke.py", "--topology=cpu:2", f"--out={out}"
    printed = finish(command("train.plan", *arguments, flags=SOON))
    written = json.loads(out.read_text())
    assert written["topology"] == "cpu:2"
    assert [row["program"] for row in written["rows"]] == PROGRAMS
    assert "chip-hours" in printed


SMALL = """
import train.launch, train.plan
from expandr_jax.runtime import chips
chips.cpu = lambda devices: chips.Chip("cpu", 1000, 1e12, 1e11, 1e10, "made up")
train.launch.launch(train.plan.main, train.plan.define_flags)
"""


def test_the_command_ends_with_one_and_says_what_to_change_where_something_does_not_fit(tmp_path):
    out = tmp_path / "plan.json"
    arguments = ["--config=configs/smoke.py", "--topology=cpu:2", "--only=exact search"]
    done = subprocess.run(
        [sys.executable, "-c", SMALL, *arguments, f"--out={out}"],
        cwd=ROOT, env={**os.environ, "XLA_FLAGS": ""}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines()[-1].startswith("does not fit: exact search: needs ")
    assert "; try fewer rows in a block" in done.stdout
    (row,) = json.loads(out.read_text())["rows"]
    assert not row["fits"]


def test_a_search_is_planned_with_the_blocks_that_it_would_have(config):
    smaller = with_settings(config, {"search.exact.block_rows": 1000})
    assert RetrieverShapes(smaller, machine()).search().arguments[3].shape[0] == 1000


def test_only_what_was_asked_for_is_compiled(config):
    topology = machine()
    result = plan.plan(config, topology, QUIET, only=["exact search"])
    assert [row["program"] for row in result["rows"]] == ["exact search"]
    assert result["paper_chip_hours"] is None
    with pytest.raises(UserError, match="--only=decoding: expected some of contrastive step"):
        plan.plan(config, topology, QUIET, only=["decoding"])


def test_a_mistake_ends_the_command_with_two(tmp_path):
    process = command("train.plan", "--config=configs/smoke.py", "--topology=v9:1")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2
    assert output.startswith("error: --topology=v9:1: expected something like")


@pytest.mark.parametrize(
    ("out", "message"), [(".", "is a directory"), ("nowhere/plan.json", "there is no directory")]
)
def test_a_place_that_cannot_take_the_plan_is_refused_before_it_is_made(tmp_path, out, message):
    process = command(
        "train.plan", "--config=configs/smoke.py", "--topology=cpu:2", f"--out={tmp_path / out}"
    )
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2
    assert output.startswith(f"error: --out={tmp_path / out}: {message}")


def test_a_search_proposes_settings_that_fit(config, monkeypatch):
    monkeypatch.setattr(plan_search, "SEARCHED", {"encoding": plan_search.SEARCHED["encoding"]})
    [found] = plan_search.propose(config, machine(), QUIET)
    assert 0 < found["bytes_total"] <= machine().chip.capacity
    mesh = found["settings"]["mesh.encoding"]
    assert math.prod(mesh) == 8
    assert plan_search.config_flags(found["settings"]) == f'--config.mesh.encoding="{mesh}"'
    small = machine(chips.Chip("cpu", 1000, 1e12, 1e11, 1e10, ""))
    assert plan_search.propose(config, small, QUIET) == []


def test_a_search_prefers_no_recomputation_where_that_fits(config):
    order = sorted(
        plan_search._estimates(config, machine(), "dpo"),
        key=lambda item: item[0],
    )
    assert order[0][1]["generator.remat"] == "none"
    # With room for the arguments alone, what is kept for the backward pass must be little.
    planned = order[0][2]
    room = plan_search.bytes_on_device(planned.arguments) + planned.resident + 1
    tight = machine(chips.Chip("cpu", room, 1e12, 1e11, 1e10, ""))
    assert len(list(plan_search._estimates(config, tight, "dpo"))) < len(order)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("cpu", None),
    ],
)
def test_a_device_is_known_by_what_jax_calls_it(kind, peak):
    chip = chips.known_chip(kind)
    assert (chip and chip.flops) == peak


def test_sigterm_ends_what_has_nothing_to_go_on_from():
    arguments = "--config=configs/smoke.py", "--topology=cpu:2"
    process = command("train.plan", *arguments, flags=SOON)
    first = ""
    while not first.endswith(f"{PROGRAMS[-1]}\n"):  # The line that says what is compiled.
        first += (line := process.stdout.readline())
        assert line, first
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=120)
    assert process.returncode == 143, first + rest
    assert rest.splitlines()[-1] == "stopped by SIGTERM"
