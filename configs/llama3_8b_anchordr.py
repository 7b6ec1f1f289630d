"""The paper's pair, Llama-3-8B-Instruct and AnchorDR, on a TPU slice.

    python -m train.plan --config=configs/llama3_8b_anchordr.py --topology=v5e:4x4
    python -m train.joint --config=configs/llama3_8b_anchordr.py --workdir=runs/llama3

As configs/paper.py:anchordr, but for batches of the size that a slice is worth renting for, and for
meshes. docs/plan.md has what the first command prints; docs/paper.md says what the second needs.
Not run by us: it wants accelerators and weights that we do not have; single programs of it, with
made-up weights, ran on an H100 (docs/plan.md).
"""

import pathlib

import ml_collections

from configs import paper

SHAPES = pathlib.Path(__file__).resolve().parent / "shapes"


def get_config() -> ml_collections.ConfigDict:
    """Hosts of 4 chips, two or more: training takes all chips, sampling and encoding a host's."""
    config = paper.get_config("anchordr")
    config.retriever.shape = str(SHAPES / "anchordr.json")
    config.generator.shape = str(SHAPES / "llama3_8b_instruct.json")

    config.retriever.tokens_per_batch = 4096 * 512
    config.contrastive.batch_size = 1024  # Each with its expansion, its document and a negative.
    config.contrastive.accumulation = 1
    config.contrastive.micro_batch = 512
    config.contrastive.remat = "full"
    config.generator.slots = 512
    config.dpo.batch_size = 16
    config.dpo.accumulation = 1
    config.dpo.chunk = 4096  # 256 tokens of each pair.

    config.mesh.contrastive = (1, -1, 1)  # Weights and optimizer state spread; gathered by layer.
    config.mesh.encoding = (-1, 1, 1)  # Whole weights everywhere: nothing is sent.
    config.mesh.sampling = (-1, 1, 4)  # A step reads weights once: each chip a quarter of them.
    config.mesh.dpo = (1, -1, 1)
    return config
