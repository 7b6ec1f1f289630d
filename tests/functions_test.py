"""Rewards of the user's own: what they are given and give, and how each mistake is told."""

import contextlib
import gc
import io
import json
import re
import shutil
import sys
import threading

import numpy as np
import pytest
from rich.console import Console

from configs import base, smoke
from eval.finished import open_finished
from expandr_jax.config import read_config
from expandr_jax.data.beir import Collection
from expandr_jax.data.training_data import TrainingData
from expandr_jax.errors import UserError
from expandr_jax.report.run_report import write_report
from expandr_jax.rewards.evidence import Evidence
from expandr_jax.rewards.functions import RewardFunction, function_rewards, load_functions
from expandr_jax.rewards.group import Candidate, Group
from expandr_jax.rewards.registry import score_groups
from expandr_jax.runtime.run import Run
from tests.commands import start, step_metrics
from tests.house_test import PRODUCT, sources
from tests.policy_run_test import config_of as policy_config
from train.export import export_one
from train.policy import train_alone
from train.preferences import run_functions
from train.scores import RewardTools, reward_context

IDS = ["q0", "q1"]
TEXTS = [["a", "bb", "ccc"], ["dddd", "", "ee"]]
JUDGED = [{"d3": 1, "d4": 0}, {"d5": 2}]


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module that can be imported, under a name that no other test has."""
    monkeypatch.syspath_prepend(tmp_path)
    names = []

    def write(text, name=None):
        name = name or f"rewards_of_{tmp_path.name}_{len(names)}"
        names.append(name)
        (tmp_path / f"{name}.py").write_text(text)
        sys.modules.pop(name, None)
        return name

    yield write
    for name in names:
        sys.modules.pop(name, None)


def call(function, seconds=60.0):
    own = RewardFunction("my.module:function", function, __file__, "")
    return function_rewards(own, IDS, ["first", "second"], TEXTS, JUDGED, seconds)


def test_it_gets_queries_texts_and_judgements_and_its_numbers_count_with_their_weights(module):
    name = module(
        "calls = []\n"
        "def lengths(queries, texts, judgements):\n"
        "    calls.append((queries, texts, judgements))\n"
        "    return [[len(text) for text in own] for own in texts]\n"
        "def grades(queries, texts, judgements):\n"
        "    return [len(own) * [sum(j.values())] for own, j in zip(texts, judgements)]\n"
    )
    config = base.get_config()
    functions = (f"{name}:lengths", f"{name}:grades")
    config.reward.update(positive=0.0, answer=0.0, functions=functions, function_weights=(0.5, 10))
    config = read_config(config)
    collection = Collection(
        "c", {f"d{i}": "text" for i in range(9)}, dict(zip(IDS, ["first", "second"], strict=True)),
        {"train": dict(zip(IDS, JUDGED, strict=True))},
    )  # fmt: skip
    tools = RewardTools(lambda: None, load_functions(config.reward.functions))
    data = TrainingData(collection, [], IDS)
    context = reward_context(config, tools, data, None, IDS, 8, 0)
    groups = [
        Group(query, collection.queries[query], "d3", "", [*map(Candidate, own)])
        for query, own in zip(IDS, TEXTS, strict=True)
    ]
    scored = score_groups(Evidence(context, groups))
    assert sys.modules[name].calls == [(["first", "second"], TEXTS, JUDGED)]
    for group, own, grade in zip(scored, TEXTS, (1, 2), strict=True):
        for candidate, text in zip(group.candidates, own, strict=True):
            length, grades = (f"function:{function}" for function in functions)
            assert dict(candidate.rewards) == {length: len(text), grades: grade}
            assert candidate.total == 0.5 * len(text) + 10 * grade


def test_numbers_of_any_kind_are_read_and_what_it_is_given_is_its_own():
    expected = [[1.0, 0.0, 0.5], [2.0, 3.0, 4.0]]
    for given in (expected, np.array(expected), map(tuple, expected),
                  [[True, False, np.float32(0.5)], (x for x in (2, 3, 4))]):  # fmt: skip
        np.testing.assert_array_equal(call(lambda given=given, **_: given), expected)

    def spoils(queries, texts, judgements):
        queries.clear(), texts[0].clear(), judgements[0].clear()
        return expected

    call(spoils)
    assert (len(TEXTS[0]), len(JUDGED[0])) == (3, 2)


WRONG = {
    "gave None for 2 queries; expected a list of numbers for each": None,
    "gave 1 values for 2 queries": [[1, 2, 3]],
    "gave 2 values for query q1; expected 3 numbers": [[1, 2, 3], [1, 2]],
    "gave 1.0 for query q0; expected 3 numbers": [1.0, 2.0],
    "gave 'abc' for query q1; expected 3 numbers": [[1, 2, 3], "abc"],
    "gave nan for text 1 of query q1; expected a finite number": [[1, 2, 3], [1, float("nan"), 2]],
    "gave inf for text 2 of query q0": [[1, 2, float("inf")], [1, 2, 3]],
    "gave '1.5' for text 0 of query q0": [["1.5", 2, 3], [1, 2, 3]],
    "gave None for text 1 of query q0": [[1, None, 3], [1, 2, 3]],
    "gave 1000000": [[10**400, 2, 3], [1, 2, 3]],
    "gave (1+2j) for text 0 of query q1": [[1, 2, 3], [1 + 2j, 2, 3]],
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_no_number_for_each_text_is_told_with_its_query(message):
    with pytest.raises(UserError) as error:
        call(lambda **_: WRONG[message])
    assert str(error.value).startswith(f"reward.functions: my.module:function {message}")
    assert "\n" not in str(error.value)


def test_what_it_raises_is_told_with_its_own_line():
    def raises(queries, **_):
        json.loads("[1,\n")  # The deepest line is another file's.

    def exits(**_):
        sys.exit()

    def late(texts, **_):
        return ([1 / len(text) for text in own] for own in texts)

    for function, kind, line in ((raises, "JSONDecodeError: ", 1), (exits, "SystemExit ", 1),
                                 (late, "ZeroDivisionError: ", 1)):  # fmt: skip
        number = function.__code__.co_firstlineno + line
        with pytest.raises(UserError) as error:
            call(function)
        message = str(error.value)
        assert message.startswith(f"reward.functions: my.module:function raised {kind}")
        assert f"({__file__}:{number}), for 2 queries from q0 on" in message
        assert "\n" not in message


def test_one_that_does_not_end_is_told():
    free = threading.Event()
    with pytest.raises(
        UserError, match=r"took longer than reward\.function_seconds, 0\.1, for 2 queries from q0"
    ):
        call(lambda **_: free.wait(60), seconds=0.1)
    free.set()
    call(lambda **_: np.zeros((2, 3)), seconds=1e38)


def test_what_cannot_be_imported_is_told(module, tmp_path):
    there = module("number = 3\n")
    raising = module("import json\njson.loads('{')\n")
    inner = module("\nimport no_such_module_of_mine\n")
    wrong = module("def f(:\n")
    leaving = module("import sys\nsys.exit(3)\n")
    for name, message in {
        "no_such_module_of_mine:f": "no_such_module_of_mine:f: there is no such module",
        "no_such.package.of_mine:f": "there is no such module",
        f"{there}.inside:f": f"{there}.inside:f: there is no such module",
        "sys:exit": "sys:exit: there is no such module with a file",
        f"{there}:f": f"{there}.py has nothing of that name",
        f"{there}:number": f"{there}.py has a int, and no function, of that name",
        f"{raising}:f": f"importing {raising} raised JSONDecodeError: .*{raising}.py:2",
        f"{inner}:f": f"importing {inner} raised ModuleNotFoundError: .*{inner}.py:2",
        f"{wrong}:f": f"importing {wrong} raised SyntaxError: .*{wrong}.py:1",
        f"{leaving}:f": f"importing {leaving} raised SystemExit: 3 .*{leaving}.py:2",
    }.items():
        with pytest.raises(UserError) as error:
            load_functions((name,))
        assert re.match(f"reward.functions: .*{message}", str(error.value)), str(error.value)
        assert "\n" not in str(error.value)


def test_settings_of_functions():
    def read(**reward):
        config = base.get_config()
        config.reward.update(reward)
        return read_config(config).reward

    assert read(functions=("a.b:c", "d:e"), function_weights=(1, 0.5)).functions
    assert read(functions=("a:b",), positive=0.0, answer=0.0).functions
    for wrong in (("a",), ("a:b:c",), ("a.:b",), ("a:b", "a:b"), (1,)):
        with pytest.raises(UserError, match=r"^reward\.functions is .*; expected a tuple of fun"):
            read(functions=wrong)
    with pytest.raises(UserError, match=r"^reward\.function_weights is \(1.0,\); expected \(\) or"):
        read(functions=("a:b", "a:c"), function_weights=(1.0,))
    for wrong in ((0.0,), (-1.0,), (float("nan"),)):
        with pytest.raises(UserError, match=r"^reward\.function_weights is .* above 0"):
            read(functions=("a:b",), function_weights=wrong)
    with pytest.raises(UserError, match=r"^reward\.function_seconds is 0.0; expected"):
        read(function_seconds=0)


def test_a_run_keeps_to_the_code_that_has_rewarded(module, tmp_path):
    name = module("def f(queries, texts, judgements): ...\n")
    config = smoke.get_config()
    config.reward.functions = (f"{name}:f",)

    def functions(used):
        run = Run(tmp_path / "run", read_config(config), Console(file=io.StringIO()))
        try:
            return run_functions(run, used)
        finally:
            run.close()

    (first,) = functions(False)

    def kept():
        return json.loads((tmp_path / "run" / "config.json").read_text())["code"]

    assert kept() == {name: first.sha256}
    functions(True)
    (tmp_path / "run" / "metrics.jsonl").touch()  # Or it would count as a run that has not begun.
    module("# Mended.\ndef f(queries, texts, judgements): ...\n", name)
    with pytest.raises(UserError, match=rf"^{name} has changed since this run rewarded texts by"):
        functions(True)
    (second,) = functions(False)  # Nothing was rewarded by it yet.
    assert kept() == {name: second.sha256} != {name: first.sha256}
    functions(True)


def test_what_has_failed_may_be_mended_once(module, tmp_path):
    name = module("def f(queries, texts, judgements): return 1 / 0\n")
    config, said = smoke.get_config(), io.StringIO()
    config.reward.functions = (f"{name}:f",)
    path = tmp_path / "run" / "config.json"

    def functions():
        with contextlib.closing(
            Run(tmp_path / "run", read_config(config), Console(file=said, width=200))
        ) as run:
            return run_functions(run, used=True)

    def fail(function):
        with pytest.raises(UserError, match="ZeroDivisionError"):
            function_rewards(function, IDS, ["first", "second"], TEXTS, JUDGED, 60.0)

    (first,) = functions()
    (tmp_path / "run" / "metrics.jsonl").touch()
    fail(first)
    functions()  # As it was: it may have been something else that failed.
    module("# Mended.\ndef f(queries, texts, judgements): return 1 / 0\n", name)
    with pytest.raises(UserError, match="has changed since"):
        functions()  # It has not failed since.
    module("def f(queries, texts, judgements): return 1 / 0\n", name)
    fail(*functions())
    module("# Mended.\ndef f(queries, texts, judgements): return 1 / 0\n", name)
    (second,) = functions()
    assert f"{name} has changed since it failed; what it rewarded before stays" in said.getvalue()
    fail(second)
    module("# Twice.\ndef f(queries, texts, judgements): ...\n", name)
    (third,) = functions()
    record = json.loads(path.read_text())
    assert record["code"] == {name: third.sha256}
    assert record["code_mended"] == {name: [first.sha256, second.sha256]}
    assert "code_failed" not in record
    module("# Without need.\ndef f(queries, texts, judgements): ...\n", name)
    with pytest.raises(UserError, match="has changed since"):
        functions()


def test_training_alone_imports_them(smoke, module, tmp_path):
    """A finished run whose function can no longer be imported is searched, exported, reported."""
    name = module("raise RuntimeError('imported')\n")
    workdir = shutil.copytree(smoke[0], tmp_path / "run")
    path = workdir / "config.json"
    record = json.loads(path.read_text())
    record["config"]["reward"]["functions"] = [f"{name}:f"]
    path.write_text(json.dumps(record))
    config = open_finished(workdir).config
    assert config.reward.functions == (f"{name}:f",)
    export_one(workdir, tmp_path / "adapter", "adapter", "float32")
    write_report(workdir)
    assert name not in sys.modules
    with pytest.raises(UserError, match=f"importing {name} raised RuntimeError: imported"):
        load_functions((f"{name}:f",))
    calls = re.compile(r"\b(?:load|run)_functions\(")
    callers = {path.split("/")[0] for path, text in sources(*PRODUCT) if calls.search(text)}
    assert callers == {"expandr_jax", "train"}
    assert {path for path, text in sources("expandr_jax") if calls.search(text)} == {
        "expandr_jax/rewards/functions.py"  # Which defines one of them.
    }


def test_a_program_that_trains_says_so_before_it_begins(tmp_path):
    process = start(tmp_path / "run", "--config.reward.functions=('no_such_module:f',)")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output
    assert output.startswith("error: reward.functions: no_such_module:f: there is no such module")
    assert len(output.splitlines()) == 1
    assert not (tmp_path / "run" / "data").exists()


COUNTING = """
calls = []
def f(queries, texts, judgements):
    calls.append(queries)
    {}
    return [[float(len(text) % 7) for text in own] for own in texts]
