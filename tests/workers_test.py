"""Work that other processes do: in order, bounded, and never longer than this one."""

import os
import signal
import subprocess
import sys
import time

import jax
import psutil
import pytest

from expandr_jax.errors import UserError
from expandr_jax.runtime.workers import mapped
from tests.commands import ROOT


def platform_and_square(number: int) -> tuple[str, int, int]:
    return jax.default_backend(), os.getpid(), number**2


def end_at_three(number: int) -> int:
    if number == 3:
        os._exit(1)
    return number


def sleep(number: int) -> int:
    time.sleep(0.05)
    return number


def test_results_come_in_the_order_of_the_items_with_few_of_them_taken():
    taken = []

    def items():
        for number in range(20):
            taken.append(number)
            yield number

    found, ahead = [], []
    for one in mapped(platform_and_square, items(), 2):
        found.append(one)
        ahead.append(len(taken) - len(found))
    assert [square for *_, square in found] == [number**2 for number in range(20)]
    assert {backend for backend, *_ in found} == {"cpu"}
    assert os.getpid() not in {process for _, process, _ in found}
    assert max(ahead) < 4
    assert [*mapped(platform_and_square, range(3), 1)][2][1:] == (os.getpid(), 4)


@pytest.mark.slow
def test_a_process_that_ends_is_told_in_a_line():
    with pytest.raises(UserError, match="a process that did some of the work ended, perhaps"):
        list(mapped(end_at_three, range(9), 2))


@pytest.mark.slow
def test_they_end_with_the_one_that_is_killed(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "from expandr_jax.runtime.workers import mapped\n"
        "from tests.workers_test import sleep\n"
        "if __name__ == '__main__':\n"
        "    for number in mapped(sleep, range(10_000), 2):\n"
        "        print(number, flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, env=environment)
    process.stdout.readline()
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
