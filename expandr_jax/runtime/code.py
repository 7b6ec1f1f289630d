"""The user's own code that a run has been made with: config.json has its hashes, under "code"."""

import json
import pathlib
from collections.abc import Mapping

from expandr_jax.errors import UserError
from expandr_jax.files.records import write_json


def keep_code(path: pathlib.Path, hashes: Mapping[str, str], replace: bool) -> None:
    """Writes hashes of modules into a config.json, or refuses other code than it has.

    Args:
        path: The config.json of a run.
        hashes: Name of a module -> sha256 of its file.
        replace: Nothing was made with the code yet: it may have been mended.

    Raises:
        UserError: A module has changed.
    """
    record = json.loads(path.read_bytes())
    before = record.get("code", {})
    if before == hashes:
        return
    changed = [name for name in hashes if before.get(name, hashes[name]) != hashes[name]]
    if changed and not replace:
        raise UserError(
            f"{changed[0]} has changed since this run rewarded texts by it; put its file back as "
            "it was, or use a new --workdir"
        )
    write_json(path, {**record, "code": dict(hashes)})