"""
FAILING = {
    "raises": ("if len(calls) == 7: 1 / 0", "raised ZeroDivisionError: division by zero"),
    "without end": (
        "if len(calls) == 7: import time; time.sleep(9)",
        "took longer than reward.function_seconds, 2",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAILING)
def test_a_function_that_fails_in_training_costs_no_step_that_was_saved(module, tmp_path, kind):
    """It ends in a line, and goes on when it is mended, as if it had never failed."""
    spoil, message = FAILING[kind]
    config = policy_config()
    config.reward.update(gain=0.0, function_seconds=2.0)

    def train(workdir, text):
        name, said = module(text, "rewards_that_fail"), None
        config.reward.functions = (f"{name}:f",)
        try:
            train_alone(config, tmp_path / workdir, Console(quiet=True))
        except UserError as error:
            said = str(error)
        gc.collect()  # The run in it had the workdir's lock.
        return said

    assert train("whole", COUNTING.format("")) is None
    said = train("run", COUNTING.format(spoil))
    assert message in said
    assert "\n" not in said
    saved = [p.name for p in (tmp_path / "run/checkpoints/policy-0").iterdir() if p.name.isdigit()]
    assert saved  # Four steps had been taken.
    assert train("run", COUNTING.format("")) is None
    for name in ("export/adapter/adapter_model.safetensors", "work/round-0/policy-watch.jsonl"):
        run, whole = ((tmp_path / place / name).read_bytes() for place in ("run", "whole"))
        assert run == whole
    assert step_metrics(tmp_path / "run") == step_metrics(tmp_path / "whole")
