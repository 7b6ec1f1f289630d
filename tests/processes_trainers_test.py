"""Several processes beside the smoke run: each trainer alone, two rounds, damaged checkpoints."""

import json
import pathlib
import signal
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.commands import ROOT, SPREAD, finish, start, start_processes, step_metrics

pytestmark = pytest.mark.slow

DATA = ROOT / "configs" / "tiny"


def same_steps(ours: pathlib.Path, theirs: pathlib.Path) -> None:
    """Asserts that the steps of two runs came to the same, up to rounding."""
    found, expected = step_metrics(ours), step_metrics(theirs)
    # Steps that were done again are logged again, after what had followed them.
    for lines in (found, expected):
        lines.sort(key=lambda line: (line["phase"], line["round"], line["step"]))
    assert len(found) == len(expected) > 4
    for one, other in zip(found, expected, strict=True):
        norms = one.pop("grad_norm", 0.0), other.pop("grad_norm", 0.0)
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)
        assert one == pytest.approx(other, abs=1e-5)


def same_results(ours: pathlib.Path, theirs: pathlib.Path) -> set[str]:
    """Asserts that two runs scored the same; returns the systems."""
    results = [json.loads((w / "results.json").read_text()) for w in (ours, theirs)]
    assert results[0]["rows"] == results[1]["rows"]
    return {row["system"] for row in results[1]["rows"]}


def same_weights(ours: pathlib.Path, theirs: pathlib.Path) -> None:
    """Asserts that two files of weights are equal, up to rounding."""
    found, expected = load_file(ours), load_file(theirs)
    assert list(found) == list(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=1e-5, err_msg=name)


def test_two_processes_train_a_retriever_on_triples(smoke, tmp_path):
    settings = [
        f"--config.data.path={smoke[0] / 'round-0' / 'triples.jsonl'}",
        f"--config.data.dev={smoke[0] / 'data'}",
        f"--config.retriever.source={DATA / 'tiny-bert'}",
        "--config.retriever.max_length=16", "--config.contrastive.batch_size=8",
        "--config.contrastive.epochs=2.0", "--config.contrastive.eval_every=3",
        "--config.contrastive.negatives=1", "--config.contrastive.learning_rate=1e-3",
    ]  # fmt: skip
    program = {"config": "configs/retriever.py", "module": "train.retriever"}
    one, two = tmp_path / "one", tmp_path / "two"
    finish(start(one, *settings, **program))
    for process in start_processes(two, 2, *settings, SPREAD[0], **program):
        finish(process)
    same_steps(two, one)
    dev = [(w / "work" / "round-0" / "retriever-dev.jsonl").read_text() for w in (two, one)]
    assert dev[0] == dev[1]
    same_weights(*(w / "export" / "retriever" / "model.safetensors" for w in (two, one)))


def test_two_processes_train_a_generator_on_pairs(smoke, tmp_path):
    settings = [
        f"--config.data.path={smoke[0] / 'round-0' / 'preferences.jsonl'}",
        f"--config.generator.source={DATA / 'tiny-llama'}",
        "--config.generator.compute_dtype=float32", "--config.dpo.batch_size=2",
        "--config.dpo.dev_share=0.25", "--config.dpo.eval_every=2", "--config.dpo.epochs=3.0",
        "--config.dpo.prompt_length=128", "--config.dpo.response_length=16",
    ]  # fmt: skip
    program = {"config": "configs/dpo.py", "module": "train.generator"}
    one, two = tmp_path / "one", tmp_path / "two"
    finish(start(one, *settings, **program))
    for process in start_processes(two, 2, *settings, SPREAD[1], **program):
        finish(process)
    same_steps(two, one)
    same_weights(*(w / "export" / "adapter" / "adapter_model.safetensors" for w in (two, one)))


def test_two_processes_in_two_rounds(tmp_path):
    rounds = ("--config.rounds=2", "--config.contrastive.epochs=1.0", "--config.dpo.epochs=1.0")
    one, two = tmp_path / "one", tmp_path / "two"
    finish(start(one, *rounds))
    for process in start_processes(two, 2, *rounds, *SPREAD):
        finish(process)
    same_steps(two, one)
    assert "expandr-round0" in same_results(two, one)


def test_two_processes_set_damaged_checkpoints_aside(smoke, tmp_path):
    workdir = tmp_path / "run"
    processes = start_processes(workdir, 2, *SPREAD)
    while not list((workdir / "work").glob("round-0/candidates.jsonl*")):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)
    processes[1].send_signal(signal.SIGKILL)
    for process in processes:
        process.communicate(timeout=60)
    for name, file in (("fine-tuned", "ocdbt.process_1/d/*"), ("retriever", "ocdbt.process_0/d/*")):
        steps = sorted((workdir / "checkpoints" / name).glob("[0-9]*"), key=lambda p: int(p.name))
        largest = max((steps[-1] / "state").glob(file), key=lambda p: p.stat().st_size)
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 1
        largest.write_bytes(content) if name == "fine-tuned" else largest.unlink()
    again = start_processes(workdir, 2, *SPREAD)
    output = [finish(process) for process in again]
    for name in ("fine-tuned", "retriever"):
        assert len(list((workdir / "checkpoints").glob(f"{name}-damaged/*"))) == 1, output
    same_steps(workdir, smoke[0])
    same_results(workdir, smoke[0])
