"""The quick start's generator as a listwise re-ranker: lists to learn from, training, its row.

    python -m train.orders --config=configs/listwise.py \
        --triples=runs/quickstart/round-0/triples.jsonl --to=runs/orders.jsonl
    python -m train.generator --config=configs/listwise.py --workdir=runs/listwise \
        --config.data.path=runs/orders.jsonl
    python -m train.export --workdir=runs/listwise --to=runs/listwise/export/generator
    python -m eval.beir --config=configs/listwise.py --workdir=runs/listwise-row \
        --config.generator.source=runs/listwise/export/generator --config.generator.sha256= \
        --data=runs/quickstart/data --systems=bm25,listwise:bm25

Without the last command's settings of the generator its row is the untrained one's.
"""

import ml_collections

from configs import dpo


def get_config(path: str = "") -> ml_collections.ConfigDict:
    """DPO alone, with room for a list of passages.

    Args:
        path: The file that train.orders wrote.
    """
    config = dpo.get_config(path)
    config.generator.prompt_buckets = (256, 512, 1024)
    config.dpo.prompt_length = 1024
    config.dpo.response_length = 96
    config.dpo.reward_temperature = 0.1  # With step_b="reward-sft" the better answers are learned.
    return config
