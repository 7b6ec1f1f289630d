"""Rewrite-Retrieve-Read (arXiv 2305.14283): the generator rewrites the query, which is left out.

    python -m train.joint --config=configs/rewrite.py:DIR --workdir=runs/rewrite

DIR is a collection in BEIR layout whose queries.jsonl has "answers". A text is worth 1 where one of
the ten documents that BM25 finds for it holds an answer. The generator first learns the texts that
hit, then on-policy (--config.step_b=dpo: from pairs); no reader is asked, as the paper's reward of
exact match and F1 would want one.
"""

import ml_collections

from configs import beir


def get_config(directory: str = "") -> ml_collections.ConfigDict:
    """The quick start's models; step A trains the retriever on rewritten queries."""
    config = beir.get_config(directory)
    config.step_b = "grpo"
    config.warm_start = "best"
    config.lora.dropout = 0.0
    config.expansion.strategy = "rewrite"
    config.expansion.max_new_tokens = 24
    config.candidates.max_new_tokens = 24
    config.dpo.response_length = 25
    config.contrastive.query_weight = 0.0
    config.reward.positive = 0.0
    config.reward.answer = 0.0
    config.reward.search = "bm25"
    config.reward.corpus = 1.0
    config.reward.corpus_measure = "hit"
    config.reward.depth = 10
    config.reward.query_weight = 0.0
    config.reward.threshold = -2.0  # A query is kept whatever its texts are alike to.
    config.candidates.per_temperature = 4
    config.grpo.max_new_tokens = 24
    config.grpo.learning_rate = 1e-4
    config.grpo.resample = 4  # Most queries' texts all hit, or none.
    config.grpo.kl_weight = 0.001
    config.evaluation.query_weights = (0.0,)
    config.evaluation.systems = (
        "bm25", "bm25+rewrite", "bm25+expansion", "zero-shot", "zero-shot+rewrite", "fine-tuned",
        "expandr", "expandr-base-generator", "expandr-plain",
    )  # fmt: skip
    return config
