"""Which revision of this code runs: the commit of its checkout, or the version of the package."""

import functools
import importlib.metadata
import pathlib
import subprocess

PACKAGE = "expandr-jax"
_HERE = pathlib.Path(__file__).resolve()


@functools.cache
def revision() -> str:
    """The commit, with "+changes" where tracked files differ from it; without git, the version."""
    try:
        # An environment may lie within a checkout of something else, whose commit says nothing.
        _git("ls-files", "--error-unmatch", _HERE.name)
        commit, changed = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "-uno")
        return f"{commit}+changes" if changed else commit
    except (OSError, subprocess.SubprocessError):
        pass
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(_HERE.parent), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    return done.stdout.strip()
