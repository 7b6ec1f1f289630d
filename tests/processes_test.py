"""What several processes of one run tell each other and share."""

import socket
import threading
import time
import tracemalloc
from collections.abc import Callable

import pytest

from expandr_jax.errors import UserError
from expandr_jax.files.records import Journal
from expandr_jax.runtime.connections import Connection
from expandr_jax.runtime.journals import CommonJournal, DividedJournal, Keys, finished_key
from expandr_jax.runtime.processes import Processes, check_address

COUNT = 3


@pytest.fixture
def group():
    """Three processes, connected as those of a run are, but all of them in this one."""
    ends: dict[int, dict[int, Connection]] = {i: {} for i in range(COUNT)}
    with socket.create_server(("127.0.0.1", 0)) as server:
        for i in range(1, COUNT):
            ends[i][0] = Connection(socket.create_connection(server.getsockname()))
            ends[0][i] = Connection(server.accept()[0])
    members = [Processes(i, COUNT) for i in range(COUNT)]
    for member in members:
        member.connect(ends[member.index])
    yield members
    together(members, Processes.finish)


def together(members: list[Processes], function: Callable[[Processes], object]) -> list:
    """What a function returns in each process, called in all of them at once."""
    results: list = [None] * len(members)
    errors = []

    def call(i: int) -> None:
        try:
            results[i] = function(members[i])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(i,), daemon=True) for i in range(len(members))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive()
    assert not errors
    return results


class Beside(Processes):
    """One of several processes, of which each is a thread of this one."""

    def __init__(self, index, count, given, barrier):
        super().__init__(index, count)
        self._given, self._barrier = given, barrier

    def exchange(self, arrays):
        self._given[self.index] = arrays
        self._barrier.wait(timeout=30)
        found = [self._given[i] for i in range(self.count)]
        self._barrier.wait(timeout=30)
        return found


def test_one_process_alone_calls_and_gathers_by_itself():
    alone = Processes()
    assert alone.once(lambda: 1) == 1
    assert alone.main_first(lambda: 2) == 2
    assert alone.gather("a") == ["a"]
    assert alone.share([3, 1, 2], key=lambda x: x) == [3, 1, 2]
    alone.finish()
    alone.leave(1, "nothing to tell")  # Nobody else is ended, and it ends itself as before.


def test_shares_are_everything_once_and_keep_keys_together():
    items = [(query, sample) for query in "abcde" for sample in range(2)]
    shares = [Processes(i, COUNT).share(items, key=lambda item: item[0]) for i in range(COUNT)]
    assert sorted(item for share in shares for item in share) == items
    assert [len(share) for share in shares] == [4, 4, 2]
    owners = [{query for query, _ in share} for share in shares]
    assert sum(map(len, owners)) == 5


def test_once_calls_in_the_first_process_alone_and_tells_all(group):
    called = []

    def function(member: Processes) -> dict:
        def work() -> dict:
            called.append(member.index)
            # What it uses inside may do something once as well.
            return {"nested": member.once(lambda: 7), "alone": member.gather(1)}

        return member.once(work)

    assert together(group, function) == [{"nested": 7, "alone": [1]}] * COUNT
    assert called == [0]


def test_others_answer_calls_of_the_first_while_they_wait(group):
    def function(member: Processes) -> list:
        member.serve("times", lambda number: number * member.index)
        answers = []
        if member.is_main:
            answers.append(member.call("times", 5))  # The others are on their way to `gather`.
        member.gather("a")
        return [*answers, member.once(lambda: member.call("times", 7))]

    own, *others = together(group, function)
    assert own == [[0, 5, 10], [0, 7, 14]]
    assert others == [[[0, 7, 14]]] * 2


def test_what_the_first_tells_is_done_before_what_it_asks_next(group):
    def function(member: Processes) -> list:
        told: list[int] = []
        member.serve("note", told.append)
        member.serve("told", lambda _: [*told])
        answers = []
        if member.is_main:
            member.tell("note", 5)
            member.tell("note", 7)
            answers = member.call("told", None)
        member.gather("a")
        return answers

    assert together(group, function)[0] == [[5, 7]] * COUNT


def test_one_process_answers_itself():
    alone = Processes()
    alone.serve("twice", lambda number: 2 * number)
    assert alone.call("twice", 4) == [8]


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b"\xff\n", b"5" * 5000])
def test_a_stranger_who_connects_is_none_of_them(said):
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as stranger,
        server.accept()[0] as connection,
    ):
        stranger.sendall(said)
        assert Connection(connection).first(0.2) == {}


def test_gather_any_and_all(group):
    assert together(group, lambda m: m.gather(10 * m.index)) == [[0, 10, 20]] * COUNT
    assert together(group, lambda m: m.any(m.index == 2)) == [True] * COUNT
    assert together(group, lambda m: m.any(False)) == [False] * COUNT
    assert together(group, lambda m: m.all(m.index != 2)) == [False] * COUNT


def test_the_main_process_comes_first(group, tmp_path):
    def function(member: Processes) -> str:
        def mend() -> str:
            if member.is_main:
                time.sleep(0.2)
                (tmp_path / "mended").write_text("whole")
            return (tmp_path / "mended").read_text()

        return member.main_first(mend)

    assert together(group, function) == ["whole"] * COUNT


def test_a_common_journal_is_written_once_and_known_to_all(group, tmp_path):
    path = tmp_path / "rows.jsonl"

    def function(member: Processes) -> list:
        journal = CommonJournal(path, member)
        journal.append([{"n": 1}])
        journal.append([{"n": 2}])
        journal.finish()
        assert journal.finished
        return journal.rows

    assert together(group, function) == [[{"n": 1}, {"n": 2}]] * COUNT
    assert [*Journal(path).rows] == [{"n": 1}, {"n": 2}]
    assert Journal(path).finished


