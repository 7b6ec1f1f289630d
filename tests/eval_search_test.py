"""`eval.search` and the README's example, on a finished run."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import jax
import pytest
from rich.console import Console

from configs import base
from eval.finished import fitting_mesh, open_finished
from expandr_jax.errors import UserError
from expandr_jax.expansion.expand import drawing, expansion_text
from expandr_jax.expansion.prompts import strip_lead_in
from expandr_jax.files.records import read_jsonl
from expandr_jax.generation.requests import Request
from tests.commands import ROOT, command


def test_it_shows_the_expansion_and_both_rankings_and_loads_once(smoke):
    arguments = [f"--workdir={smoke[0]}", "scale the gradient", "--count=3", "--interactive"]
    output = subprocess.run(
        [sys.executable, "-m", "eval.search", *arguments], cwd=ROOT, text=True, timeout=120,
        input="sort a list\n\nscale the gradient\n", capture_output=True, check=True,
        env={**os.environ, "XLA_FLAGS": ""},
    ).stdout  # fmt: skip
    for part in ("expansion:", "query alone", "query + expansion", "search", "write passages"):
        assert output.count(part) >= 3
    assert output.count("load models") == 1
    first, *_, last = re.split(r"(?=expansion:)", output)[1:]
    assert first.split("write passages")[0] == last.split("write passages")[0]


def test_it_samples_as_the_run_s_evaluation_did(smoke):
    workdir, _ = smoke
    run = open_finished(workdir)
    config = run.config
    rows = [
        row
        for _, row in read_jsonl(workdir / "evaluation" / "expansions.jsonl", {})
        if row["system"] == "expandr"
    ]
    settings = config.expansion
    requests = [
        Request(
            f"evaluation/{row['query_id']}", row["sample"], expansion_text(settings, row["query"]),
            settings.temperature, **drawing(settings),
        )
        for row in rows
    ]  # fmt: skip
    sampler = run.sampler(Console(quiet=True))
    made = {(c.id, c.sample): (c, t) for c, t in sampler.generate(None, requests, requests)}
    same = 0
    for request, row in zip(requests, rows, strict=True):
        completion, text = made[request.id, request.sample]
        equal = strip_lead_in(text).strip() == row["expansion"]
        # The adapter is merged into the weights here, which rounds otherwise.
        assert equal or completion.near_ties
        same += equal
    assert same > len(rows) * 0.9


@pytest.mark.parametrize("devices", [1, 3])
def test_a_run_of_a_larger_machine_is_asked_on_the_devices_there_are(smoke, monkeypatch, devices):
    workdir, _ = smoke
    run = open_finished(workdir)
    config = run.config
    mesh = dataclasses.replace(config.mesh, data=64, encoding=(8, 4, 2), sampling=(16, 2, 2))
    generator = dataclasses.replace(config.generator, slots=64)
    config = dataclasses.replace(config, mesh=mesh, generator=generator)
    here = jax.devices()[:devices]
    monkeypatch.setattr(jax, "devices", lambda: here)
    assert fitting_mesh(config, "encoding").devices.size == devices
    sampler = dataclasses.replace(run, config=config).sampler(Console(quiet=True))
    assert (sampler.mesh.devices.size, sampler.settings.slots) == (devices, {1: 64, 3: 66}[devices])
    drawn = drawing(config.expansion)
    requests = [Request("q", i, "Sorts a list in place.", 1.0, **drawn) for i in range(2)]
    assert len(list(sampler.generate(None, requests, requests))) == 2


def refused(*arguments: str) -> str:
    process = command("eval.search", *arguments)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output
    assert "Traceback" not in output
    return output


def test_mistakes_get_one_line(smoke, tmp_path):
    assert "not a finished run" in refused(f"--workdir={tmp_path}", "query")
    assert "missing" in refused(f"--workdir={smoke[0]}")
    assert "empty" in refused(f"--workdir={smoke[0]}", "  ")
    assert "--workdir" in refused("query")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"config": []}', r"config\.json: not a run's config"),
        ("[]", r"config\.json: not a run's config"),
        ('{"config": {"seed": 0}}', r"config\.json: .*: rounds is missing"),
    ],
)
def test_a_config_that_cannot_be_read_gets_one_line(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "results.json").write_text('{"chosen": {"expandr": {}}}')
    (tmp_path / "export" / "generator").mkdir(parents=True)
    with pytest.raises(UserError, match=message):
        open_finished(tmp_path)


def test_a_mistyped_mesh_is_told_and_not_replaced_by_all_devices(tmp_path):
    config = base.get_config().to_dict()
    config["mesh"]["encoding"] = (1, 2)
    (tmp_path / "config.json").write_text(json.dumps({"config": config}))
    (tmp_path / "results.json").write_text('{"chosen": {"expandr": {}}}')
    (tmp_path / "export" / "generator").mkdir(parents=True)
    with pytest.raises(UserError, match=r"mesh\.encoding is \(1, 2\); expected \(data, fsdp, tens"):
        open_finished(tmp_path)


def test_the_readme_s_example_runs(smoke):
    workdir, _ = smoke
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line.strip()]) == 10
    code = code.replace("runs/quickstart", str(workdir))
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    texts = ("Pads an array.", "Sorts a list in place.", "Computes the inverse of a matrix.")
    assert result.stdout.strip() in texts
