"""Llama-3-8B as a retriever with an adapter, on a TPU slice; configs/decoder.py is its small kin.

    python -m train.plan --config=configs/decoder_8b.py --topology=v5e:4x4
    python -m train.retriever --config=configs/decoder_8b.py --workdir=runs/decoder-8b \
        --config.data.path=triples.jsonl --config.data.dev=path/to/beir

docs/plan.md has what the first command prints. The second wants accelerators and weights that we do
not have, and has not been run.
"""

import ml_collections

from configs import decoder, llama3_8b_anchordr


def get_config() -> ml_collections.ConfigDict:
    """The base is frozen in bfloat16, and spread over all chips; encoding takes a host's four."""
    config = decoder.get_config()
    config.retriever.source = "./models/Meta-Llama-3-8B-Instruct"
    config.retriever.shape = str(llama3_8b_anchordr.SHAPES / "llama3_8b_instruct.json")
    config.retriever.max_length = 512
    config.retriever.compute_dtype = "bfloat16"
    config.retriever.weights = "bfloat16"
    config.retriever.tokens_per_batch = 64 * 512
    config.contrastive.compute_dtype = "bfloat16"
    config.contrastive.batch_size = 512
    config.contrastive.negatives = 1
    config.contrastive.micro_batch = 32
    config.contrastive.remat = "full"
    config.contrastive.learning_rate = 1e-4
    config.mesh.contrastive = (1, -1, 1)
    config.mesh.encoding = (-1, 1, 4)
    return config
