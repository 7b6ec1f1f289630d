"""DPO alone: the quick start's generator on any file of preference pairs in TRL's formats.

    python -m train.generator --config=configs/dpo.py --workdir=runs/dpo \
        --config.data.path=preferences.jsonl

The file of a run of `train.joint` is runs/NAME/round-0/preferences.jsonl.
"""

import ml_collections

from configs import quickstart


def get_config(path: str = "") -> ml_collections.ConfigDict:
    """The quick start's model, adapter and DPO, with room for longer texts.

    Args:
        path: The file of pairs.
    """
    config = quickstart.get_config()
    config.data.kind = "preferences"
    config.data.path = path
    config.data.packages = ()
    config.dpo.prompt_length = 512
    config.dpo.response_length = 256
    config.dpo.dev_share = 0.1  # The quick start, with 64 queries, holds none out.
    config.dpo.eval_every = 100
    return config
