"""BRIGHT as the hub has it, for `eval.beir`: searches that take reasoning (arXiv 2407.12883).

    python -m eval.beir --config=configs/bright.py:DIR --systems=bm25q,dense --workdir=runs/bright

DIR is a copy of xlangai/BRIGHT from the Hugging Face hub, or a part of it:

    examples/TASK-*.parquet        the queries, the documents relevant to each, and those left out
    documents/TASK-*.parquet       the passages
    long_documents/TASK-*.parquet  whole pages, for eight of the tasks: DIR:long searches these

DIR:biology and DIR:biology-long are one task. Files may be .jsonl or .jsonl.gz as well, with the
same fields; expandr_jax/data/bright.py says how they are read and scored. Needed are the files of
the tasks that are wanted; those of model-written reasoning are not.
"""

import ml_collections

from configs import beir


def get_config(directory: str = "") -> ml_collections.ConfigDict:
    """The quick start's models; queries are long, and so are the texts that are read.

    Args:
        directory: In the layout above, with or without what a colon chooses.
    """
    config = beir.get_config(directory)
    config.retriever.max_length = 512
    config.generator.prompt_buckets = (128, 512, 1024)
    config.evaluation.drop_identical_ids = False  # Excluded ids say what a query must not find.
    return config
