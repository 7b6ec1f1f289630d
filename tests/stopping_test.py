"""SIGTERM: held back while something is in hand, and otherwise at once."""

import os
import signal
import subprocess
import sys

import pytest

from expandr_jax.runtime.stopping import Stopped, end_on_sigterm, held
from tests.commands import ROOT


@pytest.fixture(autouse=True)
def handler():
    """Puts back what SIGTERM did before."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def notify() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_held_notice_ends_the_program_after_the_block():
    done = []

    def work():
        with held() as notice:
            notify()
            assert notice.requested
            done.append(1)
            notice.where = " at step 3, saved"

    with pytest.raises(Stopped) as stopped:
        work()
    assert done == [1]
    assert stopped.value.code == 0
    assert "SIGTERM at step 3, saved; the same command goes on from here" in stopped.value.message
    assert "\n" not in stopped.value.message


def test_without_a_notice_nothing_happens():
    before = signal.getsignal(signal.SIGTERM)
    with held() as notice:
        pass
    assert not notice.requested
    assert signal.getsignal(signal.SIGTERM) == before


def test_elsewhere_it_ends_at_once_and_a_second_notice_is_ignored():
    end_on_sigterm()
    with pytest.raises(Stopped):
        notify()
    notify()  # What ends the program now must not be interrupted.


def test_a_held_block_within_another():
    with pytest.raises(Stopped), held(), held():
        notify()


def test_a_held_block_lets_the_one_around_it_end_first():
    done = []

    def work():
        with held() as outer:
            with held():
                notify()
            assert outer.requested
            done.append(1)

    with pytest.raises(Stopped):
        work()
    assert done == [1]


def test_an_error_in_the_block_is_what_is_seen():
    def work():
        with held():
            notify()
            raise ValueError("its own")

    with pytest.raises(ValueError, match="its own"):
        work()


DROPPED = """
import os, signal, time
from train.launch import quiet_libraries
from expandr_jax.runtime.stopping import Stopped, end_on_sigterm


class Ends:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        sum(range(1000))  # Here the handler raises, and Python drops what a finalizer raises.


quiet_libraries()
end_on_sigterm()
one = Ends()
del one
try:
    time.sleep(60)
except Stopped:
    print("stopped")
"""


def test_a_notice_that_comes_while_an_object_ends_is_not_lost():
    done = subprocess.run(
        [sys.executable, "-c", DROPPED], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (done.stdout, done.stderr) == ("stopped\n", "")
