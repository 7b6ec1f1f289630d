"""The user's own code that a run has been made with: config.json has its hashes, under "code"."""

import json
import pathlib
from collections.abc import Mapping

from expandr_jax.errors import UserError
from expandr_jax.files.records import write_json

CODE, FAILED, MENDED = "code", "code_failed", "code_mended"  # Fields of config.json.


def keep_code(path: pathlib.Path, hashes: Mapping[str, str], replace: bool) -> list[str]:
    """Writes hashes of modules into a config.json, or refuses other code than it has.

    A module whose code has failed at the end of the last start may be another now: its hashes of
    before are kept, too.

    Args:
        path: The config.json of a run.
        hashes: Name of a module -> sha256 of its file.
        replace: Nothing was made with the code yet: it may have been mended.

    Returns:
        The names of modules that have made something, and were mended since they failed.

    Raises:
        UserError: A module has changed.
    """
    record = json.loads(path.read_bytes())
    before, failed = record.get(CODE, {}), record.pop(FAILED, {})
    changed = [name for name in hashes if before.get(name, hashes[name]) != hashes[name]]
    others = [name for name in changed if failed.get(name) != before[name]]
    if others and not replace:
        raise UserError(
            f"{others[0]} has changed since this run rewarded texts by it; put its file back as "
            "it was, or use a new --workdir"
        )
    mended = [] if replace else changed
    if mended:
        known = record.get(MENDED, {})
        record[MENDED] = known | {name: [*known.get(name, []), before[name]] for name in mended}
    if failed or before != hashes:
        write_json(path, {**record, CODE: dict(hashes)})
    return mended


def note_failure(path: pathlib.Path, module: str, sha256: str) -> None:
    """Notes in a config.json that a module's code has failed, so that it may be mended.

    Args:
        path: The config.json of a run.
        module: Its name.
        sha256: Its file's, as it ran.
    """
    record = json.loads(path.read_bytes())
    write_json(path, {**record, FAILED: {**record.get(FAILED, {}), module: sha256}})
