"""The quick start at full size: all docstring pairs, over 1,000 test queries; hours on two cores.

    python -m train.joint --config=configs/pydoc.py --workdir=runs/pydoc-0 --config.seed=0

It resumes, so it can be stopped and started again. Run it with several seeds.
"""

import ml_collections

from configs import quickstart

# From requirements-pydoc.txt and the lock.
PACKAGES = (
    *quickstart.PACKAGES,
    "matplotlib==3.11.2",
    "networkx==3.6.1",
    "pandas==3.1.1",
    "scikit-learn==1.9.1",
)


def get_config() -> ml_collections.ConfigDict:
    """More of everything: text, training queries, candidates' queries, samples averaged."""
    config = quickstart.get_config()
    config.data.packages = PACKAGES
    config.data.max_retriever_train = 4096
    config.data.max_generator_train = 384
    config.data.max_dev = 400
    config.data.max_test = 0
    config.retriever.max_length = 128
    config.expansion.max_new_tokens = 32
    config.candidates.max_new_tokens = 32
    config.dpo.response_length = 33
    config.dpo.dev_share = 0.1
    config.evaluation.query_weights = (0.5, 0.6, 0.7, 0.8, 0.9)
    config.evaluation.samples = (1, 2, 4)
    return config
