"""The whole of `train.joint` in seconds, on tiny random models and a few docstrings.

    python -m train.joint --config=configs/smoke.py --workdir=runs/smoke

For tests and for trying an override; the results mean nothing.
"""

import pathlib

import ml_collections

from configs import base

MODELS = pathlib.Path(__file__).resolve().parent / "tiny"


def get_config() -> ml_collections.ConfigDict:
    """Tiny sizes everywhere, every stage run."""
    config = base.get_config()
    config.data.kind = "pydoc"
    config.data.packages = ("optax==0.2.8",)
    config.data.shares.update(retriever_train=0.4, generator_train=0.2, dev=0.15, test=0.25)
    config.data.max_retriever_train = 32
    config.data.max_generator_train = 8
    config.data.max_dev = 8
    config.data.max_test = 16
    config.retriever.source = str(MODELS / "tiny-bert")
    config.retriever.max_length = 16  # One length, so one program each.
    config.generator.source = str(MODELS / "tiny-llama")
    config.generator.compute_dtype = "float32"
    config.generator.slots = 16
    config.generator.prompt_buckets = (96,)
    config.expansion.max_new_tokens = 8
    config.contrastive.batch_size = 8
    config.contrastive.epochs = 2.0
    config.contrastive.learning_rate = 1e-3
    config.contrastive.negatives = 1
    config.contrastive.save_every = 3
    config.candidates.per_temperature = 1
    config.candidates.max_new_tokens = 8
    config.answer.max_new_tokens = 8
    config.answer.max_characters = 100
    config.reward.corpus = 1.0
    config.reward.threshold = -2.0
    config.dpo.batch_size = 2
    config.dpo.epochs = 2.0
    config.dpo.learning_rate = 1e-3
    config.dpo.prompt_length = 32  # One length again.
    config.dpo.response_length = 9
    config.dpo.save_every = 2
    config.evaluation.query_weights = (0.5, 0.9)
    config.evaluation.samples = (1, 2)
    config.evaluation.sample_depth = 50
    return config
