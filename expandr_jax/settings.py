"""What settings may be, as metadata of their types, and how a section of a config is read.

A section is a frozen dataclass whose fields have types such as `Annotated[int, count(1)]`;
`X | None` may be None, too. A config says all of them; a default is for code that has no config,
and is that of configs/base.py. What does not go together though each value is one, a section's
method `refused` tells: the name of a setting in it, and what was expected, of each that is wrong.
"""

import dataclasses
import functools
import operator
import re
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from expandr_jax.errors import UserError, shown

_LARGEST_COUNT = 2**31 - 1
_LARGEST = 1e38  # What float32 can hold.
Section = TypeVar("Section")
Complaints = Iterator[tuple[str, str]]  # Settings of a section, and what was expected of them.
MANY = 10_000  # More of what is done again and again would not end.


@dataclasses.dataclass(frozen=True)
class Check:
    """What a setting has to be: in words, for messages, and whether a value is that."""

    expected: str
    holds: Callable[[Any], bool]


def count(least: int, most: int = _LARGEST_COUNT) -> Check:
    """A whole number from `least` to `most`, both included."""
    return Check(
        f"a whole number from {least} to {most}",
        lambda value: _is_a(int, value) and least <= value <= most,
    )


_BOUNDS = {
    "above": ("above", operator.gt),
    "least": ("at least", operator.ge),
    "below": ("below", operator.lt),
    "most": ("at most", operator.le),
}


def number(**bounds: float) -> Check:
    """A finite number within bounds: `above`, `least`, `below`, `most`."""
    words = " and".join(f" {_BOUNDS[name][0]} {bound}" for name, bound in bounds.items())
    return Check(
        f"a finite number{words}",
        lambda value: (  # NaN is not within any bounds.
            _is_a((int, float), value)
            and abs(value) <= _LARGEST
            and all(_BOUNDS[name][1](value, bound) for name, bound in bounds.items())
        ),
    )


def choice(known: Collection[str], *, empty: bool = False) -> Check:
    """One of some strings, such as the keys of a registry; or, if `empty`, none of them."""
    return Check(
        f"one of {', '.join(known)}" + (", or ''" if empty else ""),
        lambda value: isinstance(value, str) and (value in known or (empty and not value)),
    )


def several(each: Check, *, least: int = 1) -> Check:
    """A tuple of at least so many values."""
    return Check(
        f"{'a tuple' if least else 'an empty tuple or one'} of values that each are "
        f"{each.expected}",
        lambda value: (
            isinstance(value, tuple) and len(value) >= least and all(map(each.holds, value))
        ),
    )


def _is_a(kind: type | tuple[type, ...], value: Any) -> bool:
    """As `isinstance`, but true and false are no numbers."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_pattern(value: Any) -> bool:
    try:
        return isinstance(value, str) and value != "" and re.compile(value) is not None
    except (re.error, RecursionError, OverflowError):
        return False


POSITIVE, NOT_NEGATIVE, SHARE = number(above=0), number(least=0), number(least=0, most=1)
TEXT = Check("a string that is not empty", lambda value: isinstance(value, str) and value != "")
PATTERN = Check("a regular expression", _is_pattern)
SHA256 = Check(
    "the 64 hexadecimal digits of a sha256, or ''",
    lambda value: isinstance(value, str) and re.fullmatch("([0-9a-fA-F]{64})?", value) is not None,
)

Positive = Annotated[float, POSITIVE]
NotNegative = Annotated[float, NOT_NEGATIVE]
Share = Annotated[float, SHARE]
Sha256 = Annotated[str, SHA256]
WEIGHTS = ("float32", "bfloat16", "int8", "int4", "nf4")  # What frozen weights are kept in.
ComputeType = Annotated[str, choice(("float32", "bfloat16"))]

_PLAIN = {
    bool: Check("true or false", lambda value: isinstance(value, bool)),
    int: Check("a whole number", lambda value: _is_a(int, value)),
    float: number(),
    str: Check("a string", lambda value: isinstance(value, str)),
    tuple: Check("a tuple", lambda value: isinstance(value, tuple)),
}


def check_of(kind: Any) -> Check:
    """What a value of a field of this type has to be."""
    if get_origin(kind) is Annotated:
        return kind.__metadata__[0]
    if isinstance(kind, types.UnionType) or type(None) in get_args(kind):
        (kind,) = (part for part in get_args(kind) if part is not type(None))
        check = check_of(kind)
        return Check(
            f"{check.expected}, or None", lambda value: value is None or check.holds(value)
        )
    return _PLAIN[get_origin(kind) or kind]


@functools.cache
def fields_of(section: type) -> Mapping[str, Any]:
    """Name -> a check, or a section again, of the fields that a section of a config has."""
    hints = get_type_hints(section, include_extras=True)
    kinds = {field.name: hints[field.name] for field in dataclasses.fields(section)}
    return {
        name: kind if dataclasses.is_dataclass(kind) else check_of(kind)
        for name, kind in kinds.items()
    }


def read_section(section: type[Section], values: Mapping[str, Any], prefix: str = "") -> Section:
    """Reads a section of a config, and those within it.

    Args:
        section: A frozen dataclass.
        values: The section's settings; lists are taken for tuples. Also a ConfigDict.
        prefix: What names of the settings begin with in messages, as "generator.server.".

    Raises:
        UserError: Naming the first setting that is wrong, its value and what was expected.
    """
    fields = fields_of(section)
    for name in sorted(set(values.keys()) - fields.keys()):  # The same one in every process.
        raise UserError(f"{prefix}{name}: there is no such setting; configs/base.py has them all")
    read = {}
    for name, check in fields.items():
        if name not in values:
            raise UserError(f"{prefix}{name} is missing; configs/base.py has its default")
        value = values[name]
        if isinstance(check, type):
            if not hasattr(value, "keys"):
                raise UserError(f"{prefix}{name} is {shown(value)}; expected a section of settings")
            read[name] = read_section(check, value, f"{prefix}{name}.")
            continue
        value = _with_tuples(value)
        if not check.holds(value):
            raise UserError(f"{prefix}{name} is {shown(value)}; expected {check.expected}")
        read[name] = value
    made = section(**read)
    for name, expected in made.refused() if hasattr(made, "refused") else ():
        value = operator.attrgetter(name)(made)
        raise UserError(f"{prefix}{name} is {shown(value)}; expected {expected}")
    return made


def at_least_one(section: str, settings: Any, names: Sequence[str]) -> Complaints:
    """Refuses, for `refused` of a section, that all of these settings are 0 or empty."""
    if not any(operator.attrgetter(*names)(settings)):
        others = " or ".join(f"{section}.{name}" for name in names[1:])
        yield names[0], f"it or {others} above 0"


def _with_tuples(value: Any) -> Any:
    return tuple(map(_with_tuples, value)) if isinstance(value, (list, tuple)) else value
