"""What older runs wrote, as the present code has it."""

import dataclasses
from typing import Any


def identity_of(section: str, settings: Any) -> dict[str, Any]:
    """The settings of a section as checkpoints are told apart by: the same for older runs.

    Args:
        section: Its name in the config.
        settings: What it was read into.
    """
    return dataclasses.asdict(settings)
