"""Progress where there is no terminal: a line now and then, with an estimate once there is one."""

import io

import pytest
from rich.console import Console
from rich.table import Table

from expandr_jax.runtime import progress


@pytest.fixture
def counted(monkeypatch):
    """Counts items, (count, seconds since the last) one after another; returns what was printed."""
    clock = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock[0])

    def run(steps, total, done=0):
        out = io.StringIO()
        with progress.Reporter(Console(file=out)).progress("texts", total, done) as advance:
            for count, seconds in steps:
                clock[0] += seconds
                advance(count)
        return out.getvalue().splitlines()

    return run


def test_texts_are_shown_as_they_are():
    out = io.StringIO()
    console = progress.plain_console(file=out, width=80)
    text = "runs/[v2]/x[/bold] :ok: [red]"
    console.print(text)
    console.print(Table(text, title=text))
    assert out.getvalue().count(text) == 3


def test_what_is_quick_prints_nothing(counted):
    assert counted([(1, 1.0)] * 9, total=9) == []


def test_a_line_at_most_every_ten_seconds(counted):
    assert counted([(1, 4.0)] * 7, total=8) == [
        "  texts 3/8, about 20 s left",
        "  texts 6/8, about 8 s left",
    ]


def test_what_was_done_before_does_not_count_as_quick(counted):
    # 40 of 100 were there; 10 more took 20 s, so the other 50 take 100 s.
    assert counted([(0, 15.0), (10, 5.0)], total=100, done=40) == [
        "  texts 50/100, about 100 s left"
    ]


def test_the_first_items_say_nothing_of_the_rest(counted):
    assert counted([(1, 60.0), (9, 10.0)], total=100) == [
        "  texts 1/100",
        "  texts 10/100, about 630 s left",
    ]
