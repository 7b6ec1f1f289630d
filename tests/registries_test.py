"""Every registry of methods: what each entry takes and gives, and a worked value of each."""

import dataclasses
import functools
import math
import pathlib
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from gguf import MODEL_ARCH_NAMES
from safetensors.numpy import load_file, save_file

from configs import base
from expandr_jax.config import read_config
from expandr_jax.data.beir import Collection
from expandr_jax.data.training_data import TrainingData
from expandr_jax.expansion.strategies import STRATEGIES, DenseQuery
from expandr_jax.losses.contrastive import CONTRASTIVE_LOSSES, ContrastiveLossSettings, Vectors
from expandr_jax.losses.preference import PREFERENCE_LOSSES, PreferenceSettings
from expandr_jax.models.pooling import pool
from expandr_jax.objectives.objective import ObjectiveSettings
from expandr_jax.objectives.packing import Example, pack
from expandr_jax.objectives.registry import OBJECTIVES
from expandr_jax.ranking.rerank import RERANKERS, RerankSettings
from expandr_jax.ranking.stages import FEEDBACKS, FUSIONS, WEIGHINGS, WORD_FEEDBACKS
from expandr_jax.rewards.evidence import Evidence
from expandr_jax.rewards.group import Candidate, Group
from expandr_jax.rewards.registry import REWARDS
from expandr_jax.search import Bm25Index
from expandr_jax.vectors.corpus import Corpus
from expandr_jax.weights.families import BY_TYPE, model_config
from expandr_jax.weights.fields import Fields
from expandr_jax.weights.load import leaf_shapes
from expandr_jax.weights.tokenizer_classes import CLASSES
from train.scores import RewardTools, reward_context

POLICY = np.array([[-10.0, -9.0], [-3.0, -5.0], [-2.0, -2.0]], np.float32)
REFERENCE = np.array([[-12.0, -8.0], [-4.0, -3.0], [-2.0, -2.0]], np.float32)
LOSSES = {  # Of the first pair: beta h is 0.3.
    "sigmoid": math.log(1 + math.exp(-0.3)),
    "hinge": 0.7,
    "ipo": 4.0,
    "robust": math.log(1 + math.exp(-0.3)),
    "simpo": math.log(1 + math.exp(0.1 * 1 + 0.5)),  # It looks at the policy alone: h is -1.
}


def jitted_too(function, *arrays):
    """What a function gives, which is the same compiled."""
    plain = function(*arrays)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), plain, jax.jit(function)(*arrays)
    )
    return plain


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_preference_losses(name):
    loss = PREFERENCE_LOSSES[name]
    given = (POLICY, REFERENCE) if loss.reference else (POLICY, None)
    of_pairs = functools.partial(loss.losses, settings=PreferenceSettings())
    found = jitted_too(of_pairs, *given)
    assert found.shape == (3,)
    assert np.isfinite(found).all()
    order = [2, 0, 1]
    moved = of_pairs(*(None if x is None else x[order] for x in given))
    np.testing.assert_array_equal(moved, found[jnp.array(order)])
    np.testing.assert_allclose(found[0], LOSSES[name], rtol=1e-5)
    # A pair that gains is pulled less than the same pair the wrong way round.
    turned = of_pairs(*(None if x is None else x[:, ::-1] for x in given))
    assert found[1] < turned[1]


HIGH, LOW = math.exp(2) / (2 * math.exp(2) + 2), 1 / (2 * math.exp(2) + 2)
CONTRASTIVE = {  # Of the first query: its scores, over tau, are 2, 0, 0 and 2.
    "info_nce": -math.log(HIGH),
    "margin_mse": (1 - 1.5) ** 2,
    "kl": math.log((1 + math.exp(-2)) / (1 + math.exp(-1.5))) + 0.5 / (1 + math.exp(1.5)),
    "invariance": 4 * (HIGH - LOW),  # The plain query's are 0, 2, 2 and 0.
}


