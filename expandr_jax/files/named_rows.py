"""A file of JSON lines whose rows have names: each is read when it is asked for."""

import os
from collections.abc import Iterator, Mapping

from expandr_jax.errors import UserError
from expandr_jax.files.lines import Lines
from expandr_jax.files.records import Row, check_field, parse_row, read_lines


class NamedRows(Mapping[str, Row]):
    """Rows by a field of theirs; of two with one name, the later.

    In memory are the names, and where their lines begin.

    Args:
        path: The file, which stays as it is.
        name: The field.
        fields: Name and type of the other fields that every row must have.

    Raises:
        UserError: As of `read_jsonl`.
    """

    def __init__(self, path: str | os.PathLike, name: str, fields: Mapping[str, type]):
        self._path, self._starts, self._lines, start = path, {}, Lines(path), 0
        for number, line in read_lines(path):
            if line.strip():
                where = f"{path}:{number}"
                row = parse_row(where, line)
                for field, kind in ({name: str} | dict(fields)).items():
                    check_field(where, row, field, kind)
                self._starts[row[name]] = start
            start += len(line)

    def __getitem__(self, key: str) -> Row:
        start = self._starts[key]
        try:
            line = self._lines.at(start)
        except OSError as error:
            raise UserError(f"{self._path}: cannot read it: {error.strerror}") from error
        return parse_row(str(self._path), line)

    def __contains__(self, key: object) -> bool:
        return key in self._starts  # Without reading it.

    def __iter__(self) -> Iterator[str]:
        return iter(self._starts)

    def __len__(self) -> int:
        return len(self._starts)
