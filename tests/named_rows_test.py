"""Rows of a file by their names, read when they are asked for."""

import os

import pytest

from expandr_jax.errors import UserError
from expandr_jax.files.named_rows import NamedRows
from expandr_jax.files.records import write_jsonl


def test_rows_are_read_by_name(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"id": f"q{i}", "neg": ["é" * i, "\u2028"]} for i in range(20)]
    write_jsonl(path, [*rows, {"id": "q3", "neg": []}])
    found = NamedRows(path, "id", {"neg": list})
    assert [*found] == [f"q{i}" for i in range(20)]
    assert {name: found[name] for name in found} == {
        **{row["id"]: row for row in rows}, "q3": {"id": "q3", "neg": []}
    }  # fmt: skip
    assert "q21" not in found
    with pytest.raises(KeyError):
        found["q21"]
    path.unlink()
    assert "q20" not in found
    assert found["q19"] == rows[19]  # It stays open.


def test_a_file_that_is_gone_before_it_is_read_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"id": "q", "neg": ["long " * 9000]}, {"id": "p", "neg": []}])
    assert NamedRows(path, "id", {})["q"] == {"id": "q", "neg": ["long " * 9000]}
    found = NamedRows(path, "id", {})
    path.unlink()
    with pytest.raises(UserError, match="cannot read it"):
        found["q"]


def test_files_are_closed_with_what_reads_them(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"id": "q", "neg": []}])

    def opened() -> int:
        """How often this process has the file open; others come and go meanwhile."""
        names = [f"/dev/fd/{number}" for number in os.listdir("/dev/fd")]
        return [os.path.realpath(name) for name in names].count(str(path.resolve()))

    found = [NamedRows(path, "id", {}) for _ in range(5)]
    assert [rows["q"]["neg"] for rows in found for _ in range(3)] == [[]] * 15
    assert opened() == 5
    del found
    assert opened() == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "a", "neg": "b"}', r"rows.jsonl:2: field \"neg\""),
        ('{"neg": []}', r"rows.jsonl:2: .*\"id\""),
        ("{", "rows.jsonl:2: "),
    ],
)
def test_a_line_that_lacks_something_is_named(tmp_path, line, message):
    (tmp_path / "rows.jsonl").write_text(f'{{"id": "b", "neg": []}}\n{line}\n')
    with pytest.raises(UserError, match=message):
        NamedRows(tmp_path / "rows.jsonl", "id", {"neg": list})
