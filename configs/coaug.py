"""Query-document co-augmentation (arXiv 2506.18670): one generator writes keywords for both sides.

    python -m train.policy --config=configs/coaug.py:DIR --workdir=runs/coaug
    python -m train.export --workdir=runs/coaug --to=runs/coaug/export/generator
    python -m eval.beir --config=configs/coaug.py:DIR --data=DIR --workdir=runs/coaug/rows \\
        --config.generator.source=runs/coaug/export/generator --config.generator.sha256= \\
        --systems=bm25,bm25+q2e,bm25@d2e,bm25@d2e+q2e,dense,dense+q2e,dense@d2e,dense@d2e+q2e

DIR is a collection in BEIR layout, NFCorpus in the paper. The rows: nothing is expanded, queries,
documents, both; what is indexed are the trained generator's texts. eval.beir without the two
settings of the generator has the same rows by the untrained one. Rewards are by BM25, which reads
all of a document; --config.reward.search=dense has them by vectors.
"""

import ml_collections

from configs import beir


def get_config(directory: str = "") -> ml_collections.ConfigDict:
    """The quick start's models; keywords alone, where the paper's 7B reasons before them."""
    config = beir.get_config(directory)
    config.step_b = "grpo"
    config.lora.dropout = 0.0
    config.retriever.max_length = 512  # Keywords stand behind a document.
    config.generator.prompt_buckets = (64, 160)
    config.expansion.strategy = "q2e"
    config.expansion.max_new_tokens = 24
    config.expansion.repetition_penalty = 1.2
    config.answer.max_characters = 400  # A document's beginning, as a prompt shows it.
    config.reward.positive = 0.0
    config.reward.answer = 0.0
    config.reward.corpus = 0.0
    config.reward.search = "bm25"
    config.reward.group = 1.0
    config.reward.group_sets = 32
    config.grpo.loss = "dr_grpo"
    config.grpo.steps = 60
    config.grpo.queries = 6
    config.grpo.documents = 4
    config.grpo.samples = 5
    config.grpo.temperature = 1.2
    config.grpo.repetition_penalty = 1.2
    config.grpo.max_new_tokens = 24
    config.grpo.learning_rate = 1e-4
    config.grpo.kl_weight = 0.001
    config.grpo.entropy_weight = 0.001
    return config
