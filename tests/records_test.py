import errno
import gzip
import hashlib
import itertools
import json
import os
import tracemalloc

import numpy as np
import pytest

from expandr_jax.errors import UserError
from expandr_jax.files.records import (
    Journal,
    hash_file,
    hash_json,
    hash_json_list,
    read_jsonl,
    write_json,
    write_jsonl,
    write_text,
)

ROWS = [{"id": "a", "n": 1}, {"id": "π\u2028\x85\n", "n": -2}, {"id": "", "n": 0, "more": [1.5]}]


def test_rows_come_back_with_their_line_numbers(tmp_path):
    path = tmp_path / "new" / "folder" / "rows.jsonl"
    write_jsonl(path, ROWS)
    assert list(read_jsonl(path, {"id": str, "n": int})) == list(enumerate(ROWS, start=1))
    # However a reader finds the ends of lines, it sees whole records.
    assert [json.loads(line) for line in path.read_text().splitlines()] == ROWS


def test_compressed_file_byte_order_mark_and_blank_lines(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'\xef\xbb\xbf{"id": "a"}\n\n{"id": "b"}'))
    assert list(read_jsonl(path, {"id": str})) == [(1, {"id": "a"}), (3, {"id": "b"})]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"id": "\xff"}', "not UTF-8"),
        (b'{"id": "a"', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "expected a JSON object"),
        (b'{"text": "a"}', 'no field "id"'),
        (b'{"id": 1}', 'field "id" is an integer; expected a string'),
        (b'{"id": null}', 'field "id" is null'),
        (b'{"id": "\\ud800"}', "not UTF-8"),
    ],
)
def test_bad_line_is_named(tmp_path, line, complaint):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id": "fine"}\n' + line + b"\n")
    rows = read_jsonl(path, {"id": str})
    assert next(rows) == (1, {"id": "fine"})
    with pytest.raises(UserError) as caught:
        next(rows)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_types_of_numbers(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"n": 1}\n{"n": true}\n')
    rows = read_jsonl(path, {"n": float})
    assert next(rows)[1] == {"n": 1}
    with pytest.raises(UserError, match=r":2: .*true or false"):
        next(rows)


@pytest.mark.parametrize(
    "content",
    [None, b"not gzip", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-12]],
    ids=["missing", "not gzip", "cut off"],
)
def test_unreadable_file_is_named(tmp_path, content):
    path = tmp_path / "rows.jsonl.gz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"rows\.jsonl\.gz: cannot read it"):
        list(read_jsonl(path, {}))


def test_failed_write_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, ROWS)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="JSON compliant"):
        write_jsonl(path, [{"n": 1}, {"n": float("nan")}])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_unusable_place_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "rows.jsonl", tmp_path / "folder"):
        with pytest.raises(UserError, match=f"{path}: cannot write it"):
            write_text(path, "text")
    with pytest.raises(UserError, match="cannot"):
        Journal(tmp_path / "file" / "rows.jsonl").append([{}])
    with pytest.raises(UserError, match="folder: cannot read it"):
        hash_file(tmp_path / "folder")


def test_hashes(tmp_path):
    write_text(tmp_path / "text", "π")
    assert hash_file(tmp_path / "text") == hashlib.sha256("π".encode()).hexdigest()
    expected = hashlib.sha256(b'{"a":[1,null],"b":"\\u03c0"}').hexdigest()
    assert hash_json({"b": "π", "a": [1, None]}) == expected
    for values in ([], ["π"], ['a, "b"', "", {"b": 1, "a": [None]}, 2.5]):
        assert hash_json_list(iter(values)) == hash_json(values)
    write_json(tmp_path / "value.json", {"b": "π", "a": [1, None]})
    assert json.loads((tmp_path / "value.json").read_text()) == {"b": "π", "a": [1, None]}


def test_journal_goes_on_after_a_kill_at_any_byte(tmp_path):
    whole = Journal(tmp_path / "whole")
    for row in ROWS:
        whole.append([row])
    written = whole.part.read_bytes()
    for size in range(len(written) + 1):
        path = tmp_path / f"killed-{size}"
        part = tmp_path / f"killed-{size}.part"
        part.write_bytes(written[:size])
        journal = Journal(path)
        done = written[:size].count(b"\n")
        assert [*journal.rows] == ROWS[:done]
        assert not journal.finished
        journal.append(ROWS[done:])
        assert part.read_bytes() == written
        journal.finish()
        assert path.read_bytes() == written[:-3] + b'."}\n'
        assert [*Journal(path).rows] == ROWS
        assert not part.exists()


def test_finished_journal(tmp_path):
    path = tmp_path / "work.jsonl"
    journal = Journal(path)
    assert ([*journal.rows], journal.finished) == ([], False)
    journal.append(ROWS)
    part = journal.part.read_bytes()
    journal.finish(reversed(ROWS))
    journal.part.write_bytes(part)  # as if killed before it could be removed
    again = Journal(path)
    assert again.finished
    assert [*again.rows] == ROWS[::-1]
    assert not again.part.exists()
    with pytest.raises(ValueError, match="finished"):
        again.append(ROWS)


