"""The reference table with models of the papers' size: Llama-3-8B-Instruct and three retrievers.

    python -m train.plan --config=configs/table_8b.py:bge-base --topology=v5e:4x4
    python -m train.rehearse --config=configs/table_8b.py:bge-base --processes=4
    python -m train.joint --config=configs/table_8b.py:bge-base --workdir=runs/bge-base-0

The argument is the retriever: bge-base, contriever or anchordr. Most of the collections have no
training queries, so the pair is trained once a seed, as by configs/llama3_8b_anchordr.py, and its
rows, those of configs/table.py, are tested on the six sets of QueryGym's public table and on
BRIGHT. Nothing of it has been measured: it wants accelerators, weights and data that we do not
have. The first two commands need none of them, and say whether it would fit.
"""

import ml_collections

from configs import llama3_8b_anchordr, paper, table
from expandr_jax.errors import UserError

# Folder under models/, pooling ("": the model's own), learning rate as of configs/paper.py, and
# the shape that is planned with. bge-base reads queries without its instruction.
RETRIEVERS = {
    "bge-base": ("bge-base-en-v1.5", "cls", paper.RETRIEVERS["bert"][-1], "bert_base"),
    "contriever": (*paper.RETRIEVERS["contriever"], "bert_base"),
    "anchordr": (*paper.RETRIEVERS["anchordr"], "anchordr"),
}
QUERYGYM = ("arguana", "dbpedia-entity", "fiqa", "scifact", "trec-covid", "trec-news")


def get_config(retriever: str = "bge-base") -> ml_collections.ConfigDict:
    """One retriever's training and tests.

    Args:
        retriever: A key of `RETRIEVERS`.

    Raises:
        UserError: There is no such retriever.
    """
    if retriever not in RETRIEVERS:
        raise UserError(f"configs/table_8b.py:{retriever}: expected one of {', '.join(RETRIEVERS)}")
    folder, pooling, learning_rate, shape = RETRIEVERS[retriever]
    config = llama3_8b_anchordr.get_config()
    config.retriever.source = f"./models/{folder}"
    config.retriever.pooling = pooling
    config.retriever.shape = str(llama3_8b_anchordr.SHAPES / f"{shape}.json")
    config.contrastive.learning_rate = learning_rate
    config.data.tests = (*(f"data/beir/{name}" for name in QUERYGYM), "data/bright")
    config.evaluation.systems = table.SYSTEMS
    config.evaluation.query_weights = (0.5, 0.6, 0.7, 0.8, 0.9)
    return config
