"""Every training step on meshes of eight devices against the same step on one."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from configs import base
from expandr_jax.config import read_config
from expandr_jax.models.anchordr import AnchorDr, AnchorDrConfig
from expandr_jax.models.bert import Bert, BertConfig
from expandr_jax.models.decoder import Decoder, DecoderConfig
from expandr_jax.models.generator import Generator
from expandr_jax.models.lora import LoraConfig, init_lora
from expandr_jax.models.retriever import Retriever
from expandr_jax.objectives.adapter import AdapterBatches, adapter_setup
from expandr_jax.objectives.contrastive import ContrastiveConfig, contrastive_step
from expandr_jax.objectives.contrastive_batches import ContrastiveExample, Passage, make_batch
from expandr_jax.objectives.objective import ObjectiveSettings
from expandr_jax.objectives.packing import Example, pack
from expandr_jax.objectives.policy import PolicyTrainer, Sampled, pack_sampled, row_sizes_of
from expandr_jax.objectives.registry import OBJECTIVES
from expandr_jax.pair import GeneratorModel
from expandr_jax.rewards.group import Candidate, Group
from expandr_jax.sharding import adapter_shardings, batch_sharding, make_mesh
from expandr_jax.training.setup import set_up
from expandr_jax.training.train_state import TrainState, make_optimizer
from expandr_jax.vectors.encoder import embedder
from expandr_jax.weights.families import example_inputs
from expandr_jax.weights.trees import model_shardings

MESHES = [(8, 1, 1), pytest.param((2, 4, 1), marks=pytest.mark.slow), (2, 2, 2)]
OPTIMIZER = make_optimizer(1e-3, 4, clip_norm=1.0, weight_decay=0.01)
BERT = BertConfig(
    vocab_size=64, hidden_size=16, num_layers=2, num_heads=4, mlp_dim=32, max_positions=16,
    position_offset=0, num_token_types=2, activation="gelu", norm_eps=1e-12,
    hidden_dropout=0.0, attention_dropout=0.0,
)  # fmt: skip
ANCHORDR = AnchorDrConfig(
    vocab_size=64, hidden_size=16, num_layers=2, num_decoder_layers=2, num_heads=4, head_dim=4,
    mlp_dim=32, max_positions=14,
)  # fmt: skip
DECODER = DecoderConfig(
    vocab_size=64, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4,
    mlp_dim=32, max_positions=64,
)  # fmt: skip


def one_device():
    return make_mesh(1, 1, 1, devices=jax.devices()[:1])


def init(module):
    inputs = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), example_inputs(module))
    return nn.unbox(jax.jit(module.init)(jax.random.key(0), *inputs))["params"]


@pytest.fixture(scope="module", params=["bert", "anchordr"])
def retriever(request):
    """(retriever, params)."""
    if request.param == "bert":
        made = Retriever(Bert(BERT), "mean", True, 16, "", "", None, None)
    else:
        made = Retriever(AnchorDr(ANCHORDR), "decoder", True, 12, "", "", None, None)
    return made, init(made.module)


@pytest.fixture(scope="module")
def generator():
    """(decoder, params, adapter that changes it)."""
    module = Decoder(DECODER, lora=LoraConfig(rank=2, dropout=0.0))
    params = init(module)
    adapter = init_lora(jax.random.key(1), params, module.lora)
    return module, params, jax.tree.map(lambda leaf: leaf + 0.05, adapter)


def batch_of_queries():
    rng = np.random.default_rng(0)

    def text():
        return rng.integers(3, 64, rng.integers(3, 12)).tolist()

    examples = [
        ContrastiveExample(text(), [text()], Passage(text(), f"p{i}"), [Passage(text(), f"n{i}")])
        for i in range(16)
    ]
    return make_batch(examples, 1, 1, 1)


def batch_of_pairs():
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(8):
        prompt, *responses = (rng.integers(3, 64, rng.integers(2, 5)).tolist() for _ in range(3))
        pairs.append(Example(prompt, responses))
    batch = pack(pairs, pad_id=0)
    batch["reference"] = rng.normal(-10, 1, (2, 8)).astype("f").T
    return batch


def close(ours, theirs, tolerance=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance, rtol=1e-5), ours, theirs
    )


def moved(before, after):
    """The greatest change of a parameter: a test that compares nothing would find 0."""
    changes = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - b).max()), before, after)
    return max(jax.tree.leaves(changes))


def train_retriever(mesh, retriever, params, config, steps=3):
    shardings = model_shardings(mesh, retriever.module, params)
    step = functools.partial(contrastive_step, retriever=retriever, config=config)
    setup = set_up(mesh, step, params, shardings, OPTIMIZER)
    state, metrics = setup.create(params), []
    for _ in range(steps):
        state, values = setup.step(state, batch_of_queries(), None)
        metrics.append(values)
    return state, metrics


DPO = {"objective": OBJECTIVES["sigmoid"], "settings": ObjectiveSettings(chunk=16)}
CONFIG = ContrastiveConfig(temperature=0.1, query_weight=0.5, normalize="both")


def config_of(retriever):
    """BERT in whole batches, AnchorDR by GradCache's micro-batches."""
    pieces = 8 if isinstance(retriever.module, AnchorDr) else 0
    return dataclasses.replace(CONFIG, micro_batch=pieces)


