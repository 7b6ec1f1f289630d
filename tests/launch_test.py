"""What every program refuses on its command line, in one line, before it begins."""

import errno
import os

import pytest

from tests.commands import command
from train.launch import is_full


def refused(module: str, *arguments: str) -> str:
    """The one line that a command line is answered with."""
    process = command(module, *arguments)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output
    assert len(output.splitlines()) == 1, output
    return output


@pytest.mark.parametrize(
    ("module", "others"),
    [
        ("train.joint", ["--config=configs/smoke.py"]),
        ("train.plan", ["--config=configs/smoke.py", "--topology=cpu:2"]),
        ("eval.beir", ["--systems=bm25"]),
    ],
)
def test_a_word_that_no_option_takes(tmp_path, module, others):
    workdir = [] if module == "train.plan" else [f"--workdir={tmp_path / 'run'}"]
    message = refused(module, *others, *workdir, "config.rounds=2")
    assert message.startswith("error: 'config.rounds=2' is no option; expected --NAME=VALUE")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("train.joint", "--config is missing: add --config=configs/quickstart.py, for example"),
        ("eval.search", "--workdir is missing: add --workdir=runs/quickstart, for example"),
        ("eval.seeds", "no runs given: python -m eval.seeds WORKDIR [WORKDIR ...]"),
    ],
)
def test_a_program_that_is_told_nothing(module, expected):
    assert refused(module) == f"error: {expected}\n"


@pytest.mark.parametrize("option", [b"--workdir=caf\xe9", b"--config.data.path=\xff", b"\xe9"])
@pytest.mark.parametrize("module", ["train.joint", "eval.search"])
def test_an_argument_that_is_no_text(module, option):
    found = refused(module, os.fsdecode(option))
    assert found == f"error: {option!r}: not UTF-8; write it so\n"


def test_a_workdir_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").write_text("")
    found = refused("train.joint", "--config=configs/smoke.py", "--workdir=~/run")
    assert found.startswith(f"error: {tmp_path}/run: is a file; expected a directory")


def test_a_switch_that_is_neither():
    found = refused("train.plan", "--config=configs/smoke.py", "--search=maybe")
    assert found == "error: flag --search=maybe: expected true or false\n"


def test_a_number_beyond_its_range():
    found = refused("eval.serve", "--workdir=run", "--cache_days=0")
    assert found.startswith("error: flag --cache_days=0: ")
    assert "[0.01, 36500" in found


def test_a_workdir_without_a_name():
    message = refused("train.joint", "--config=configs/smoke.py", "--workdir=")
    assert message.startswith("error: --workdir is missing")


@pytest.mark.parametrize("option", ["--help", "-h"])
@pytest.mark.parametrize(
    ("module", "options"),
    [
        ("train.joint", {"--config", "--config.NAME", "--workdir", "--coordinator"}),
        ("eval.compare", {"--qrels", "--baseline", "--html"}),
    ],
)
def test_what_a_program_says_of_itself(module, options, option):
    process = command(module, option)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert f"python -m {module}" in output
    assert options <= {line.split()[0] for line in output.splitlines() if line.strip()}
    assert "--logtostderr" not in output  # The libraries' own.


def test_a_config_may_stand_apart_from_its_option(tmp_path):
    message = refused("train.joint", "--config", "configs/smoke.py")
    assert message.startswith("error: --workdir is missing")
    message = refused("train.joint", "--config", "configs/nothing.py", f"--workdir={tmp_path}")
    assert message.startswith("error: configs/nothing.py: no such config file")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("", "--config is missing: add --config="),
        (":argument", "--config is missing: add --config="),
        ("configs", "configs: no such config file"),
    ],
)
def test_a_config_that_is_no_file(tmp_path, config, message):
    found = refused("train.joint", f"--config={config}", f"--workdir={tmp_path / 'run'}")
    assert found.startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:\n", "broken.py:1: invalid syntax"),
        ("x = 1\nimport no_such_module\n", "broken.py:2: ModuleNotFoundError: No module named"),
        ("def get_config():\n    return name\n", "broken.py:2: NameError: name 'name' is not"),
        ("def get_config():\n    open('nothing')\n", "No such file or directory: 'nothing'"),
        ("def get_config():\n    return int('x')\n", "--config: ValueError: invalid literal"),
        ("x = 1\n", "has no attribute 'get_config'"),
    ],
)
def test_a_config_file_that_is_broken(tmp_path, text, message):
    (tmp_path / "broken.py").write_text(text)
    found = refused("train.joint", f"--config={tmp_path / 'broken.py'}", f"--workdir={tmp_path}/w")
    assert found.startswith("error: ")
    assert message in found
    assert not (tmp_path / "w").exists()


def test_an_argument_that_a_config_does_not_take(tmp_path):
    found = refused("train.joint", "--config=configs/smoke.py:x", f"--workdir={tmp_path}/w")
    assert found == "error: --config: this config takes nothing after its name and ':'\n"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("dpo.lr=1", "--config.dpo.lr: there is no setting 'lr'; configs/base.py has them all"),
        ("lr", "--config.lr: there is no setting 'lr'; configs/base.py has them all"),
        ("dpo.bata=1", "--config.dpo.bata: there is no setting 'bata'; did you mean 'beta'?"),
        (
            "generater.remat=x",
            "--config.generater.remat: there is no setting 'generater'; did you mean",
        ),
        ("dpo.beta.x=1", "--config.dpo.beta.x: there is no setting 'x'; configs/base.py has them"),
    ],
)
def test_a_setting_that_is_none(tmp_path, setting, message):
    workdir = f"--workdir={tmp_path / 'run'}"
    others = ["--config.seed=1", f"--config.{setting}", "--config.rounds=1"]
    found = refused("train.joint", "--config=configs/smoke.py", workdir, *others)
    assert found.startswith(f"error: {message}")
    assert not (tmp_path / "run").exists()


def test_a_setting_that_a_section_lacks(tmp_path):
    found = refused("train.distill", f"--workdir={tmp_path}", "--config.distill.epoch=3")
    assert found == (
        "error: --config.distill.epoch: there is no setting 'epoch'; did you mean 'epochs'?\n"
    )


def test_an_option_that_is_no_number(tmp_path):
    found = refused("eval.load", f"--workdir={tmp_path}", "--seconds=nan")
    assert found == "error: --seconds=nan: expected a number\n"


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "model.safetensors"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (Exception("No space left on device (os error 28)"), True),  # tokenizers says no more.
        (OSError("18373 requested and 9184 written"), True),  # Nor does numpy.
        (RuntimeError("UNKNOWN: No space left on device; writing ah_codebook.pb"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (ValueError("os error 281"), False),
    ],
)
def test_errors_that_mean_a_full_disk(error, full):
    assert is_full(error) == full


@pytest.mark.parametrize(
    ("name", "value"), [("JAX_ENABLE_X64", "1"), ("JAX_DEFAULT_PRNG_IMPL", "rbg")]
)
def test_an_environment_that_would_change_results(tmp_path, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    found = refused("train.joint", "--config=configs/smoke.py", f"--workdir={tmp_path / 'run'}")
    assert found.startswith(f"error: {name} is set to ")
    assert found.endswith("follow from more than its config: unset it\n")
    assert not (tmp_path / "run").exists()
