"""LeReT (arXiv 2410.23214): queries that several prompts gave, by average precision; SFT, then IPO.

    python -m train.joint --config=configs/leret.py:DIR --workdir=runs/leret

DIR is a collection in BEIR layout with dev queries and several relevant documents a query. Its
candidates differ by the examples that their prompts showed, which dev chose. What is learned has no
examples in its prompt: first the best text of each query, then pairs by IPO, whose reference is
what the former made. Their two hops are not here: each query is searched for once.
"""

import ml_collections

from configs import beir


def get_config(directory: str = "") -> ml_collections.ConfigDict:
    """The quick start's models; a text replaces its query, as LeReT's do."""
    config = beir.get_config(directory)
    config.warm_start = "best"
    config.data.max_generator_train = 256
    config.generator.prompt_buckets = (64, 256, 512)
    config.expansion.strategy = "rewrite"
    config.expansion.max_new_tokens = 24
    config.candidates.max_new_tokens = 24
    config.dpo.response_length = 25
    config.contrastive.query_weight = 0.0
    config.demonstrations.prompts = 8
    config.demonstrations.queries = 50
    config.candidates.temperatures = (0.3,)
    config.candidates.per_temperature = 8
    config.answer.max_characters = 100  # No weight: only an empty one counts, and drops its query.
    config.answer.max_new_tokens = 16
    config.reward.positive = 0.0
    config.reward.answer = 0.0
    config.reward.corpus = 1.0
    config.reward.corpus_measure = "average_precision"
    config.reward.query_weight = 0.0
    config.reward.threshold = -2.0  # A query is kept whatever its texts are alike to.
    config.dpo.loss = "ipo"
    config.dpo.beta = 0.05
    config.dpo.reference = "start"
    config.evaluation.query_weights = (0.0,)
    config.evaluation.systems = (
        "bm25", "bm25+expansion", "zero-shot", "zero-shot+rewrite", "fine-tuned", "expandr",
        "expandr-base-generator", "expandr-plain",
    )  # fmt: skip
    return config
