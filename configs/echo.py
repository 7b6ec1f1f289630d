"""ExpandR on the paper's training data, with the quick start's models.

    python -m train.joint --config=configs/echo.py:path/to/echo-data --workdir=runs/echo

The directory holds .jsonl[.gz] files with `query`, `positive` and `negative` in each line: the
eight of echo-embeddings (eli5_question_answer, fever, hotpot_qa, msmarco_document, msmarco_passage,
nq, squad and trivia_qa; 808,740 lines in all), or any others. A held-out share of them is the dev
and test data; --config.data.tests="('beir/scifact','beir/fiqa')" adds collections to test on.
"""

import ml_collections

from configs import beir


def get_config(directory: str = "") -> ml_collections.ConfigDict:
    """Sizes for a laptop; 0 in data.max_... takes everything.

    Args:
        directory: Holds the files.
    """
    config = beir.get_config()
    config.data.kind = "triples"
    config.data.path = directory
    config.data.shares.update(retriever_train=0.8575, generator_train=0.1225, dev=0.01, test=0.01)
    config.data.max_retriever_train = 3584
    config.data.max_generator_train = 512
    config.data.max_dev = 256
    config.data.max_test = 1024
    config.mining.per_query = 0  # Each line has its own negative.
    return config
