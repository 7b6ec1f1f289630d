"""Where a run's data come from: a path, or a file that the config has it download."""

import contextlib
import pathlib
from collections.abc import Callable

from expandr_jax.data.download import download
from expandr_jax.errors import UserError
from expandr_jax.runtime.run import Run

CACHE = "~/.cache/expandr-jax"


def data_path(run: Run) -> pathlib.Path:
    """The config's data.path, or the file of its data.url, downloaded if need be.

    Raises:
        UserError: Neither or both are given, or the file cannot be had.
    """
    config = run.config.data
    if config.path and config.url:
        raise UserError("data.path and data.url: expected one of them")
    if config.path:
        return pathlib.Path(config.path)
    if not config.url:
        raise UserError("data.path is missing: --config.data.path=...")
    with contextlib.ExitStack() as stack:
        bars: list[Callable[[int], None]] = []

        def advance(count: int, total: int) -> None:
            if not bars:  # The server says how many there are, if it does.
                task = f"bytes of {config.url.rsplit('/', 1)[-1]}"
                bars.append(stack.enter_context(run.progress(task, total or count)))
            bars[0](count)

        return download(config.url, config.sha256, config.cache or CACHE, advance)