@pytest.fixture(scope="module")
def on_one_device(retriever):
    """(state, metrics) after steps on one device, of whole batches."""
    return train_retriever(one_device(), *retriever, CONFIG)


@pytest.mark.parametrize("sizes", [pytest.param((8, 1, 1), marks=pytest.mark.slow), *MESHES[1:]])
def test_contrastive_steps_are_those_of_one_device(retriever, on_one_device, sizes):
    model, params = retriever
    expected, expected_metrics = on_one_device
    state, metrics = train_retriever(make_mesh(*sizes), model, params, config_of(model))
    close(metrics, expected_metrics)
    # Adam's first steps have the size of the rate however small a gradient is: no parameter here
    # has a gradient within rounding of zero but the keys' biases, which softmax cancels.
    assert moved(params, state.params) > 1e-3
    flat, wanted = (jax.tree_util.tree_leaves_with_path(s.params) for s in (state, expected))
    for (path, ours), (_, theirs) in zip(flat, wanted, strict=True):
        if "k_proj" not in jax.tree_util.keystr(path) or "bias" not in jax.tree_util.keystr(path):
            np.testing.assert_allclose(ours, theirs, atol=1e-5, err_msg=jax.tree_util.keystr(path))


def model_on(mesh, module, params):
    params = jax.device_put(params, model_shardings(mesh, module, params))
    return GeneratorModel(mesh, mesh, Generator(module, None, (), 0, None), params, params, "")


def train_adapter(mesh, module, params, adapter, steps=3):
    model = model_on(mesh, module, params)
    setup = adapter_setup(model, **DPO, optimizer=OPTIMIZER)
    params = model.generator_params
    state, metrics = setup.create(adapter), []
    batch = jax.device_put(batch_of_pairs(), batch_sharding(mesh))
    for _ in range(steps):
        state, values = setup.step(state, params, batch, jax.random.key(0))
        metrics.append(values)
    return state, metrics


@pytest.fixture(scope="module")
def adapter_on_one_device(generator):
    """(state, metrics) after steps of the adapter on one device."""
    return train_adapter(one_device(), *generator)


@pytest.mark.parametrize("sizes", MESHES)
def test_dpo_steps_are_those_of_one_device(generator, adapter_on_one_device, sizes):
    module, params, adapter = generator
    expected, expected_metrics = adapter_on_one_device
    mesh = make_mesh(*sizes)
    state, metrics = train_adapter(mesh, module.clone(remat="full"), params, adapter)
    close(metrics, expected_metrics)
    close(state.params, expected.params)
    assert moved(adapter, state.params) > 1e-3


ON_POLICY = dataclasses.replace(
    read_config(base.get_config()).grpo, loss="gspo", queries=16, samples=2, max_new_tokens=4,
    minibatches=2, passes=2, kl_weight=0.1, entropy_weight=0.05, importance_cap=2.0, chunk=16,
)  # fmt: skip


def sampled_groups():
    rng = np.random.default_rng(0)

    def candidate():
        tokens = rng.integers(3, 64, rng.integers(1, 5)).tolist()
        log_probs = rng.uniform(-5, -3, len(tokens)).tolist()
        return Candidate("", tokens=tokens, log_probs=log_probs, total=rng.normal())

    return [
        Sampled(
            Group(f"q{i}", "", "", "", [candidate() for _ in range(2)]),
            rng.integers(3, 64, rng.integers(1, 5)).tolist(),
        )
        for i in range(16)
    ]


def train_policy(mesh, module, params, adapter, steps=2):
    trainer = PolicyTrainer(model_on(mesh, module, params), ON_POLICY, OPTIMIZER)
    state, metrics, groups = trainer.setup.create(adapter), [], sampled_groups()
    sizes = row_sizes_of(4, 2, 4)
    packed = [pack_sampled(groups[i : i + 8], ON_POLICY, 0, sizes) for i in (0, 8)]
    for _ in range(steps):
        state, values = trainer.learn(state, trainer.batches(state.params, packed), 1.0)
        metrics.append(values)
    return state, metrics