@pytest.mark.parametrize("name", CONTRASTIVE_LOSSES)
def test_contrastive_losses(name):
    x = np.array([[1.0, 0.0], [0.0, 1.0]], np.float32)
    settings = ContrastiveLossSettings(temperature=0.5)

    def of(order):
        vectors = Vectors(x[order], x[order], x[::-1][order], x[::-1][order])
        batch = {
            "excluded": np.zeros((2, 4), bool),
            "given": np.ones((2, 2), bool),
            "teacher_scores": np.array([[2.0, 0.5], [1.0, 3.0]], np.float32)[order],
        }
        loss = functools.partial(CONTRASTIVE_LOSSES[name], tau=0.5, settings=settings)
        return jitted_too(lambda vectors, batch: loss(vectors, batch), vectors, batch)

    found = of([0, 1])
    assert found.shape == (2,)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(of([1, 0]), found[::-1], rtol=1e-6)
    np.testing.assert_allclose(found[0], CONTRASTIVE[name], rtol=1e-5)


OBJECTIVE_LOSSES = {  # Of an example whose responses have log-probabilities -3 and -1 - 1.
    **dict.fromkeys(("sigmoid", "robust"), math.log(1 + math.exp(0.1))),  # h is -3 + 2.
    "hinge": 1.1,
    "ipo": (-2 - 5) ** 2,  # Means, -3 and -1.
    "simpo": math.log(1 + math.exp(0.1 * 2 + 0.5)),
    "reward-sft": 0.5 * 3,
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives(name):
    """Examples to rows, and a token's log-probabilities to a loss a row, as it is packed."""
    objective = OBJECTIVES[name]
    examples = [
        Example(prompt, responses[: objective.responses], dict.fromkeys(objective.extras, 0.5))
        for prompt, responses in (([5, 6], ([7], [8, 9])), ([5], ([6, 7, 8], [9])))
    ]
    losses = functools.partial(objective.losses, settings=ObjectiveSettings())

    def of(examples):
        batch = pack(examples, pad_id=0)
        log_probs = np.where(np.isin(batch["targets"], [7]), -3.0, -1.0).astype(np.float32)
        if objective.reference:
            batch["reference"] = np.zeros((len(examples), objective.responses), np.float32)
        return jitted_too(losses, log_probs, batch)

    found, metrics = of(examples)
    assert found.shape == (2,)
    for column in (found, *metrics.values()):
        assert column.shape == (2,)
        assert np.isfinite(column).all()
    np.testing.assert_allclose(found[0], OBJECTIVE_LOSSES[name], rtol=1e-5)
    turned, turned_metrics = of(examples[::-1])
    np.testing.assert_array_equal(turned, found[::-1])
    assert turned_metrics.keys() == metrics.keys()


DOCUMENTS = {
    "d0": ("axis axis", [1.0, 0.0]), "d1": ("norm", [0.6, 0.8]), "d2": ("loss norm", [0.0, 1.0]),
}  # fmt: skip
# The candidates of one query, (1, 0); d2 is relevant to it, the answer lies at (0.6, 0.8).
TEXTS, VECTORS = ["loss", "axis", "norm", ""], [[0.0, 1.0], [1.0, 0.0], [0.28, 0.96], [0.0, 0.0]]
LENGTHS = {"loss": 15, "axis": 12, "norm": 16, "": 1}
WORTH = {
    "positive": [1, 1 / 3, 1 / 2, 1 / 4],  # Cosines 1, 0, 0.96 and 0; ties in order.
    "answer": [1 / 2, 1 / 3, 1, 1 / 4],  # 0.8, 0.6, 0.936 and 0.
    # With four fifths of the first candidate d2 is first, of the third second; else it is last.
    "corpus": [1, 1 / 3, 1 / 2, 1 / 3],
    "gain": [1 / 2, 0, 1 / math.log2(3) - 1 / 2, 0],  # Less the plain query's, 1 / log2(1 + 3).
    "group": [1, 1 / 2, 1 / math.log2(3), 1 / 2],  # nDCG: 1 / log2(1 + rank).
    "length": [-3 / 4, 0, -1, 0],  # Of 16 tokens at most, 4 of which are punished.
    "format": [1, 0, 0, 1],  # Either "loss" or nothing.
}


def evidence(texts, vectors):
    config = base.get_config()
    config.reward.update({"query_weight": 0.2, "group_size": 9, "depth": 3, "length_cache": 4})
    config.reward.format_pattern = "(l.*)?"
    config.candidates.max_new_tokens = 16
    config = read_config(config)
    collection = Collection(
        "c",
        {d: text for d, (text, _) in DOCUMENTS.items()},
        {"q": "axis"},
        {"train": {"q": {"d2": 1}}},
    )
    corpus = Corpus(
        list(DOCUMENTS),
        np.array([vector for _, vector in DOCUMENTS.values()], np.float32),
        dataclasses.replace(config.search, backend="exact"),
    )
    candidates = [Candidate(text, length=LENGTHS[text]) for text in texts]
    group = Group("q", "axis", "d2", "an answer", candidates)
    data = TrainingData(collection, [], ["q"])
    tools = RewardTools(lambda: Bm25Index(collection.corpus.values()))
    most = config.candidates.max_new_tokens
    return Evidence(
        reward_context(config, tools, data, corpus, ["q"], 100, most), [group],
        queries=np.array([[1.0, 0.0]], np.float32),
        candidates=np.array([vectors], np.float32),
        answers=np.array([[0.6, 0.8]], np.float32),
    )  # fmt: skip


@pytest.mark.parametrize("name", REWARDS)
def test_rewards(name):
    found = REWARDS[name].of(evidence(TEXTS, VECTORS))
    assert found.shape == (1, 4)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[0], WORTH[name], atol=1e-6)
    order = [2, 0, 3, 1]  # Keeps candidates of equal cosines in their order.
    moved = REWARDS[name].of(evidence([TEXTS[i] for i in order], [VECTORS[i] for i in order]))
    if name in ("positive", "answer"):  # Ties go to the lower index: those two swap ranks.
        order_free = [0, 2] if name == "positive" else [0, 1, 2, 3]
        kept = [order.index(i) for i in order_free]
        np.testing.assert_allclose(moved[0, kept], found[0, order_free])
    else:
        np.testing.assert_allclose(moved, found[:, order])


