"""What the authors' released code does, where it differs from the paper, as far as settings go.

    python -m train.joint --config=configs/reference_code.py:anchordr --workdir=runs/reference

The argument is anchordr or contriever (the older code). docs/paper.md has the differences one by
one, and what no setting here expresses.
"""

import ml_collections

from configs import paper
from expandr_jax.errors import UserError

RETRIEVERS = ("anchordr", "contriever")


def get_config(retriever: str = "anchordr") -> ml_collections.ConfigDict:
    """The paper's config with the released code's settings.

    Args:
        retriever: One of `RETRIEVERS`.

    Raises:
        UserError: There is no such retriever in the released code.
    """
    if retriever not in RETRIEVERS:
        raise UserError(
            f"configs/reference_code.py:{retriever}: expected one of {', '.join(RETRIEVERS)}"
        )
    config = paper.get_config(retriever)
    # Each device sees its own 64 queries' passages alone, and an update sees 2 x 8 x 64 queries.
    config.contrastive.batch_size = 64
    config.contrastive.accumulation = 16
    if retriever == "anchordr":  # Its flags for length and temperature reach nothing.
        config.retriever.normalize = False
        config.contrastive.normalize = "none"
        config.contrastive.temperature = 1.0
    else:
        config.contrastive.normalize = "before"
    config.expansion.strip_train_lead_ins = False
    config.dpo.dev_share = 0.1  # 3,000 of 30,000 pairs.
    return config
