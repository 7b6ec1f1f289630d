"""A run that is killed, damaged or out of disk ends as if nothing had happened.

    .venv/bin/python -m pytest tests/kills_test.py -m slow -s

prints what was done to the run and what it took to end it.
"""

import os
import pathlib
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest

from tests.commands import finish, start, step_metrics, until

# Each stage's work is under way once this is there.
STAGES: dict[str, Callable[[pathlib.Path], bool]] = {
    "data": lambda w: (w / "config.json").exists(),
    "encode": lambda w: any((w / "work" / "vectors").glob("zero-shot.npy*")),
    "fine-tuned": lambda w: any((w / "checkpoints" / "fine-tuned").glob("[0-9]*")),
    "expand": lambda w: any((w / "work").glob("round-0/expansions.jsonl*")),
    "retriever": lambda w: any((w / "checkpoints" / "retriever").glob("[0-9]*")),
    "candidates": lambda w: any((w / "work").glob("round-0/candidates.jsonl*")),
    "answers": lambda w: any((w / "work").glob("round-0/answers-0.jsonl*")),
    "dpo": lambda w: any((w / "checkpoints" / "generator").glob("[0-9]*")),
    "evaluate": lambda w: any((w / "work").glob("evaluation-trained.jsonl*")),
    "export": lambda w: (w / "results.json").exists(),
}
SAME = (
    "results.json", "round-0/preferences.jsonl", "round-0/candidates.jsonl",
    "round-0/triples.jsonl", "round-0/expansions.jsonl", "evaluation/expansions.jsonl",
    "runs/expandr.trec", "data/corpus.jsonl", "export/retriever/model.safetensors",
    "export/adapter/adapter_model.safetensors",
)  # fmt: skip
WAYS = ("truncate", "flip", "delete", "empty")
KILLS = int(os.environ.get("EXPANDR_KILLS", "15"))  # At random instants.


def same(workdir: pathlib.Path, whole: pathlib.Path, *, later: bool = False) -> None:
    """Asserts that a run's files are those of an uninterrupted one.

    Steps that were done again are logged again; with `later`, after what had followed them.
    """
    for name in SAME:
        assert (workdir / name).read_bytes() == (whole / name).read_bytes(), name
    steps, expected = step_metrics(workdir), step_metrics(whole)
    if later:
        steps.sort(key=lambda line: expected.index(line) if line in expected else -1)
    assert steps == expected


def interrupt(workdir: pathlib.Path, kind: signal.Signals, until: Callable[[], bool]) -> bool:
    """Starts the run and sends it a signal; False if it ended by itself before."""
    process = start(workdir)
    while not until():
        if process.poll() is not None:
            output = process.communicate()[0]
            assert process.returncode == 0, output
            return False
        time.sleep(0.01)
    process.send_signal(kind)
    output, _ = process.communicate(timeout=300)
    if kind == signal.SIGKILL:
        return process.returncode == -signal.SIGKILL
    # Before anything is set up, or with all done, there is nothing to say.
    if "report: " in output or "data" not in output:
        return True
    assert process.returncode == 0, output
    assert output.count("the same command goes on from here: python -m train.joint") == 1, output
    assert "Traceback" not in output
    return True


def under_way(workdir: pathlib.Path, stage: str) -> Callable[[], bool]:
    limit = time.monotonic() + 240

    def until() -> bool:
        assert time.monotonic() < limit, stage
        return STAGES[stage](workdir)

    return until


def damage(path: pathlib.Path, way: str, place: float) -> None:
    """Damages a file: cuts it, flips a bit of a byte, deletes or empties it."""
    content = path.read_bytes()
    at = int(len(content) * place)
    if way == "delete":
        path.unlink()
    elif way == "empty" or not content:
        path.write_bytes(b"")
    elif way == "truncate":
        path.write_bytes(content[:at])
    else:
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])


def test_a_kill_changes_nothing(smoke, tmp_path):
    workdir = tmp_path / "run"
    assert interrupt(workdir, signal.SIGKILL, under_way(workdir, "answers"))
    finish(start(workdir))
    same(workdir, smoke[0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM])
def test_killed_in_each_stage(smoke, tmp_path, kind):
    workdir = tmp_path / "run"
    for stage in STAGES:
        assert interrupt(workdir, kind, under_way(workdir, stage)), stage
    finish(start(workdir))
    same(workdir, smoke[0])


@pytest.mark.slow
def test_killed_at_random_instants(smoke, tmp_path):
    draw = random.Random(0)
    kills, runs, lived = 0, 0, 0.0
    while kills < KILLS:
        workdir = tmp_path / f"run-{runs}"
        runs += 1
        while not (workdir / "report.html").exists():
            kind = draw.choice([signal.SIGKILL, signal.SIGTERM])
            wait = draw.uniform(2.0, 12.0)
            end = time.monotonic() + wait
            if kills == KILLS or not interrupt(workdir, kind, lambda e=end: time.monotonic() > e):
                finish(start(workdir))
                break
            kills, lived = kills + 1, lived + wait
        finish(start(workdir))
        same(workdir, smoke[0])
        print(f"run {runs}: same files; {kills} kills so far, every {lived / kills:.1f} s")
        shutil.rmtree(workdir)


