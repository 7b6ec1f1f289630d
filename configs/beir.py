"""ExpandR on your own collection in BEIR layout, with the quick start's models.

    python -m train.joint --config=configs/beir.py:path/to/data --workdir=runs/mine

The directory needs train judgements. Other models: --config.retriever.source=..., and so on.
"""

import pathlib

import ml_collections

from configs import quickstart

# Their queries are documents of theirs, by the same ids; BEIR's evaluation leaves those out.
OF_OWN_DOCUMENTS = ("arguana", "quora")


def get_config(directory: str = "") -> ml_collections.ConfigDict:
    """Everything in the directory is used; the sizes of texts are for short documents.

    Args:
        directory: Holds corpus.jsonl, queries.jsonl and qrels/. Of one of `OF_OWN_DOCUMENTS`, by
            its name, no query finds itself.
    """
    config = quickstart.get_config()
    config.data.kind = "beir"
    config.data.path = directory
    config.data.packages = ()
    config.data.max_retriever_train = 0
    config.data.max_generator_train = 1000
    config.data.max_dev = 500
    config.data.max_test = 0
    config.retriever.max_length = 256
    config.expansion.strategy = "q2d"
    config.expansion.max_new_tokens = 64
    config.candidates.max_new_tokens = 64
    config.answer.max_new_tokens = 64
    config.generator.prompt_buckets = (64, 128, 512)
    config.dpo.prompt_length = 512
    config.dpo.response_length = 65
    name = pathlib.Path(directory).absolute().name.lower().removesuffix(".zip")
    config.evaluation.drop_identical_ids = name in OF_OWN_DOCUMENTS
    config.evaluation.query_weights = (0.5, 0.6, 0.7, 0.8, 0.9)
    return config
