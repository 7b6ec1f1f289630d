"""Where a run's data come from: a path, or a file that the config has it download."""

import contextlib
import pathlib
from collections.abc import Callable

from expandr_jax.data.download import download
from expandr_jax.data.settings import DataSettings
from expandr_jax.errors import UserError
from expandr_jax.runtime.progress import Reporter

CACHE = "~/.cache/expandr-jax"


def data_path(config: DataSettings, reporter: Reporter) -> pathlib.Path:
    """The path of the config's section `data`, or the file of its url, downloaded if need be.

    Raises:
        UserError: Neither or both are given, or the file cannot be had.
    """
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
                bars.append(stack.enter_context(reporter.progress(task, total or count)))
            bars[0](count)

        return download(config.url, config.sha256, config.cache or CACHE, advance)
