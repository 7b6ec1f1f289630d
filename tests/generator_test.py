"""Training the adapter alone: formats in, PEFT out, dev pairs, accumulation, exact restarts."""

import collections
import dataclasses
import gc
import io
import json
import operator
import os
import shutil
import signal

import jax
import numpy as np
import pytest
from peft import PeftModel
from rich.console import Console
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from configs import dpo, smoke
from expandr_jax.config import read_config
from expandr_jax.errors import UserError
from expandr_jax.files.records import Journal, read_jsonl, write_jsonl
from expandr_jax.objectives import preference
from expandr_jax.objectives.adapter import AdapterBatches, hold_out
from expandr_jax.objectives.objective import ObjectiveSettings
from expandr_jax.training import setup
from expandr_jax.training.checkpoint import Checkpoints
from expandr_jax.weights.adapter import load_adapter
from expandr_jax.weights.hf import load_generator
from tests.commands import ROOT, SOON, command, finish, step_metrics
from train import generator
from train.export import export_one

COUNT = 27
TINY_LLAMA = ROOT / "configs" / "tiny" / "tiny-llama"


@pytest.fixture(scope="module")
def preferences(tmp_path_factory):
    """Pairs in which the answer "axis 1" is preferred to "no", in two of TRL's formats."""
    path = tmp_path_factory.mktemp("pairs") / "preferences.jsonl"
    rows = []
    for i in range(COUNT):
        user = {"role": "user", "content": f"shape {i}?"}
        prompt = f"<|im_start|>user\nshape {i}?<|im_end|>\n<|im_start|>assistant\n"
        texts = f"axis 1 {i}", f"no {i}"
        if i % 2:
            rows.append({"prompt": prompt, "chosen": texts[0], "rejected": texts[1]})
        else:
            answers = [[{"role": "assistant", "content": text}] for text in texts]
            rows.append({"prompt": [user], "chosen": answers[0], "rejected": answers[1]})
    write_jsonl(path, rows)
    return path


def make_config(preferences, **settings):
    config = smoke.get_config()
    config.data.kind = "preferences"
    config.data.path = str(preferences)
    config.dpo.update(
        prompt_length=64, response_length=16, batch_size=8, accumulation=2, dev_share=0.3,
        epochs=8.0, learning_rate=1e-2, save_every=3, eval_every=2, **settings,
    )  # fmt: skip
    return config


def train(config, workdir):
    output = io.StringIO()
    generator.train_adapter(config, workdir, Console(file=output, width=200))
    return output.getvalue()


def metrics(workdir, phase):
    return [row for _, row in read_jsonl(workdir / "metrics.jsonl", {}) if row["phase"] == phase]


