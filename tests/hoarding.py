"""`train.rehearsed` with two stages made wrong: "data" holds all texts, "export" is quadratic."""

from typing import Any

import numpy as np

from train import joint, rehearsed
from train.launch import launch

COPIES, SQUARED = 400, 12  # Of each text; bytes of a document times a document.
HELD: list[Any] = []


def wrong(prepare: Any, export: Any) -> tuple[Any, Any]:
    """Both functions as a run has them, and what should not be."""

    def hold(*args: Any, **kwargs: Any) -> Any:
        data = prepare(*args, **kwargs)
        HELD.extend(text * COPIES for text in data.collection.corpus.values())
        return data

    def square(*args: Any, **kwargs: Any) -> Any:
        documents = len(HELD)
        HELD.clear()
        assert np.ones(SQUARED * documents**2, np.uint8)[-1]
        return export(*args, **kwargs)

    return hold, square


if __name__ == "__main__":
    joint.prepare_data, joint.export_run = wrong(joint.prepare_data, joint.export_run)
    launch(rehearsed.main, rehearsed.define_flags)
