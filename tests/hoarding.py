"""`train.rehearsed` with two stages made wrong: "data" holds all texts, "export" is quadratic."""

import time
from typing import Any

import numpy as np

from train import joint, rehearsed
from train.launch import launch

COPIES, SQUARED = 4000, 60  # Of each text; bytes for each pair of documents.


def wrong(prepare: Any, export: Any) -> tuple[Any, Any]:
    """Both functions as a run has them, and what should not be."""
    documents = 0

    def hold(*args: Any, **kwargs: Any) -> Any:
        nonlocal documents
        data = prepare(*args, **kwargs)
        held = [text * COPIES for text in data.collection.corpus.values()]
        documents = len(held)
        return data

    def square(*args: Any, **kwargs: Any) -> Any:
        pairs = np.ones(SQUARED * documents**2, np.uint8)
        time.sleep(1)  # Memory is looked at now and then, and other work may be beside it.
        assert pairs[-1]
        del pairs
        return export(*args, **kwargs)

    return hold, square


if __name__ == "__main__":
    joint.prepare_data, joint.export_run = wrong(joint.prepare_data, joint.export_run)
    launch(rehearsed.main, rehearsed.define_flags)