def test_rows_before_a_damaged_line_are_kept(tmp_path, caplog):
    """Every byte of a journal, flipped, and every line of it, left out; finished or not."""
    Journal(tmp_path / "whole").append(ROWS)
    part = (tmp_path / "whole.part").read_bytes()
    finished = Journal(tmp_path / "whole")
    finished.finish()
    for content, name in ((part, "work.part"), ((tmp_path / "whole").read_bytes(), "work")):
        lines = content.splitlines(keepends=True)
        ends = np.cumsum([len(line) for line in lines])
        damages = [
            (content[:i] + bytes([content[i] ^ 4]) + content[i + 1 :], int(np.sum(ends <= i)))
            for i in range(len(content))
        ]
        # That an unfinished file lacks its last line cannot be told, and costs as much as a kill.
        ends = len(lines) - (name == "work.part")
        damages += [(b"".join(lines[:i] + lines[i + 1 :]), i) for i in range(ends)]
        for damage, intact in damages:
            (tmp_path / name).write_bytes(damage)
            journal = Journal(tmp_path / "work")
            assert [*journal.rows] == ROWS[:intact]
            assert not journal.finished
            # Half a last line is what a kill leaves.
            assert ("made again" in caplog.text) == (damage[-1:] == b"\n" or name == "work")
            caplog.clear()
            if not journal.finished:
                journal.append(ROWS[len(journal.rows) :])
                assert (tmp_path / "work.part").read_bytes() == part
                journal.finish()
            assert [*Journal(tmp_path / "work").rows] == ROWS
            (tmp_path / "work").unlink()


def test_an_emptied_or_cut_journal_is_not_finished(tmp_path):
    journal = Journal(tmp_path / "work")
    journal.append(ROWS)
    journal.finish()
    content = (tmp_path / "work").read_bytes()
    for size in range(len(content)):
        (tmp_path / "work").write_bytes(content[:size])
        journal = Journal(tmp_path / "work")
        assert not journal.finished
        assert [*journal.rows] == ROWS[: content[:size].count(b"\n")]
        (tmp_path / "work.part").unlink(missing_ok=True)


def test_rows_can_be_dropped_from_a_finished_journal(tmp_path):
    journal = Journal(tmp_path / "work")
    journal.append(ROWS)
    journal.finish()
    journal.keep(1)
    again = Journal(tmp_path / "work")
    assert ([*again.rows], again.finished) == (ROWS[:1], False)
    again.append(ROWS[1:])
    assert [*Journal(tmp_path / "work").rows] == ROWS


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "work")
    journal.append(ROWS[:1])

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"work\.part: cannot write it: No space left"):
            journal.append(ROWS[1:])
    journal.append(ROWS[1:])
    assert [*Journal(tmp_path / "work").rows] == ROWS


def test_rows_stay_on_disk(tmp_path):
    """Eight bytes a row, whose text has a thousand; whether it is opened, read or finished."""
    peaks = []
    for count in (1000, 2000, 4000):
        rows = ({"id": f"q{i}", "text": f"{i}." * 200} for i in range(count))
        path = tmp_path / f"rows-{count}"
        journal = Journal(path)
        while block := list(itertools.islice(rows, 100)):
            journal.append(block)
        tracemalloc.start()
        journal = Journal(path)
        assert sum(1 for _ in journal.rows) == count
        journal.finish(row for row in journal.rows)
        journal = Journal(path)
        assert journal.finished
        assert [row["id"] for row in journal.rows.take([count - 1, 0])] == [f"q{count - 1}", "q0"]
        assert [row["id"] for row in journal.rows[1:5:2]] == ["q1", "q3"]
        assert journal.rows[-1]["id"] == f"q{count - 1}"
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[-1] - peaks[0] < 3000 * 40


def test_a_file_that_others_change_while_it_is_read_is_named(tmp_path):
    journal = Journal(tmp_path / "work")
    journal.append(ROWS)
    journal.part.write_bytes(b"[" * 200)
    with pytest.raises(UserError, match=r"work\.part: was changed by others"):
        list(journal.rows)
    journal = Journal(tmp_path / "other" / "work")
    journal.append(ROWS)
    journal.part.unlink()
    with pytest.raises(UserError, match=r"work\.part: cannot read it"):
        _ = journal.rows[0]


def test_a_file_that_fails_while_another_is_written_is_named(tmp_path):
    """Its error was said of the file that was written."""
    path, other = tmp_path / "triples.jsonl", tmp_path / "vectors.npy"

    def rows():
        yield from ROWS
        yield {"id": other.read_text()}

    with pytest.raises(UserError, match=rf"^{other}: stopped the writing of {path}: No such file"):
        write_jsonl(path, rows())
    assert not any(tmp_path.iterdir())
