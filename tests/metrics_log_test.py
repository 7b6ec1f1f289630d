"""Figures of steps: lines that are damaged, TensorBoard's file, Weights & Biases."""

import json
import struct
import sys
import types

import pytest
from tensorboardX.proto.event_pb2 import Event

from expandr_jax.errors import UserError
from expandr_jax.runtime.metrics_log import MetricsLog


def events(workdir):
    """The events of a TFRecord file: length, its checksum, that many bytes, their checksum."""
    (path,) = (workdir / "tensorboard").iterdir()
    data = path.read_bytes()
    while data:
        (size,) = struct.unpack("Q", data[:8])
        yield Event.FromString(data[12 : 12 + size])
        data = data[16 + size :]


def test_every_step_is_in_both_files(tmp_path):
    log = MetricsLog(tmp_path)
    log.write("retriever", 0, 0, {"loss": 2.0})
    log.write("retriever", 0, 1, {"loss": 1.5}, {"step_seconds": 0.5})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"phase": "retriever", "round": 0, "step": 0, "loss": 2.0},
        {"phase": "retriever", "round": 0, "step": 1, "loss": 1.5, "step_seconds": 0.5},
    ]
    seen = [
        (event.step, value.tag, value.simple_value)
        for event in events(tmp_path)
        for value in event.summary.value
    ]
    assert seen == [
        (0, "retriever/round-0/loss", 2.0),
        (1, "retriever/round-0/loss", 1.5),
        (1, "retriever/round-0/step_seconds", 0.5),
    ]


def test_damaged_lines_are_dropped_and_counted(tmp_path):
    log = MetricsLog(tmp_path)
    for step in range(4):
        log.write("retriever", 0, step, {"loss": 1.0})
    log.close()
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\xff" + lines[1] + b"{}\n" + lines[3][:-5])
    log = MetricsLog(tmp_path)
    assert log.dropped == 2  # The last was cut, as by a kill.
    assert path.read_bytes() == lines[0]
    log.rewind("retriever", 0, 0)
    assert path.read_bytes() == b""


def test_weights_and_biases_gets_each_step_where_asked(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "wandb", None)
        with pytest.raises(UserError, match="wandb is not installed"):
            MetricsLog(tmp_path, "project")
    started, logged = [], []

    def init(**settings):
        started.append(settings)
        return types.SimpleNamespace(log=logged.append, finish=lambda: logged.append("end"))

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for _ in range(2):
        log = MetricsLog(tmp_path, "project")
        log.write("retriever", 1, 3, {"loss": 2.0})
        log.close()
    assert started[0] == started[1]  # A restart goes on with the same run.
    assert started[0]["project"] == "project"
    assert logged == 2 * [{"retriever/round-1/loss": 2.0, "retriever/round-1/step": 3}, "end"]
