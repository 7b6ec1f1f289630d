"""On-policy training of the quick start's generator, for what a passage adds to the plain query.

    python -m train.policy --config=configs/grpo.py --workdir=runs/grpo

against its retriever as it is; `train.joint` with this config trains the retriever first.
"""

import ml_collections

from configs import quickstart


def get_config() -> ml_collections.ConfigDict:
    """The quick start's models and documents; 1,000 queries for the generator."""
    config = quickstart.get_config()
    config.step_b = "grpo"
    config.data.max_generator_train = 1000
    config.lora.dropout = 0.0
    config.reward.positive = 0.0
    config.reward.answer = 0.0
    config.reward.corpus = 0.0
    config.reward.gain = 1.0
    # A rank stays the same for most passages of a query; the document's share does not.
    config.reward.gain_measure = "softmax_share"
    config.reward.query_weight = 0.7
    config.grpo.max_new_tokens = 32
    config.grpo.learning_rate = 1e-4
    return config
