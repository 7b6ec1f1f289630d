"""Processes that meet: all come, or each of those that did is told in a line what is wrong."""

import socket
import threading

import pytest

from expandr_jax.errors import UserError
from expandr_jax.runtime import rendezvous
from tests.commands import start


@pytest.fixture
def port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def together(port, *settings, seconds=20.0):
    """What `await_all` tells processes of these (count, index): None, or the error's message."""
    results: list[str | None] = ["did not end"] * len(settings)

    def call(place, count, index):
        try:
            rendezvous.await_all("127.0.0.1", port, count, index, seconds)
            results[place] = None
        except UserError as error:
            results[place] = str(error)

    threads = [
        threading.Thread(target=call, args=(place, *setting), daemon=True)
        for place, setting in enumerate(settings)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return results


def test_all_meet_and_the_port_is_free_again(port):
    for _ in range(3):
        assert together(port, (3, 2), (3, 0), (3, 1)) == [None] * 3
    socket.create_server(("127.0.0.1", port)).close()


def test_one_that_is_missing_is_named_to_all(port):
    found = together(port, (4, 0), (4, 2), seconds=1.0)
    assert (
        found
        == [
            f"processes 1, 3 of 4 did not come to 127.0.0.1:{port} within 1 s; start all, with the "
            "same --coordinator"
        ]
        * 2
    )


def test_without_process_0_the_others_say_so(port):
    (found,) = together(port, (2, 1), seconds=1.0)
    assert found.startswith(f"process 1: process 0 was not at 127.0.0.1:{port} within 1 s (")
    assert "Connection refused" in found


def test_two_of_one_number_end_all(port):
    found = together(port, (3, 0), (3, 1), (3, 1))
    assert found == ["two processes have --process=1"] * 3


def test_counts_that_differ_end_all(port):
    assert (
        together(port, (2, 0), (3, 1))
        == ["process 1 was started with --processes=3, process 0 with --processes=2"] * 2
    )


def test_a_port_that_is_taken_is_said(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        (found,) = together(port, (2, 0))
        assert found.startswith(
            f"--coordinator=127.0.0.1:{port}: process 0 cannot listen there: Address already in use"
        )
        options = [f"--coordinator=127.0.0.1:{port}", "--processes=2", "--process=0"]
        output, _ = (process := start(tmp_path / "run", *options)).communicate(timeout=120)
    assert process.returncode == 2, output
    assert output.splitlines()[-1] == f"error: {found}"


def test_strangers_are_ignored_and_a_process_that_goes_is_noticed(port):
    results = []
    thread = threading.Thread(target=lambda: results.extend(together(port, (3, 0))))
    thread.start()
    for data in (b"GET / HTTP/1.1\r\n\r\n\n", b"[1]\n", b"", b"\xff\n", b'{"process": []}\n'):
        _connected(port, data).close()
    # Connections are accepted in their order: this one has come before the wrong one.
    waiting = _connected(port, b'{"process": 1, "count": 3}\n')
    leaving = _connected(port, b'{"process": 2, "count": 4}\n')
    assert b"--processes=4" in waiting.recv(1000)
    assert b"--processes=4" in leaving.recv(1000)
    thread.join(timeout=30)
    assert results == ["process 2 was started with --processes=4, process 0 with --processes=3"]


def test_a_process_that_ends_while_others_are_awaited_ends_all(port):
    results = []
    thread = threading.Thread(target=lambda: results.extend(together(port, (3, 0))))
    thread.start()
    _connected(port, b'{"process": 1, "count": 3}\n').close()
    thread.join(timeout=30)
    assert results == ["process 1 ended before all had come"]


def _connected(port, data):
    """A connection that has said something; the other side may not listen yet."""
    for _ in range(200):
        try:
            connection = socket.create_connection(("127.0.0.1", port), timeout=0.05)
            break
        except OSError:
            threading.Event().wait(0.05)
    connection.settimeout(20)
    connection.sendall(data)
    return connection
