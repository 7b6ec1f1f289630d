"""More documents, generator's queries and test queries than the quick start has.

    python -m train.joint --config=configs/pydoc.py --workdir=runs/pydoc-0 --config.seed=0

It resumes, so it can be stopped and started again. Run it with several seeds.
"""

import ml_collections

from configs import quickstart

PACKAGES = (
    *quickstart.PACKAGES,
    "matplotlib==3.11.2",
    "networkx==3.6.1",
    "pandas==3.1.1",
    "scikit-learn==1.9.1",
)


def get_config() -> ml_collections.ConfigDict:
    """The reward that docs/pydoc.md compares; step B is the larger part."""
    config = quickstart.get_config()
    config.data.packages = PACKAGES
    # The paper's shares are 7 to 1. Of the retriever's only 1,024 are used, of the generator's all.
    config.data.shares.retriever_train = 0.49
    config.data.shares.generator_train = 0.35
    config.data.max_retriever_train = 1024
    config.data.max_generator_train = 0
    config.data.max_dev = 0
    config.data.max_test = 0
    config.retriever.max_length = 128
    config.contrastive.epochs = 2.0
    config.contrastive.batch_size = 32
    config.contrastive.negatives = 0
    # Half of the queries stay as they are, so that those without a passage do not fall behind.
    config.contrastive.plain_share = 0.5
    config.contrastive.query_weight = 0.5
    config.candidates.per_temperature = 4
    # A passage that is ranked alone does best where it repeats the query, which gains nothing
    # from it: so its reward is what it does for a search with the query. Not the rank there, which
    # is the same for most passages of a query, but the relevant document's share of the softmax.
    config.reward.positive = 0.0
    config.reward.answer = 0.0
    config.reward.corpus_measure = "softmax_share"
    config.reward.query_weight = 0.7
    config.reward.depth = 1000
    config.reward.threshold = 0.0
    config.answer.max_characters = 100  # No weight: only an empty one counts, and drops its query.
    config.answer.max_new_tokens = 16
    config.generator.remat = "none"  # 6.3 GB in DPO.
    config.dpo.epochs = 1.5
    config.dpo.learning_rate = 2e-4
    config.dpo.warmup_steps = 10
    config.dpo.dev_share = 0.1
    config.evaluation.query_weights = (0.5, 0.6, 0.7, 0.8, 0.9)
    config.evaluation.samples = (1, 2, 4)
    return config
