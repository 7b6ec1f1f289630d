"""Runs of train.policy: they end with the same bits however often they are killed, and say why."""

import dataclasses
import gc
import io
import json
import shutil
import signal
import time

import pytest
from rich.console import Console

from configs import smoke
from expandr_jax.errors import UserError
from expandr_jax.files.records import write_json
from expandr_jax.objectives.policy_loop import MOST_BACKS
from expandr_jax.objectives.registry import STEP_B
from tests.commands import (
    SPREAD,
    ended,
    error_of,
    finish,
    start,
    start_processes,
    step_metrics,
)
from train import policy

GRPO = {
    "queries": 8, "samples": 4, "steps": 6, "max_new_tokens": 8, "learning_rate": 1e-2,
    "save_every": 2, "watch_steps": 2,
}  # fmt: skip
ADAPTER = "export/adapter/adapter_model.safetensors"


def config_of(**grpo):
    config = smoke.get_config()
    config.step_b = "grpo"
    config.reward.update(
        positive=0.0, answer=0.0, corpus=0.0, gain=1.0, gain_measure="softmax_share"
    )
    config.grpo.update(GRPO | grpo)
    return config


def train(workdir, **grpo):
    return policy.train_alone(config_of(**grpo), workdir, Console(quiet=True))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The workdir of a run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("policy") / "run"
    train(workdir)
    return workdir


def same(workdir, whole):
    assert (workdir / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()
    assert step_metrics(workdir) == step_metrics(whole)
    texts = [f"round-0/policy-texts-{step}.jsonl" for step in (0, 3, 6)]
    for name in (*texts, "work/round-0/policy-watch.jsonl"):
        assert (workdir / name).read_bytes() == (whole / name).read_bytes(), name


def test_each_step_is_logged_and_its_texts_are_kept(whole):
    for line in (whole / "metrics.jsonl").read_text().splitlines():
        costs = json.loads(line)
        parts = costs["rollout_seconds"] + costs["update_seconds"]
        assert costs["step_seconds"] >= parts
        assert (
            costs["sampling_seconds"] + costs["encoding_seconds"] + costs["search_seconds"] < parts
        )
    steps = step_metrics(whole)
    assert [row["step"] for row in steps] == [*range(6)]
    for row in steps:
        assert row["reward"] == pytest.approx(row["reward_gain"])
        assert -1 <= row["reward"] <= 1
        assert row["mismatch"] <= row["largest_mismatch"] < 1e-4
        assert row["kl"] >= 0
        assert row["clip_fraction"] == 0  # An update a step: its policy is the one that sampled.
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert steps[-1]["kl"] > 1e-5
    before, midway, after = (
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (whole / "round-0" / f"policy-texts-{step}.jsonl" for step in (0, 3, 6))
    )
    queries = [row["query_id"] for row in before]
    assert len(set(queries)) == len(queries) == 8
    assert [row["query_id"] for row in midway] == [row["query_id"] for row in after] == queries
    assert before != midway != after
    assert all(row["reward"] == pytest.approx(row["reward_terms"]["gain"]) for row in after)


def test_stopped_within_a_rollout_it_ends_as_if_it_had_not_been(whole, tmp_path, monkeypatch):
    workdir, seen = tmp_path / "run", []
    make = policy.make_score

    def stopping(*arguments):
        score = make(*arguments)

        def until_the_fifth(groups):
            seen.append(groups)
            if len(seen) == 5:  # The step after the second checkpoint, when all is sampled.
                raise KeyboardInterrupt
            return score(groups)

        return until_the_fifth

    monkeypatch.setattr(policy, "make_score", stopping)
    with pytest.raises(KeyboardInterrupt):
        train(workdir)
    assert not (workdir / ADAPTER).exists()
    monkeypatch.undo()
    # Of a program that has ended nothing writes any more: so it is to be here.
    deadline = time.monotonic() + 60
    while list(workdir.glob("checkpoints/**/*.orbax-checkpoint-tmp")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    train(workdir)
    same(workdir, whole)


@pytest.mark.slow
def test_a_collapse_ends_it_with_the_last_good_adapter(whole, tmp_path):
    workdir = tmp_path / "run"
    with pytest.raises(UserError) as error:
        train(workdir, watch_kl=1e-9, steps=12)
    message = str(error.value)
    assert "step 6: collapsed: KL to the base" in message
    assert "the adapter of step 4 is in" in message
    good = workdir / "round-0" / "last-good-adapter" / "adapter_model.safetensors"
    assert good.exists()
    assert not (workdir / "export").exists()
    # What it was about to learn from is shown, too.
    assert '<th scope="col">step 6</th>' in (workdir / "report.html").read_text()
    del error
    gc.collect()  # The run in it had the workdir's lock.
    with pytest.raises(UserError, match="step 6: collapsed"):  # The same command says it again.
        train(workdir, watch_kl=1e-9, steps=12)


@pytest.mark.slow
def test_it_goes_back_with_half_the_rate_and_at_last_ends(tmp_path):
    workdir = tmp_path / "run"
    with pytest.raises(UserError, match="collapsed"):
        train(workdir, watch_kl=1e-9, steps=12, on_collapse="back")
    path = workdir / "work" / "round-0" / "policy-collapses.jsonl"
    (path,) = path.parent.glob("policy-collapses.jsonl*")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    backs = [row for row in rows if "to" in row]
    assert [row["to"] for row in backs] == [4] * MOST_BACKS
    norms = {row["step"]: row["kl"] for row in step_metrics(workdir)}
    assert sorted(norms) == [*range(6)]


def test_settings_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"grpo\.queries 9.*multiple of"):
        train(tmp_path / "a", queries=9, accumulation=2)
    with pytest.raises(UserError, match=r"grpo\.queries 64: there are 8 queries"):
        train(tmp_path / "b", queries=64)
    config = config_of()
    config.step_b, config.reward.length, config.reward.length_cache = "dpo", 1.0, 8
    config.grpo.max_new_tokens = 7
    with pytest.raises(UserError, match=r"^reward\.length_cache is 8; .*grpo\.max_new_tokens, 7"):
        policy.train_alone(config, tmp_path / "c", Console(quiet=True))
    assert not (tmp_path / "c").exists()


def test_a_config_for_files_is_taken_as_one_for_steps(whole, tmp_path):
    """Before kinds of step B had names of their own, any was; and its runs go on."""
    workdir = shutil.copytree(whole, tmp_path / "run")
    record = json.loads((workdir / "config.json").read_text())
    record["config"]["step_b"] = "dpo"  # As such a run kept it.
    write_json(workdir / "config.json", record)
    shutil.rmtree(workdir / "export")
    config, output = config_of(), io.StringIO()
    config.step_b = "dpo"
    policy.train_alone(config, workdir, Console(file=output, width=200))
    assert "step_b is 'dpo', which learns from files; here it is 'grpo'" in output.getvalue()
    same(workdir, whole)
    assert json.loads((workdir / "config.json").read_text()) == record


@pytest.mark.slow
def test_a_kind_of_another_name_is_told_by_it(tmp_path, monkeypatch):
    monkeypatch.setitem(STEP_B, "mine", dataclasses.replace(STEP_B["grpo"], phase="MINE"))
    config = config_of(steps=2)
    config.step_b = "mine"
    policy.train_alone(config, tmp_path, Console(quiet=True))
    assert {row["phase"] for row in step_metrics(tmp_path)} == {"MINE"}
    timings = json.loads((tmp_path / "timings.json").read_text())
    assert "MINE, round 0" in [row["phase"] for row in timings["phases"]]
    assert "2 steps" in (tmp_path / "report.html").read_text()


OVERRIDES = [
    "--config.step_b=grpo", "--config.reward.positive=0.0", "--config.reward.answer=0.0",
    "--config.reward.corpus=0.0", "--config.reward.gain=1.0",
    "--config.reward.gain_measure=softmax_share",
    *(f"--config.grpo.{name}={value}" for name, value in GRPO.items()),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM])
