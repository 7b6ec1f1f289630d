"""The table of docs/strategies.md: every strategy, by the quick start's models, for `eval.beir`.

    python -m eval.beir --config=configs/strategies.py --data=path/to/cranfield \
        --systems=all --workdir=runs/strategies/cranfield
    python -m eval.beir --config=configs/strategies.py:pydoc --samples=1 \
        --systems=all,dense+pydoc,bm25@d2q,dense@d2q,bm25@d2q+q2d,dense@d2q+q2d \
        --workdir=runs/strategies/pydoc

Texts are short and prompts are cut, for two cores.
"""

import ml_collections

from configs import beir, quickstart
from expandr_jax.errors import UserError


def get_config(data: str = "") -> ml_collections.ConfigDict:
    """The models and the sizes of texts.

    Args:
        data: "": a collection that --data names; "pydoc": docstrings of flax and optax.

    Raises:
        UserError: It is neither.
    """
    config = beir.get_config()
    if data not in ("", "pydoc"):
        raise UserError(
            f"configs/strategies.py:{data}: expected pydoc or, with --data=DIR, nothing"
        )
    if data == "pydoc":
        config.data.kind = "pydoc"
        config.data.packages = tuple(
            package for package in quickstart.PACKAGES
            if package.partition("==")[0] in ("flax", "optax")
        )  # fmt: skip
        config.data.min_pairs = 600
        config.data.max_test = 128  # As many as are sampled at once.
        config.data.shares.update(retriever_train=0.5, generator_train=0.1, dev=0.1, test=0.3)
    config.retriever.max_length = 256
    config.generator.prompt_buckets = (64, 128, 384)
    config.expansion.max_new_tokens = 32
    config.evaluation.fusion_steps = 0  # Nothing in the table is chosen.
    config.answer.max_characters = 200 if data else 300  # So much of each document is shown.
    return config