def key(row: dict) -> tuple[str, int]:
    return "", row["n"]


def test_a_divided_journal_is_put_together_in_order(group, tmp_path):
    path = tmp_path / "rows.jsonl"

    def function(member: Processes) -> list:
        journal = DividedJournal(path, member, key)
        journal.append([{"n": n} for n in member.share(range(9, 0, -1), key=lambda n: n)])
        journal.finish()
        assert journal.finished
        return [*journal.rows]

    rows = [{"n": n} for n in range(1, 10)]
    assert together(group, function) == [rows] * COUNT
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]
    whole = Journal(tmp_path / "of one")
    whole.finish(rows)
    assert path.read_bytes() == whole.path.read_bytes()


def test_a_divided_journal_of_nothing_is_whole_for_all(group, tmp_path):
    """The other processes removed it before the first one knew it by its end."""
    path = tmp_path / "rows.jsonl"

    def function(member: Processes) -> tuple:
        journal = DividedJournal(path, member, key)
        journal.finish()
        member.barrier()
        return journal.finished, [*journal.rows], finished_key(journal.rows), path.exists()

    assert together(group, function) == [(True, [], "0:", True)] * COUNT
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


def test_what_killed_processes_had_done_is_taken_over_by_any_number(group, tmp_path):
    path = tmp_path / "rows.jsonl"
    for member in group:  # None of them comes to its end.
        own = Journal(tmp_path / f"rows.jsonl.process-{member.index}")
        own.append([{"n": member.index}])
    with open(f"{path}.process-1.part", "ab") as file:
        file.write(b'{"n": 5, "che')  # Cut by the kill.
    alone = DividedJournal(path, Processes(), key)
    assert sorted(alone.rows, key=key) == [{"n": 0}, {"n": 1}, {"n": 2}]
    alone.append([{"n": 3}])

    def rest(member: Processes) -> list:
        journal = DividedJournal(path, member, key)
        assert len(journal.rows) == 4
        if member.index == 2:
            journal.append([{"n": 4}])
        journal.finish()
        return [*journal.rows]

    assert together(group, rest) == [[{"n": n} for n in range(5)]] * COUNT


class First(Processes):
    """Process 0 of two, of which the other has written so many rows and waits."""

    def __init__(self, written):
        super().__init__(0, 2)
        self._alone, self._written = True, written

    def gather(self, value):
        return [value, self._written]


@pytest.mark.parametrize("way", ["flipped", "cut", "removed"])
def test_a_damaged_share_is_named_and_no_text_is_left_out(tmp_path, way):
    """The rows that it lacked were missing from the whole."""
    journal = DividedJournal(tmp_path / "rows.jsonl", First(5), key)
    journal.append([{"n": 9}])
    other = Journal(tmp_path / "rows.jsonl.process-1")
    other.append({"n": n} for n in range(5))
    data = other.part.read_bytes()
    changed = {"flipped": data.replace(b'"n": 3', b'"n": 7'), "cut": data[:-9], "removed": b""}
    other.part.write_bytes(changed[way])
    named = r"rows\.jsonl\.process-1\.part:?4?: .*; the same command makes again what it lacks"
    with pytest.raises(UserError, match=named):
        journal.finish()
    again = DividedJournal(tmp_path / "rows.jsonl", Processes(), key)
    assert {row["n"] for row in again.rows} == {
        9,
        *range({"flipped": 3, "cut": 4, "removed": 0}[way]),
    }


def test_keys_say_which_row_they_are_of_and_their_order():
    keys = [("b", 1), ("a", 10), ("b", 0), ("a", 2), ("b", 1)]
    found = Keys(keys)
    assert [found.row(key) for key in keys] == [0, 1, 2, 3, 0]
    assert ("a", 3) not in found
    assert ("c", 0) not in found
    assert [found.count(name) for name in "abc"] == [2, 3, 0]
    assert [keys[row] for row in found.in_order()] == sorted({*keys})
    assert list(Keys([]).in_order()) == []


def test_putting_shares_together_holds_no_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("expandr_jax.runtime.journals.ROWS_AT_ONCE", 50)
    peaks = []
    for count in (1000, 2000, 4000):
        path = tmp_path / f"rows-{count}.jsonl"
        for i in range(2):
            own = Journal(tmp_path / f"{path.name}.process-{i}")
            for first in range(0, count // 2, 100):
                own.append(
                    {"n": 2 * n + i, "text": f"{n}." * 200} for n in range(first, first + 100)
                )
        tracemalloc.start()
        journal = DividedJournal(path, Processes(), key)
        journal.finish()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert [row["n"] for row in journal.rows] == list(range(count))
    assert peaks[-1] - peaks[0] < 3000 * 100  # Texts alone have 1,000 bytes each.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("host:1", None, None), "go together"),
        ((None, 2, 0), "go together"),
        (("host", 2, 0), "HOST:PORT"),
        (("host:0", 2, 0), "HOST:PORT"),
        (("host:65536", 2, 0), "HOST:PORT"),
        (("host:²", 2, 0), "HOST:PORT"),
        (("host:1", 2, 2), "expected 0 to 1"),
    ],
)
def test_settings_that_do_not_fit_together(settings, message):
    with pytest.raises(UserError, match=message):
        check_address(*settings)


def test_settings_of_one_process_need_no_others():
    check_address(None, 1, None)
    check_address(None, None, None)