TWO_TEXTS = DenseQuery(["a", "b"], 1 / 3)
EXPANDED = {  # What "q" with the texts "a" and "b" becomes: for BM25, and as vectors.
    **dict.fromkeys(("q2d", "pydoc"), ("q q q q q a b", DenseQuery(["a", "b"], 0.25))),
    **dict.fromkeys((n for n in STRATEGIES if n.startswith("hyde")), ("q q q q q a b", TWO_TEXTS)),
    "query2doc": ("q q q q q a b", DenseQuery(["q [SEP] a", "q [SEP] b"], 0.0)),
    "q2q": ("a b", DenseQuery(["a", "b"], 0.0)),
    "rewrite": ("a b", DenseQuery(["a", "b"], 0.0)),
    "q2e": ("q a b", DenseQuery(["q a", "q b"], 0.0)),
    "q2c": ("q q q q q a b", DenseQuery(["q a", "q b"], 0.0)),
    "mugi": ("q a b", DenseQuery(["q a", "q b"], 0.0)),
    "lamer": ("q a q b", TWO_TEXTS),
    "csqe": ("q a b", TWO_TEXTS),
    "thinkqe": ("q a b", TWO_TEXTS),
    "genqr": ("q a b", DenseQuery(["q a", "q b"], 0.0)),
    "genqr-ensemble": ("q q q q q a b", DenseQuery(["q a", "q b"], 0.0)),
    "qa-expand": ("q q q a b", TWO_TEXTS),
    "reformer": ("a b", DenseQuery(["a", "b"], 0.0)),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategies(name):
    strategy = STRATEGIES[name]
    assert strategy.asks
    assert strategy.samples >= 1
    found = strategy.sparse("q", ["a", "b"]), strategy.dense("q", ["a", "b"], 0.25)
    assert found == EXPANDED[name]
    assert strategy.sparse("q", []) == "q"  # Where the model said nothing.


FUSED = {  # Of {"a": 2, "b": 1} and {"b": 3, "c": 1}.
    "rrf": {"a": 1 / 61, "b": 1 / 62 + 1 / 61, "c": 1 / 62},
    "exp4fuse": {"a": 1.1 / 61, "b": 1.2 * (1 / 62 + 1 / 61), "c": 1.1 / 62},
    "interpolation": {"a": 1 / 2, "b": 1 / 2, "c": 0},
}


@pytest.mark.parametrize("name", FUSIONS)
def test_fusions(name):
    runs = [{"a": 2.0, "b": 1.0}, {"b": 3.0, "c": 1.0}]
    for order in (runs, runs[::-1]):
        found = FUSIONS[name](order)
        assert found.keys() == FUSED[name].keys()
        for document, score in FUSED[name].items():
            assert found[document] == pytest.approx(score)


FED_BACK = {"prf-average": [2 / 3, 1], "prf-rocchio": [0.9 + 0.05, 0.15]}


@pytest.mark.parametrize("name", FEEDBACKS)
def test_feedbacks(name):
    queries = np.array([[1.0, 0.0], [0.0, 0.0]], np.float32)
    documents = np.array([[[1.0, 1.0], [0.0, 2.0]]] * 2, np.float32)
    found = jitted_too(FEEDBACKS[name], queries, documents)
    assert found.shape == (2, 2)
    np.testing.assert_allclose(found[0], FED_BACK[name], rtol=1e-6)
    np.testing.assert_allclose(FEEDBACKS[name](queries, documents[:, ::-1]), found, rtol=1e-6)
    np.testing.assert_array_equal(FEEDBACKS[name](queries[::-1], documents), found[::-1])


# Twenty texts of three words: "pad" is in one of them, "axis" in two.
WORDS = Bm25Index(["pad pad axis", "axis list sort", *["list sort scale"] * 18])
NORM, IDF_PAD, IDF_AXIS = 0.9, math.log(1 + 19.5 / 1.5), math.log(1 + 18.5 / 2.5)
WEIGHED = {  # Of "pad pad axis".
    "bm25": {"pad": 2, "axis": 1},
    "bm25q": {"pad": IDF_PAD * 2 / (2 + NORM), "axis": IDF_AXIS / (1 + NORM)},
}


@pytest.mark.parametrize("name", WEIGHINGS)
def test_weighings(name):
    found = WEIGHINGS[name](["pad", "pad", "axis"], WORDS)
    assert found == pytest.approx(WEIGHED[name])
    assert WEIGHINGS[name](["axis", "pad", "pad"], WORDS) == found
    assert not any(WEIGHINGS[name]([], WORDS).values())


# Half of the query, pad; two thirds of the other half are pad, too.
FED_BACK_WORDS = {"rm3": {"pad": 1 / 2 + 1 / 3, "axis": 1 / 6}}


@pytest.mark.parametrize("name", WORD_FEEDBACKS)
def test_word_feedbacks(name):
    documents = [(3.0, ["pad", "pad", "axis"]), (1.0, ["list", "sort"])]
    for order in (documents, documents[::-1]):
        found = WORD_FEEDBACKS[name]({"pad": 2.0}, order, WORDS)
        assert found == pytest.approx(FED_BACK_WORDS[name])
    assert WORD_FEEDBACKS[name]({}, [], WORDS) == {}


def cross_encoder(directory, pooler_scale):
    """The tiny BERT with a head; without its pooler's kernel all pairs have the same score."""
    shutil.copytree(pathlib.Path(base.__file__).parent / "tiny" / "tiny-bert", directory)
    tensors = load_file(directory / "model.safetensors")
    tensors["pooler.dense.weight"] *= pooler_scale
    tensors["pooler.dense.bias"] = np.full(32, math.atanh(0.5), np.float32)
    tensors["classifier.weight"] = np.full((1, 32), 0.1, np.float32)
    tensors["classifier.bias"] = np.zeros(1, np.float32)
    save_file(tensors, directory / "model.safetensors")


# How a model is written, and the score where it does not look at the texts.
SCORED = {"rerank": (cross_encoder, 1 / (1 + math.exp(-32 * 0.1 * 0.5)))}


@pytest.mark.parametrize("name", RERANKERS)
def test_rerankers(name, tmp_path):
    write, constant = SCORED[name]
    documents = ["clip the norm", "", "an array of zeros " * 30, "momentum"]

    def scores(scale, documents):
        directory = tmp_path / str(scale)
        if not directory.exists():
            write(directory, scale)
        settings = RerankSettings(str(directory), depth=4, max_length=32, rows=3)
        RERANKERS[name].check(settings)
        return RERANKERS[name].load(settings)("norm of an array", documents)

    found = scores(200, documents)
    assert found.shape == (4,)
    assert np.isfinite(found).all()
    assert np.ptp(found) > 1e-3
    order = [2, 0, 3, 1]
    np.testing.assert_allclose(scores(200, [documents[i] for i in order]), found[order], atol=1e-6)
    np.testing.assert_allclose(scores(0, documents), constant, rtol=1e-5)


SHAPE = {  # Of every family at once: each reads the fields that it knows.
    "vocab_size": 20, "hidden_size": 4, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 2, "intermediate_size": 8, "pad_token_id": 1,
    "max_position_embeddings": 16, "layer_norm_eps": 1e-6, "norm_eps": 1e-6,
    "d_model": 4, "d_kv": 2, "d_ff": 8, "num_layers": 2, "num_heads": 2,
}  # fmt: skip
LAYER_NORM = np.array([0, 0, -2, 2]) / math.sqrt(2)  # Of (1, 1, -1, 3), whose mean is 1.
RMS_NORM = np.array([1, 1, -1, 3]) / math.sqrt(3)
# What a text's vector is where only the token table is not zero, and floating-point operations of
# attention: 4 for each layer, width of all heads, query and key; AnchorDR's decoder has one query.
COMPUTED = {
    **dict.fromkeys(("bert", "camembert", "roberta", "xlm-roberta"), (LAYER_NORM, 288)),
    **dict.fromkeys(("t5", "llama", "mistral", "qwen2", "qwen3", "gemma3_text"), (RMS_NORM, 288)),
    "modernbert": (LAYER_NORM, 288),
    "anchordr": (LAYER_NORM, 4 * 4 * 2 * (3 * 3 + 1 + 3)),
}


@pytest.mark.parametrize("kind", BY_TYPE)
def test_families(kind):
    family = BY_TYPE[kind]
    assert {*family.tokenizer_classes.values()} <= CLASSES.keys()
    assert {*family.tokenizer_classes, *family.misnamed, *family.gguf} <= family.classes.keys()
    assert {form.architecture for form in family.gguf.values()} <= {*MODEL_ARCH_NAMES.values()}
    shape = Fields(SHAPE, "config.json")
    config = model_config(shape, kind)
    if head := family.masked_head:
        paths = {weight.path for weight in head.weights(config, shape, kind)}
        assert paths == leaf_shapes(head.module(config, jnp.float32)).keys()
    module = family.module(config)
    assert {weight.path for weight in family.weights(config, True)} == leaf_shapes(module).keys()
    vector, flops = COMPUTED[kind]
    assert family.attention_flops(config, 3, 3) == flops
    ids, mask = np.array([[5, 6, 7], [8, 9, 1]]), np.array([[1, 1, 1], [1, 1, 0]])
    params = nn.unbox(jax.jit(module.init)(jax.random.key(0), *module.inputs(ids, mask)))["params"]

    def encode(params, ids, mask):
        hidden = module.apply({"params": params}, *module.inputs(ids, mask))
        return pool(hidden, mask, family.pooling)

    found = jitted_too(encode, params, ids, mask)
    encode = jax.jit(encode)
    assert found.shape == (2, 4)
    assert np.isfinite(found).all()
    # The rows change places, and the padding of the shorter goes to its left.
    turned = encode(params, np.array([[1, 8, 9], [5, 6, 7]]), np.array([[0, 1, 1], [1, 1, 1]]))
    np.testing.assert_allclose(turned, found[::-1], atol=1e-5)
    empty = {
        path: leaf if path[-1] == "scale" else jnp.zeros_like(leaf)
        for path, leaf in traverse_util.flatten_dict(params).items()
    } | {("embedding",): jnp.broadcast_to(jnp.array([1.0, 1, -1, 3]), (20, 4))}
    constant = encode(traverse_util.unflatten_dict(empty), ids, mask)
    np.testing.assert_allclose(constant, [vector] * 2, atol=1e-5)