@pytest.fixture(scope="module")
def half_done(smoke, tmp_path_factory):
    """A run that was killed when all but the evaluation was done."""
    workdir = tmp_path_factory.mktemp("half") / "run"
    assert interrupt(workdir, signal.SIGKILL, under_way(workdir, "evaluate"))
    return workdir


def copy(source: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    shutil.copytree(source, target)
    return target


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_damaged_lines_are_made_again(smoke, half_done, tmp_path, way):
    workdir = copy(half_done, tmp_path / "run")
    draw = random.Random(way)
    for path in sorted(p for p in workdir.rglob("*.jsonl*") if p.name != "metrics.jsonl"):
        damage(path, way, draw.uniform(0.2, 0.9))
        print(f"{way}: {path.relative_to(workdir)}")
    finish(start(workdir))
    same(workdir, smoke[0])


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_damaged_metrics_of_steps_do_not_change_results(smoke, half_done, tmp_path, way):
    workdir = copy(half_done, tmp_path / "run")
    damage(workdir / "metrics.jsonl", way, 0.5)
    output = finish(start(workdir))
    assert (workdir / "results.json").read_bytes() == (smoke[0] / "results.json").read_bytes()
    print([line for line in output.splitlines() if "metrics.jsonl" in line])


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_damaged_checkpoints_and_vectors_are_made_again(smoke, half_done, tmp_path, way):
    workdir = copy(half_done, tmp_path / "run")
    draw = random.Random(way)
    newest = [
        max(directory.glob("[0-9]*"), key=lambda p: int(p.name))
        for directory in (workdir / "checkpoints").iterdir()
    ]
    files = [
        draw.choice(sorted(p for p in (step / "state" / "d").iterdir() if p.is_file()))
        for step in newest
    ]
    for path in [*files, *sorted((workdir / "work").rglob("*.npy"))]:
        damage(path, way, draw.uniform(0.2, 0.9))
        print(f"{way}: {path.relative_to(workdir)}")
    output = finish(start(workdir))
    same(workdir, smoke[0], later=True)
    assert len(list((workdir / "checkpoints").glob("*-damaged/*"))) == len(newest), output


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_finished_run_mends_itself(smoke, tmp_path, way):
    workdir = copy(smoke[0], tmp_path / "run")
    draw = random.Random(way)
    for name in SAME:
        damage(workdir / name, way, draw.uniform(0.2, 0.9))
    output = finish(start(workdir))
    same(workdir, smoke[0])
    assert "made again" in output


@pytest.mark.parametrize(
    "way", ["truncate", *(pytest.param(way, marks=pytest.mark.slow) for way in ("flip", "empty"))]
)
def test_a_damaged_config_is_refused(smoke, tmp_path, way):
    (tmp_path / "run" / "data").mkdir(parents=True)  # Something depends on the config.
    shutil.copy(smoke[0] / "config.json", tmp_path / "run" / "config.json")
    content = (tmp_path / "run" / "config.json").read_bytes()
    damage(tmp_path / "run" / "config.json", way, content.index(b"learning_rate") / len(content))
    process = start(tmp_path / "run")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output
    assert output.count("error: ") == 1
    assert "config" in output


@pytest.mark.slow
def test_a_kill_leaves_nothing_where_files_are_temporary(tmp_path, monkeypatch):
    """Step A's examples stayed behind, with processes that make batches ahead."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    workdir = tmp_path / "run"
    process = start(workdir, "--config.mesh.workers=1")
    until([process], under_way(workdir, "fine-tuned"))
    process.kill()
    process.communicate(timeout=60)  # Its workers end, too, which have its output.
    assert not list(tmp_path.glob("expandr-*"))


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[[int], pathlib.Path]]:
    """A function that gives a disk the size of so many KiB."""
    directory = tmp_path / "disk"
    directory.mkdir()

    def mount(*options: str) -> subprocess.CompletedProcess:
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(directory)]
        return subprocess.run(command, capture_output=True, text=True)

    made = mount("size=64k") if shutil.which("mount") else None
    if made is None or made.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {made.stderr if made else 'no mount command'}")

    def resize(kibibytes: int) -> pathlib.Path:
        assert not mount("remount", f"size={kibibytes}k").returncode
        return directory

    yield resize
    subprocess.run(["umount", str(directory)], check=True)


@pytest.mark.slow
def test_a_full_disk_stops_it_and_it_goes_on(smoke, small_disk):
    whole = sum(p.stat().st_size for p in smoke[0].rglob("*") if p.is_file()) // 1024
    stopped_at = []
    size = 64
    while True:
        workdir = small_disk(size) / "run"
        process = start(workdir)
        output, _ = process.communicate(timeout=300)
        if process.returncode == 0:
            break
        assert process.returncode == 2, output
        assert "Traceback" not in output, output
        (message,) = (line for line in output.splitlines() if line.startswith("error: "))
        stopped_at.append(message)
        print(f"{size} KiB: {message}")
        assert size < 4 * whole
        size += max(128, whole // 12)
    same(workdir, smoke[0])
    assert any("checkpoint" in message for message in stopped_at)
    print(f"finished in {size} KiB; the run takes {whole} KiB")