def test_killed_at_any_instant_it_ends_with_the_same_bits(tmp_path, kind):
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    finish(start(whole, *OVERRIDES, module="train.policy"))
    for wait in (8.0, 11.0, 14.0):
        process = start(workdir, *OVERRIDES, module="train.policy")
        end = time.monotonic() + wait
        while time.monotonic() < end and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(kind)
        process.communicate(timeout=120)
    finish(start(workdir, *OVERRIDES, module="train.policy"))
    same(workdir, whole)


@pytest.mark.slow
def test_two_processes_that_share_the_parameters_learn_the_same(tmp_path):
    several = start_processes(tmp_path / "two", 2, *OVERRIDES, *SPREAD, module="train.policy")
    outputs = ended(several)
    assert [process.returncode for process in several] == [0, 0], outputs
    finish(start(tmp_path / "one", *OVERRIDES, module="train.policy"))
    one, two = (step_metrics(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) == 6
    for a, b in zip(one, two, strict=True):
        assert a.pop("phase") == b.pop("phase") == "GRPO"
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_the_whole_of_training_with_it(tmp_path):
    workdir = tmp_path / "run"
    overrides = [*OVERRIDES, "--config.rounds=2", "--config.reward.answer=1.0"]
    finish(start(workdir, *overrides))
    results = json.loads((workdir / "results.json").read_text())
    assert {"expandr", "expandr-round0"} <= {row["system"] for row in results["rows"]}
    steps = [row for row in step_metrics(workdir) if row["phase"] == "GRPO"]
    assert [row["round"] for row in steps] == [0] * 6 + [1] * 6
    assert all(0 < row["reward_answer"] <= 1 for row in steps)
    assert "all is done" in finish(start(workdir, *overrides))
    message = error_of(start(workdir, "--config.step_b=ppo").communicate(timeout=120)[0])
    assert "step_b is 'ppo'; expected one of dpo, reward-sft, grpo" in message