@pytest.mark.slow
def test_on_policy_updates_are_those_of_one_device(generator):
    module, params, adapter = generator
    expected, expected_metrics = train_policy(one_device(), *generator)
    assert expected_metrics[1]["kl"] > 0
    mesh, module = make_mesh(2, 2, 2), module.clone(remat="full")
    state, metrics = train_policy(mesh, module, params, adapter)
    close(metrics, expected_metrics)
    close(state.params, expected.params)
    assert moved(adapter, state.params) > 1e-3


def outputs(mesh, module, params, adapter):
    """The reference's log-probabilities of a batch, and DPO's losses and metrics of it."""
    model = model_on(mesh, module, params)
    batches, base = AdapterBatches(model, **DPO, batch_size=8), model.generator_params
    batch = jax.device_put(batch_of_pairs(), batch_sharding(mesh))
    placed = jax.device_put(adapter, model.adapter_shardings)
    return jax.device_get(
        (batches.log_probs({"params": base}, batch), batches.losses(placed, base, batch))
    )


@pytest.fixture(scope="module")
def outputs_on_one_device(generator):
    return outputs(one_device(), *generator)


@pytest.mark.parametrize("sizes", MESHES)
def test_log_probabilities_and_losses_are_those_of_one_device(
    generator, outputs_on_one_device, sizes
):
    close(outputs(make_mesh(*sizes), *generator), outputs_on_one_device)


@pytest.mark.parametrize("sizes", MESHES)
def test_vectors_are_those_of_one_device(retriever, sizes):
    model, params = retriever
    batch = batch_of_queries()
    texts = batch["query_ids"], batch["query_mask"]
    mesh = make_mesh(*sizes)
    placed = jax.device_put(params, model_shardings(mesh, model.module, params))
    expected = embedder(one_device(), model)(params, *texts)
    close(jax.device_get(embedder(mesh, model)(placed, *texts)), jax.device_get(expected))


# What is on every device, and why: a new entry needs a reason.
SMALL = "as wide as one vector, and needed whole by each row"
EVERYWHERE = {
    "norm": SMALL,
    "relative_bias": "a few hundred numbers",
    "type_embedding": "two rows",
    "count": "a counter",
    "step": "a counter",
}


def test_what_is_on_every_device(retriever, generator):
    mesh, optimizer = make_mesh(2, 2, 2), OPTIMIZER
    model, params = retriever
    module, base, adapter = generator
    placed = model_shardings(mesh, module, base)
    trees = [
        TrainState.shardings(mesh, model_shardings(mesh, model.module, params), params, optimizer),
        TrainState.shardings(mesh, adapter_shardings(mesh, placed, adapter), adapter, optimizer),
        placed,
    ]
    for tree in trees:
        for path, sharding in jax.tree_util.tree_leaves_with_path(tree):
            name = jax.tree_util.keystr(path)
            known = any(word in name for word in EVERYWHERE)
            assert known or "fsdp" in sharding.spec or "tensor" in sharding.spec, name


def test_a_step_leaves_its_state_where_it_was(retriever):
    model, params = retriever
    mesh, optimizer = make_mesh(2, 2, 2), OPTIMIZER
    state, _ = train_retriever(mesh, model, params, config_of(model), steps=1)
    placed = model_shardings(mesh, model.module, params)
    wanted = TrainState.shardings(mesh, placed, params, optimizer)
    for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    kernel = (
        state.params["layers"]["up_proj"]["kernel"]
        if "layers" in state.params
        else (state.params["encoder"]["layers"]["up_proj"]["kernel"])
    )
    assert kernel.sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    assert kernel.addressable_shards[0].data.shape == (2, 8, 16)


def test_a_step_donates_the_adapter_s_state_and_keeps_the_base(generator):
    """The base serves the next step, the reference and sampling: there is one of it."""
    module, params, adapter = generator
    mesh = make_mesh(2, 4, 1)
    model = model_on(mesh, module, params)
    setup = adapter_setup(model, **DPO, optimizer=OPTIMIZER)
    placed, state = model.generator_params, setup.create(adapter)
    batch = jax.device_put(batch_of_pairs(), batch_sharding(mesh))
    setup.step(state, placed, batch, jax.random.key(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((placed, adapter, batch)))
