"""Rows of a file by their names, read when they are asked for."""

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
    assert "q19" in found
    with pytest.raises(UserError, match="cannot read it"):
        found["q19"]


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
