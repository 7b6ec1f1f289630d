"""The paper's experiment (arXiv 2502.17057): the models, data and settings that it reports.

    python -m train.joint --config=configs/paper.py:anchordr --workdir=runs/paper-anchordr

The argument is the retriever: anchordr, contriever, cocondenser or bert. docs/paper.md says what
has to lie under models/ and data/, how much space it takes, and what is known of the settings;
nothing is fetched. Not run by us: it wants an accelerator and weights that we do not have.
"""

import ml_collections

from configs import base
from expandr_jax.errors import UserError

# Folder under models/, pooling ("": the model's own), and the released code's learning rate.
RETRIEVERS = {
    "anchordr": ("anchordr", "", 1e-5),
    "contriever": ("contriever", "mean", 3e-5),
    "cocondenser": ("co-condenser-marco", "cls", 3e-5),
    "bert": ("bert-base-uncased", "cls", 3e-5),
}
BEIR = (
    "msmarco", "trec-covid", "nfcorpus", "nq", "hotpotqa", "fiqa", "arguana", "webis-touche2020",
    "quora", "cqadupstack", "dbpedia-entity", "scidocs", "fever", "climate-fever", "scifact",
)  # fmt: skip
# 100,000 of the 808,740 lines go to step B; a tenth of the others were held out.
LINES, GENERATOR_LINES, HELD_OUT_LINES = 808_740, 100_000, 70_874


def get_config(retriever: str = "anchordr") -> ml_collections.ConfigDict:
    """Everything, on one device of 80 GB; more devices split each batch.

    Args:
        retriever: A key of `RETRIEVERS`.

    Raises:
        UserError: There is no such retriever.
    """
    if retriever not in RETRIEVERS:
        raise UserError(f"configs/paper.py:{retriever}: expected one of {', '.join(RETRIEVERS)}")
    folder, pooling, learning_rate = RETRIEVERS[retriever]
    config = base.get_config()
    config.data.kind = "triples"
    config.data.path = "data/echo-data"
    config.data.prepared = "data/prepared"
    config.data.tests = tuple(f"data/beir/{name}" for name in BEIR)
    shares = {
        "generator_train": GENERATOR_LINES / LINES,
        "dev": HELD_OUT_LINES / LINES / 2,
        "test": HELD_OUT_LINES / LINES / 2,
    }
    config.data.shares.update(retriever_train=1 - sum(shares.values()), **shares)
    config.data.max_dev = 1000
    config.data.max_test = 1000

    config.retriever.source = f"./models/{folder}"
    config.retriever.pooling = pooling
    config.retriever.normalize = True
    config.retriever.compute_dtype = "bfloat16"
    config.retriever.tokens_per_batch = 65536
    config.generator.source = "./models/Meta-Llama-3-8B-Instruct"
    config.generator.remat = "full"
    config.generator.prompt_buckets = (64, 128, 256, 512, 1024)

    config.contrastive.compute_dtype = "bfloat16"
    config.contrastive.learning_rate = learning_rate
    config.contrastive.batch_size = 128  # 64 on each of 2 devices, all one another's negatives.
    config.contrastive.accumulation = 8
    config.contrastive.micro_batch = 32
    config.contrastive.negatives = 1
    config.mining.per_query = 0  # Each line has its own negative.
    config.dpo.batch_size = 2
    config.dpo.accumulation = 8

    config.evaluation.systems = (
        "bm25", "zero-shot", "zero-shot+expansion", "fine-tuned", "fine-tuned+expansion",
        "expandr", "expandr-base-generator", "expandr-plain",
    )  # fmt: skip
    config.evaluation.query_weights = (0.5,)
    config.evaluation.samples = (1,)
    config.evaluation.drop_identical_ids = True  # As the released code; it matters on ArguAna.
    return config
