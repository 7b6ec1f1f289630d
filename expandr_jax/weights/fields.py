"""JSON that users bring: the files, and each of an object's fields, checked as it is taken."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from expandr_jax.errors import UserError, shown

_LARGEST = 2**31 - 1
_LONGEST = 400  # Characters of another library's message, or of names.
_LONGEST_PATH = 255


class Fields:
    """A JSON object. A field that is null counts as left out.

    Each method that takes a field raises UserError, naming the file and the field, where it is not
    what was asked for, or where it is left out and no default is given.

    Attributes:
        values: The object as it is.
        where: The file, for messages.
    """

    def __init__(self, values: Mapping[str, Any], where: str, prefix: str = ""):
        """Wraps an object; `prefix` names, in messages, the fields that it lies in."""
        self.values, self.where, self._prefix = values, where, prefix

    @classmethod
    def read(cls, path: Path, *, optional: bool = False) -> "Fields":
        """Reads a file that holds one object; an optional one that is not there has no fields."""
        values = read_json(path, {} if optional else None)
        if not isinstance(values, dict):
            raise UserError(f"{path}: it is {shown(values)}; expected a JSON object")
        return cls(values, str(path))

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def count(self, name: str, *default: Any, least: int = 1, most: int = _LARGEST) -> Any:
        """A whole number from `least` to `most`, both included."""
        expected = f"a whole number from {least} to {most}"
        return self._take(name, default, lambda value: is_count(value, least, most), expected)

    def number(self, name: str, *default: Any, above: float = -math.inf) -> Any:
        """A finite number above `above`."""
        expected = "a number" + (f" above {above}" if above > -math.inf else "")
        return self._take(name, default, lambda v: _is_number(v) and v > above, expected)

    def rate(self, name: str, *default: Any) -> Any:
        """A number from 0 to 1, 1 excluded: of dropout, say."""
        expected = "a number from 0 to 1, 1 excluded"
        return self._take(name, default, lambda v: _is_number(v) and 0 <= v < 1, expected)

    def flag(self, name: str, default: bool | None) -> bool | None:
        """True or false."""
        return self._take(name, (default,), lambda v: isinstance(v, bool), "true or false")

    def text(self, name: str, *default: Any) -> Any:
        """A string."""
        return self._take(name, default, is_text, "a string")

    def choice(self, name: str, known: Sequence[str], *default: Any) -> Any:
        """One of some strings."""
        value = self._take(name, default)
        if name in self and value not in known:
            raise UserError(
                f"{self.where}: {self._prefix}{name} {shown(value)} is not supported; supported: "
                + ", ".join(known)
            )
        return value

    def items(self, name: str, kind: type, *default: Any) -> Any:
        """A list of values of one type."""

        def fits(value: Any) -> bool:
            # type() is exact: true is no whole number.
            return isinstance(value, list) and all(type(item) is kind for item in value)

        return self._take(name, default, fits, f"a list of {kind.__name__}")

    def section(self, name: str) -> "Fields":
        """An object inside this one; one that is left out has no fields."""
        value = self._take(name, ({},), lambda v: isinstance(v, dict), "a JSON object")
        return Fields(value, self.where, f"{self._prefix}{name}.")

    def under(self, prefix: str) -> "Fields":
        """The fields whose names begin with a prefix, by the rest of their names."""
        names = [name for name in self.values if name.startswith(prefix)]
        values = {name.removeprefix(prefix): self.values[name] for name in names}
        return Fields(values, self.where, self._prefix + prefix)

    def quotient(self, whole: str, part: str) -> int:
        """One count divided by another that it must be a multiple of."""
        value, divisor = self.count(whole), self.count(part)
        if value % divisor:
            raise self.refuse(whole, f"a multiple of {part}, {divisor}")
        return value // divisor

    def only(self, **values: Any) -> None:
        """Refuses options that change what is computed and that only one value of is implemented.

        Args:
            values: The one value of each; it also is what a field that is left out means.
        """
        for name, value in values.items():
            given = self.values.get(name)
            # True equals 1; JSON has whole numbers as 1 and as 1.0.
            same = given == value and isinstance(given, bool) == isinstance(value, bool)
            if name in self and not same:
                raise UserError(
                    f"{self.where}: {self._prefix}{name}={shown(given)} is not supported; "
                    f"only {value!r} is"
                )

    def strict(self, *obeyed: str, **values: Any) -> None:
        """Refuses each field that is neither obeyed nor has the one value that `only` allows."""
        self.only(**values)
        unknown = sorted({name for name in self.values if name in self} - {*obeyed, *values})
        if unknown:
            raise UserError(
                f"{self.where}: {self._prefix}{unknown[0]}={shown(self.values[unknown[0]])} is not "
                "supported"
            )

    def refuse(self, name: str, expected: str) -> UserError:
        """The error that says what a field is and what was expected."""
        given = shown(self.values.get(name))
        return UserError(f"{self.where}: {self._prefix}{name} is {given}; expected {expected}")

    def _take(
        self,
        name: str,
        default: Sequence[Any],
        fits: Callable[[Any], bool] = lambda _: True,
        expected: str = "",
    ) -> Any:
        value = self.values.get(name)
        if value is not None:
            if not fits(value):
                raise self.refuse(name, expected)
            return value
        if not default:
            raise UserError(f"{self.where}: field '{self._prefix}{name}' is missing")
        return default[0]


def model_max_length(settings: Fields) -> int | None:
    """Longest input in tokens, by tokenizer_config.json; files have 1e30 for any length."""
    # Its older name counts where the newer is not there at all.
    name = "model_max_length" if "model_max_length" in settings.values else "max_len"
    length = settings.number(name, None, above=0)
    if length is not None and length % 1:
        raise settings.refuse(name, "a whole number")
    return None if length is None else int(length)


def is_count(value: Any, least: int, most: int) -> bool:
    """Whether a JSON value is a whole number from `least` to `most`; true and 1.0 are not."""
    return type(value) is int and least <= value <= most


def is_text(value: Any) -> bool:
    """Whether a JSON value is a string of whole characters: JSON can hold halves of some."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= 1e38  # What float32 can hold.


def one_line(message: Any) -> str:
    """A message of an exception, or names from a file, on one line of limited length."""
    text = " ".join(str(message).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def read_json(path: Path, default: Any = None) -> Any:
    """Parses a JSON file; a missing one gives `default`, or is an error where there is none."""
    try:
        text = read_text(path)
    except UserError as error:
        if default is not None and isinstance(error.__context__, FileNotFoundError):
            return default
        raise
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable JSON: {one_line(error)}") from None


def read_text(path: Path) -> str:
    """The text of a UTF-8 file; raises UserError if there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read it: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8: {error}") from None


def path_inside(directory: Path, name: Any, where: str) -> Path:
    """A file of a model's directory that another of its files names.

    Args:
        directory: The model's.
        name: Relative, "" for the directory itself.
        where: The file that names it, for messages.

    Returns:
        Its path.

    Raises:
        UserError: If the name is none, or one of a file outside.
    """
    usable = is_text(name) and "\0" not in name and len(name) <= _LONGEST_PATH
    path = PurePosixPath(name if usable else "..")
    if path.is_absolute() or ".." in path.parts:
        raise UserError(
            f"{where}: it names {shown(name)}; expected a path inside the model's directory"
        )
    return directory / name