@pytest.fixture(scope="module")
def trained(preferences, tmp_path_factory):
    """An uninterrupted run: (workdir, what it printed)."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    return workdir, train(make_config(preferences), workdir)


# 27 pairs: 8 held out, 19 to train on, so 2 batches of 8 an epoch, 16 batches, 8 updates.
BATCHES, UPDATES = 16, 8


def test_it_learns_the_preference_and_says_so(trained):
    workdir, output = trained
    steps = metrics(workdir, "generator")
    assert [row["step"] for row in steps] == list(range(BATCHES))
    dev = metrics(workdir, "generator-dev")
    assert [row["step"] for row in dev] == [4, 8, 12, 16]
    assert dev[-1]["loss"] < dev[0]["loss"] < np.log(2)
    assert dev[-1]["accuracy"] == 1.0
    # A new adapter is the base; what both responses lose or gain is in the rewards, too.
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-4)
    beta = make_config(None).dpo.beta
    for row in steps + dev:
        rewards = row["reward_chosen"] + row["reward_rejected"]
        assert row["kl"] == pytest.approx(rewards / (2 * beta), rel=1e-3, abs=1e-4)
    assert f"{COUNT} pairs" in output
    assert f"dev loss {dev[-1]['loss']:.4f}" in output
    assert f"adapter: {workdir / 'export' / 'adapter'}" in output
    for name in ("config.json", "timings.json", "data/SOURCE.json"):
        assert json.loads((workdir / name).read_text())


@pytest.mark.parametrize("dtype", ["float32", "source"])
def test_the_merged_generator_and_the_base_are_written_from_the_adapter(trained, tmp_path, dtype):
    workdir = trained[0]
    export_one(workdir, tmp_path / "merged", "generator", dtype)
    export_one(workdir, tmp_path / "adapter", "adapter", dtype)
    export_one(workdir, tmp_path / "base", "base", dtype)
    before, after = (load_file(d / "model.safetensors") for d in (TINY_LLAMA, tmp_path / "base"))
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    expected = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    for name, value in expected.state_dict().items():
        np.testing.assert_allclose(merged[name], value, atol=1e-6, err_msg=name)
    assert any(np.abs(merged[name].numpy() - value).max() > 1e-4 for name, value in before.items())
    with pytest.raises(UserError, match=r"has no retriever, so no retriever can be written"):
        export_one(workdir, tmp_path / "out", "retriever", dtype)


def test_a_run_that_has_not_finished_has_no_generator_to_write(trained, tmp_path):
    (tmp_path / "config.json").write_text((trained[0] / "config.json").read_text())
    for kind in ("generator", "adapter"):
        with pytest.raises(UserError, match=r"export/adapter: not there; let train.generator fin"):
            export_one(tmp_path, tmp_path / "out", kind, "float32")


def test_the_adapter_loads_in_peft(trained):
    base = AutoModelForCausalLM.from_pretrained(TINY_LLAMA)
    model = PeftModel.from_pretrained(base, trained[0] / "export" / "adapter")
    ours = load_file(trained[0] / "export" / "adapter" / "adapter_model.safetensors")
    theirs = model.state_dict()
    assert len(ours) == 8  # Two layers, two projections, two matrices.
    for name, value in ours.items():
        np.testing.assert_array_equal(theirs[name.replace(".weight", ".default.weight")], value)


class Killed(BaseException):
    """Ends a process in mid-work, as far as the files are concerned."""


def train_in_two_parts(config, workdir, monkeypatch, stop):
    """Trains, is stopped at the second of what is kept, and goes on."""
    owner, name = (Journal, "append") if "killed" in stop else (Checkpoints, "save")
    original, calls = getattr(owner, name), []

    def interrupted(self, *arguments):
        calls.append(arguments)
        if len(calls) == 2 and "killed" in stop:
            raise Killed
        original(self, *arguments)
        if len(calls) == 2:  # Saves again after the next batch, between two updates.
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        with pytest.raises(Killed if "killed" in stop else SystemExit):
            train(config, workdir)
    gc.collect()  # Closes the stopped run's lock, as the end of its process would.
    train(config, workdir)


def check_equal(workdir, other):
    for file in (
        "export/adapter/adapter_model.safetensors",
        "round-0/best-adapter/adapter_model.safetensors",
    ):  # fmt: skip
        assert (workdir / file).read_bytes() == (other / file).read_bytes(), file
    assert step_metrics(workdir) == step_metrics(other)


@pytest.mark.parametrize("stop", ["killed before a figure is kept", "SIGTERM after a save"])
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(
    preferences, trained, tmp_path, monkeypatch, stop
):
    train_in_two_parts(make_config(preferences), tmp_path / "run", monkeypatch, stop)
    check_equal(tmp_path / "run", trained[0])


@pytest.mark.slow
def test_an_adapter_on_four_bits_learns_nearly_as_on_floats_and_goes_on(
    preferences, trained, tmp_path, monkeypatch
):
    config = make_config(preferences)
    config.generator.weights = "nf4"
    train(config, tmp_path / "whole")
    train_in_two_parts(config, tmp_path / "run", monkeypatch, "SIGTERM after a save")
    check_equal(tmp_path / "run", tmp_path / "whole")
    ours, theirs = (metrics(path, "generator-dev")[-1] for path in (tmp_path / "run", trained[0]))
    assert ours["accuracy"] == theirs["accuracy"] == 1.0
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.2)
    first, other = (metrics(path, "generator")[0] for path in (tmp_path / "run", trained[0]))
    assert first["grad_norm"] == pytest.approx(other["grad_norm"], rel=0.2)


def test_a_restart_whose_steps_are_done_tokenizes_no_text(
    preferences, trained, tmp_path, monkeypatch
):
    workdir = tmp_path / "run"
    shutil.copytree(trained[0], workdir)
    (workdir / ".lock").unlink()
    monkeypatch.setattr(preference, "tokenized", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(AdapterBatches, "reference", lambda *_: 1 / 0)
    train(make_config(preferences), workdir)
    check_equal(workdir, trained[0])


def test_the_best_adapter_is_kept_and_used_where_asked(preferences, trained, tmp_path, monkeypatch):
    seen = []

    def evaluate(self, tree, pairs, reference):
        seen.append(jax.tree.map(np.array, tree))
        return {"loss": abs(len(seen) - 3.0), "accuracy": 0.0, "margin": 0.0}  # Least at the third.

    monkeypatch.setattr(AdapterBatches, "evaluate", evaluate)
    train(make_config(preferences, keep_best=True), tmp_path / "run")
    shape = load_generator(str(TINY_LLAMA))[0].module.config
    assert len(seen) == UPDATES // 2
    for directory in ("round-0/best-adapter", "export/adapter"):
        kept = load_adapter(str(tmp_path / "run" / directory), shape)[1]
        jax.tree.map(np.testing.assert_array_equal, kept, seen[2])
    last = load_adapter(str(trained[0] / "export" / "adapter"), shape)[1]
    jax.tree.map(np.testing.assert_array_equal, last, seen[-1])
    best = load_adapter(str(trained[0] / "round-0" / "best-adapter"), shape)[1]
    losses = [row["loss"] for row in metrics(trained[0], "generator-dev")]
    jax.tree.map(np.testing.assert_array_equal, best, seen[int(np.argmin(losses))])


def test_the_settings_of_the_config_are_those_of_the_optimizer_and_the_loss(
    preferences, tmp_path, monkeypatch
):
    class Seen(Exception):
        pass

    def make_optimizer(*args, **options):
        raise Seen(args, options)

    monkeypatch.setattr(setup, "make_optimizer", make_optimizer)
    config = make_config(preferences, warmup_steps=3, clip_norm=0.7)
    with pytest.raises(Seen) as caught:
        train(config, tmp_path / "run")
    options = {"warmup": 3, "clip_norm": 0.7, "weight_decay": 0.0, "accumulation": 2}
    assert caught.value.args == ((1e-2, UPDATES), options)
    config.dpo.update(
        loss="robust",
        beta=0.2,
        label_smoothing=0.3,
        length_normalized=True,
        sft_weight=0.4,
        chunk=5,
    )
    expected = ObjectiveSettings(
        beta=0.2, label_smoothing=0.3, length_normalized=True, sft_weight=0.4, chunk=5
    )
    found = read_config(config).dpo
    for field in dataclasses.fields(ObjectiveSettings):
        assert getattr(found, field.name) == getattr(expected, field.name)


@pytest.mark.slow
def test_simpo_learns_the_preference_and_runs_no_reference(preferences, tmp_path, monkeypatch):
    monkeypatch.setattr(AdapterBatches, "reference", lambda *_: 1 / 0)
    config = make_config(preferences, loss="simpo")
    config.dpo.beta = 2.0
    train(config, tmp_path / "run")
    dev = metrics(tmp_path / "run", "generator-dev")
    assert dev[-1]["loss"] < dev[0]["loss"]
    assert dev[-1]["accuracy"] == 1.0
    assert "kl" not in dev[-1]
    assert not list((tmp_path / "run" / "work").glob("reference-*"))


def test_the_config_of_this_program_holds_pairs_out():
    """Else dpo.eval_every would have nothing to evaluate, and there would be no best adapter."""
    config = dpo.get_config().dpo
    assert 0 < config.dev_share < 0.5
    assert config.eval_every > 0


def test_batches_that_the_devices_cannot_share_are_refused(preferences, tmp_path):
    config = make_config(preferences)
    config.dpo.batch_size = 6
    with pytest.raises(UserError, match=r"batch_size 6 .* a multiple of 8"):
        train(config, tmp_path / "run")
    config = make_config(preferences)
    config.dpo.dev_share = 0.8
    with pytest.raises(UserError, match=r"6 preference pairs .* expected 8 or more"):
        train(config, tmp_path / "few")


def test_a_bad_pair_and_a_file_that_changes_are_refused(preferences, tmp_path, monkeypatch):
    path = tmp_path / "pairs.jsonl"
    path.write_text(preferences.read_text() + '{"prompt": "a", "chosen": "b", "rejected": "b"}\n')
    with pytest.raises(UserError, match=rf"pairs.jsonl:{COUNT + 1}: chosen and rejected"):
        train(make_config(path), tmp_path / "bad")
    path.write_text(preferences.read_text())
    with monkeypatch.context() as patch:
        patch.setattr(generator, "train_generator", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(make_config(path), tmp_path / "run")
    gc.collect()
    path.write_text(preferences.read_text().replace("no 3", "nothing 3"))
    with pytest.raises(UserError, match="has changed since this run began"):
        train(make_config(path), tmp_path / "run")


def test_pairs_longer_than_the_model_was_made_for_are_said(preferences, tmp_path, monkeypatch):
    path = tmp_path / "pairs.jsonl"
    row = {"prompt": "a" * 200, "chosen": "b" * 60, "rejected": "c"}
    path.write_text(preferences.read_text() + json.dumps(row) + "\n")
    monkeypatch.setattr(AdapterBatches, "choose_sizes", lambda *_, **__: 1 / 0)
    for length, said in ((56, False), (57, True)):
        config = make_config(path)
        config.dpo.update(prompt_length=200, response_length=length)
        output = io.StringIO()
        with pytest.raises(ZeroDivisionError):
            generator.train_adapter(config, tmp_path / f"{length}", Console(file=output, width=200))
        line = (
            "a prompt and a response have up to 257 tokens together; the generator was made for 256"
        )
        assert (line in output.getvalue()) == said
        gc.collect()


def test_a_pair_that_differs_behind_the_limit_alone_is_refused(preferences, tmp_path):
    """It is the same response twice by then: a loss without a slope, and never accurate."""
    texts = {side: "axis " * 15 + end for side, end in (("chosen", "1"), ("rejected", "2"))}
    path = tmp_path / "pairs.jsonl"
    path.write_text(preferences.read_text() + json.dumps({"prompt": "a", **texts}) + "\n")
    with pytest.raises(
        UserError, match=rf"pairs.jsonl:{COUNT + 1}: .* the same 16 tokens once cut"
    ):
        train(make_config(path), tmp_path / "run")


def test_the_program_drops_bad_pairs_where_it_may(preferences, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(preferences.read_text() + '{"prompt": "a", "chosen": "b"}\n')
    arguments = ["--config=configs/smoke.py", "--config.data.kind=preferences"]
    arguments += [f"--config.data.path={path}", f"--workdir={tmp_path / 'run'}"]
    arguments += ["--config.dpo.prompt_length=64", "--config.dpo.epochs=0.2"]
    arguments += ["--config.dpo.on_bad_pair=drop"]
    output = finish(command("train.generator", *arguments, flags=SOON))
    assert f"{COUNT} pairs; 1 dropped: missing field" in output
    assert (tmp_path / "run" / "export" / "adapter" / "adapter_config.json").exists()


def test_a_damaged_best_adapter_is_not_used(preferences, trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained[0], workdir)
    (workdir / ".lock").unlink()
    shutil.rmtree(workdir / "export")
    path = workdir / "round-0" / "best-adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=r"best-adapter: was damaged; remove .*/generator"):
        train(make_config(preferences), workdir)
    gc.collect()
    shutil.rmtree(workdir / "checkpoints" / "generator")
    train(make_config(preferences), workdir)
    assert step_metrics(workdir) == step_metrics(trained[0])
    name = "round-0/best-adapter/adapter_model.safetensors"
    assert (workdir / name).read_bytes() == (trained[0] / name).read_bytes()


def test_pairs_are_held_out_by_their_prompts():
    """Sorted rows are of one kind after the other; dev must not be of the first kind alone."""
    rows = [{"prompt": f"{kind} {i}", "chosen": "a", "rejected": "b"}
            for kind in ("first", "second") for i in range(100) for _ in range(2)]  # fmt: skip
    dev, others = map(list, hold_out(rows, 0.2, operator.itemgetter("prompt")))
    assert len(dev) == 80
    assert len(others) == 320
    assert sorted(map(str, dev + others)) == sorted(map(str, rows))
    kinds = collections.Counter(row["prompt"].split()[0] for row in dev)
    assert min(kinds["first"], kinds["second"]) > 25
    assert {row["prompt"] for row in dev}.isdisjoint(row["prompt"] for row in others)
    assert [row for row in rows if row in others] == others
    none, every = hold_out(rows, 0.0, operator.itemgetter("prompt"))
    assert ([*none], [*every]) == ([], rows)
