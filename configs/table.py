"""The reference table: the quick start's models on several collections, for `eval.table`.

    python -m eval.table --config=configs/table.py --data=DIR,DIR,pydoc --seeds=0,1,2 --workdir=OUT
    python -m eval.table --config=configs/table.py --data=scifact,nfcorpus,pydoc --workdir=OUT

The second downloads what configs/public.py has, where no directory has such a name.
One cell of it alone is a run of `train.joint --config=configs/table.py:DIR` with --config.seed=S.
It is meant to end within 60 minutes on two cores. docs/results.md has what the table says.
"""

import pathlib

import ml_collections

from configs import beir, public, quickstart

HARVEST = "pydoc"  # The collection of docstrings, which no directory holds.
# Their queries have several relevant documents each, and more that nobody judged: what is mined as
# a negative is often one of these. docs/results.md has what that did to rankings of dev.
OF_SEVERAL_RELEVANT = ("entailmentbank", "nfcorpus")

# A row each. What expansions have to beat stands above them: `expandr_jax.ranking.baselines` pairs
# rows by their names, INTERPOLATION:expandr with INTERPOLATION:fine-tuned for example.
SYSTEMS = (
    "bm25",
    "bm25+rm3",
    "zero-shot",
    "zero-shot+prf-average",
    "zero-shot+prf-rocchio",
    "fine-tuned",
    "fine-tuned-all",
    "fine-tuned+prf-average",
    "fine-tuned+prf-rocchio",
    "zero-shot+expansion",
    "fine-tuned+expansion",
    "bm25+expansion",
    "expandr-plain",
    "expandr-base-generator",
    "expandr",
    "expandr-gated",
    "expandr-gated-after",
    "interpolation:bm25:zero-shot",
    "interpolation:bm25:fine-tuned",
    "interpolation:bm25:fine-tuned-all",
    "interpolation:bm25:zero-shot+expansion",
    "interpolation:bm25:fine-tuned+expansion",
    "interpolation:bm25:expandr-plain",
    "interpolation:bm25:fine-tuned+prf-average",
    "interpolation:bm25:fine-tuned+prf-rocchio",
    "interpolation:bm25:expandr",
    "interpolation:bm25:expandr-gated",
)


def get_config(collection: str = HARVEST) -> ml_collections.ConfigDict:
    """A cell's config, but for its seed.

    Args:
        collection: A directory in BEIR layout, with train judgements, a name of
            configs/public.py, or `HARVEST`.
    """
    if collection == HARVEST:
        config = quickstart.get_config()
    elif collection in public.MD5 and not pathlib.Path(collection).exists():
        config = public.get_config(collection)
    else:
        config = beir.get_config(collection)
    config.data.max_retriever_train = 640
    config.data.max_generator_train = 128
    config.data.max_dev = 128
    config.data.max_test = 400
    if collection == HARVEST:
        config.data.shares.generator_train = 0.14
        config.data.shares.retriever_train = 0.70
    else:
        # Where no dev queries are given, a small collection, too, has about a hundred to choose by.
        config.data.shares.dev = 0.17
        config.data.shares.generator_train = 0.18
        config.data.shares.retriever_train = 0.65
        config.expansion.max_new_tokens = 32
        config.candidates.max_new_tokens = 32
        config.answer.max_new_tokens = 32
        config.dpo.response_length = 33
    if pathlib.Path(collection).absolute().name.removesuffix(".zip") in OF_SEVERAL_RELEVANT:
        config.contrastive.negatives = 0
        config.contrastive.batch_size = 64
        config.contrastive.epochs = 2.0  # As many documents as otherwise, with their negatives.
        config.contrastive.temperature = 0.05
    config.evaluation.systems = SYSTEMS
    config.evaluation.query_weights = (0.5, 0.6, 0.7, 0.8, 0.9)
    return config
