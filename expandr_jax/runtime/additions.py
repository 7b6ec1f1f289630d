"""Settings that may grow when a run is continued: finished work stays, and the rest is added."""

import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from expandr_jax.errors import UserError
from expandr_jax.files.records import differences, write_json
from expandr_jax.runtime.formats import find_setting

FREE = ("log", "mesh")  # Sections that do not decide results, but for rounding.
GROWING = ("rounds", "data.tests", "evaluation.systems")
# Sections that do nothing while a setting of theirs is 0: with it, all of one may change.
OFF = {"distill": "epochs", "figret": "rank"}


def grown_settings(
    address: str, before: Mapping[str, Any], now: Mapping[str, Any]
) -> dict[str, Any]:
    """The settings of a run's config that have grown since it was recorded, as they were before.

    Raises:
        UserError: Others have changed, or these otherwise.
    """
    changes = [c for c in differences(before, now) if c[0].partition(".")[0] not in FREE]
    opened = tuple(
        f"{section}." for section, name in OFF.items()
        if not before[section][name] and now[section][name]
    )  # fmt: skip
    grown = {
        name: old
        for name, old, new in changes
        if (name in GROWING and _holds(new, old)) or name.startswith(opened)
    }
    told = [f"{name} was {old!r}, now {new!r}" for name, old, new in changes if name not in grown]
    if told:
        raise UserError(
            f"{address}: was made with another config ({'; '.join(told[:3])}"
            f"{'; ...' if len(told) > 3 else ''}); use a new --workdir"
        )
    return grown


def keep_grown(path: pathlib.Path, names: Iterable[str], values: Mapping[str, Any]) -> None:
    """Writes settings that have grown to a config.json, all else of which stays as it is."""
    record = json.loads(path.read_bytes())
    for setting in names:
        first = setting.partition(".")[0]
        record["config"].setdefault(first, values[first])  # An older run had no such section.
        section, name = find_setting(values, setting)
        find_setting(record["config"], setting)[0][name] = section[name]
    write_json(path, record)


def _holds(new: Any, old: Any) -> bool:
    """Whether a value is a larger number, or has all of another's items and more."""
    if isinstance(old, int):
        return new > old
    return len(new) > len(old) and all(item in new for item in old)
