"""Published checkpoints as they are, for `eval.beir`: nothing is trained.

    python -m eval.beir --config=configs/published.py:expandr --workdir=runs/published \
        --data=data/beir/scifact,data/beir/fiqa --systems=dense,dense+q2d

The argument is expandr (the authors' retriever and generator), anchordr, contriever or
contriever-msmarco. docs/paper.md says what has to lie under models/ and which results are known.
"""

import ml_collections

from configs import paper
from expandr_jax.errors import UserError

# Folder under models/, pooling ("": the model's own), unit length, and the generator's folder.
CHECKPOINTS = {
    "expandr": ("ExpandR_Retriever", "", True, "ExpandR_LLM"),
    "anchordr": ("anchordr", "", True, "Meta-Llama-3-8B-Instruct"),
    # Contriever was published with, and is measured by, dot products.
    "contriever": ("contriever", "mean", False, "Meta-Llama-3-8B-Instruct"),
    "contriever-msmarco": ("contriever-msmarco", "mean", False, "Meta-Llama-3-8B-Instruct"),
}


def get_config(checkpoint: str = "expandr") -> ml_collections.ConfigDict:
    """The models; the generator is only loaded for systems that expand.

    Args:
        checkpoint: A key of `CHECKPOINTS`.

    Raises:
        UserError: There is no such checkpoint.
    """
    if checkpoint not in CHECKPOINTS:
        raise UserError(
            f"configs/published.py:{checkpoint}: expected one of {', '.join(CHECKPOINTS)}"
        )
    folder, pooling, normalize, generator = CHECKPOINTS[checkpoint]
    config = paper.get_config()
    config.retriever.source = f"./models/{folder}"
    config.retriever.pooling = pooling
    config.retriever.normalize = normalize
    config.retriever.compute_dtype = "float32"
    config.contrastive.normalize = "before" if normalize else "none"
    config.generator.source = f"./models/{generator}"
    return config
