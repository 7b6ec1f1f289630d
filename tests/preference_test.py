"""The packed DPO step against one sequence at a time, in plain form."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from expandr_jax.generation.engine import Engine
from expandr_jax.generation.requests import Request
from expandr_jax.losses.preference import PREFERENCE_LOSSES, PreferenceSettings
from expandr_jax.models.decoder import Decoder, DecoderConfig, cast_weights, token_positions
from expandr_jax.models.lora import LoraConfig, init_lora
from expandr_jax.models.mask import causal_mask
from expandr_jax.objectives.log_probs import response_log_probs
from expandr_jax.objectives.objective import ObjectiveSettings, adapter_loss, adapter_step
from expandr_jax.objectives.packing import PADDING, Example, pack, row_sizes
from expandr_jax.objectives.registry import OBJECTIVES
from expandr_jax.training.train_state import TrainState, make_optimizer

PAIRS = [
    Example([5, 6, 7], ([8, 9, 2], [10, 2])),
    Example([5, 6, 7, 11, 12], ([13, 2], [14, 15, 16, 17, 2])),
    Example([3], ([2], [4, 5, 2])),
    Example([9, 9, 3], ([4, 2], [5, 2])),
]
DPO = OBJECTIVES["sigmoid"]
dpo_loss = functools.partial(adapter_loss, objective=DPO)
loss_of = jax.jit(dpo_loss, static_argnames=("module", "settings"))
dpo_step = functools.partial(adapter_step, objective=DPO)
log_probs_of = jax.jit(response_log_probs, static_argnums=0, static_argnames=("responses", "chunk"))
pair_log_probs = functools.partial(log_probs_of, responses=2)


@pytest.fixture(scope="module")
def model():
    """A tiny decoder with an adapter that changes it: (module, params, adapter)."""
    config = DecoderConfig(
        vocab_size=23, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4,
        mlp_dim=24, max_positions=64,
    )  # fmt: skip
    module = Decoder(config, lora=LoraConfig(rank=2, dropout=0.0))
    tokens, mask = jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4), jnp.int32)
    variables = jax.jit(module.init)(
        jax.random.key(0), tokens, token_positions(mask), causal_mask(mask)
    )
    params = nn.meta.unbox(variables)["params"]
    adapter = init_lora(jax.random.key(1), params, module.lora)
    return module, params, jax.tree.map(lambda leaf: leaf + 0.05, adapter)


@functools.partial(jax.jit, static_argnums=0)
def sequence_log_probs(module, variables, tokens, mask):
    """log p(token | those before) of a whole padded sequence: all logits, nothing shared."""
    hidden = module.apply(variables, tokens, token_positions(mask), causal_mask(mask))
    logits = module.apply(variables, hidden, method="logits")
    return jnp.take_along_axis(
        jax.nn.log_softmax(logits[:, :-1], axis=-1), tokens[:, 1:, None], axis=-1
    )[0, :, 0]


def plain_log_prob(module, variables, prompt, response):
    """Sum of log p(response | prompt) of one pair's side, on its own."""
    tokens = np.zeros((1, 12), np.int32)
    tokens[0, : len(prompt) + len(response)] = [*prompt, *response]
    mask = (np.arange(12) < len(prompt) + len(response)).astype(np.int32)[None]
    log_probs = sequence_log_probs(module, variables, tokens, mask)
    start = len(prompt) - 1
    return jnp.sum(log_probs[start : start + len(response)])


@pytest.mark.parametrize("chunk", [1, 8, 256])
def test_packed_rows_give_the_plain_log_probabilities(model, chunk):
    module, params, adapter = model
    for variables in ({"params": params}, {"params": params, "lora": adapter}):
        sums, tokens = pair_log_probs(module, variables, pack(PAIRS, pad_id=0), chunk=chunk)
        for row, pair in enumerate(PAIRS):
            for column, response in enumerate(pair.responses):
                plain = plain_log_prob(module, variables, pair.prompt, response)
                np.testing.assert_allclose(sums[row, column], plain, atol=1e-5)
                assert tokens[row, column] == len(response)


def test_rows_hold_any_number_of_responses(model):
    """Packed together or each alone, a prompt's responses have the same log-probabilities."""
    module, params, adapter = model
    variables = {"params": params, "lora": adapter}
    responses = [[8, 9, 2], [10, 2], [2], [11, 12, 13, 2], [10, 2]]
    examples = [Example([5, 6, 7], responses[:count]) for count in (5, 1, 3)]
    sums, tokens = log_probs_of(module, variables, pack(examples, pad_id=0), responses=5, chunk=8)
    for row, example in enumerate(examples):
        for column, response in enumerate(responses):
            plain = plain_log_prob(module, variables, example.prompt, response)
            there = column < len(example.responses)
            np.testing.assert_allclose(sums[row, column], plain if there else 0, atol=1e-5)
            assert tokens[row, column] == (len(response) if there else 0)


def test_packed_gradients_are_the_plain_ones(model):
    module, params, adapter = model
    reference = np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32) - 10

    def plain(adapter):
        variables = {"params": params, "lora": adapter}
        sums = jnp.stack(
            [
                jnp.stack([plain_log_prob(module, variables, p.prompt, r) for r in p.responses])
                for p in PAIRS
            ]
        )
        return jnp.mean(PREFERENCE_LOSSES["sigmoid"].losses(sums, reference, PreferenceSettings()))

    batch = pack(PAIRS, pad_id=0)
    batch["reference"] = reference
    (loss, _), grads = jax.jit(
        jax.value_and_grad(
            functools.partial(dpo_loss, module=module, settings=ObjectiveSettings(chunk=8)),
            has_aux=True,
        )
    )(adapter, params, batch)
    expected, expected_grads = jax.value_and_grad(plain)(adapter)
    np.testing.assert_allclose(loss, expected, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, expected_grads)


def arrays_in(jaxpr):
    """Shapes of all that a program computes, those of inner programs too."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from arrays_in(inner)


@pytest.mark.parametrize("chunk", [4, 8])
def test_logits_are_of_a_chunk_alone_forward_and_backward(model, chunk):
    module, params, adapter = model
    batch = {**pack(PAIRS, pad_id=0), "reference": np.zeros((4, 2))}
    gradient = jax.value_and_grad(
        functools.partial(dpo_loss, module=module, settings=ObjectiveSettings(chunk=chunk)),
        has_aux=True,
    )
    shapes = list(arrays_in(jax.make_jaxpr(gradient)(adapter, params, batch).jaxpr))
    head = module.config.hidden_size, module.config.vocab_size
    tokens = [np.prod(x[:-1]) for x in shapes if x[-1:] == head[1:] and x != head]
    assert max(tokens) == chunk < np.sum(batch["responses"] != PADDING)


@pytest.mark.slow
def test_half_precision_computes_near_float32_and_the_adapter_stays_in_float32(model):
    module, params, adapter = model
    half = module.clone(dtype=jnp.bfloat16)
    weights = cast_weights(params, jnp.bfloat16)
    batch = pack(PAIRS, pad_id=0)
    log_probs = jax.jit(functools.partial(pair_log_probs, module, chunk=8))
    batch["reference"] = log_probs({"params": params}, batch)[0]
    optimizer = make_optimizer(1e-2, 4, accumulation=2)
    state = TrainState.create(adapter, optimizer)

    def gradients(module, base):
        gradients_of = jax.grad(dpo_loss, has_aux=True)
        program = jax.jit(
            functools.partial(gradients_of, module=module, settings=ObjectiveSettings())
        )
        return program(adapter, base, batch)

    (_, expected), (grads, metrics) = gradients(module, params), gradients(half, weights)
    assert metrics["log_prob_chosen"] != expected["log_prob_chosen"]  # It is another arithmetic.
    for side in ("chosen", "rejected"):
        name = f"log_prob_{side}"
        assert metrics[name].dtype == jnp.float32
        np.testing.assert_allclose(metrics[name], expected[name], rtol=2e-2)
    step = functools.partial(
        dpo_step, module=half, settings=ObjectiveSettings(), optimizer=optimizer
    )
    state, metrics = jax.jit(step)(state, weights, batch, jax.random.key(0))
    assert metrics["loss"].dtype == jnp.float32
    kinds = {leaf.dtype for leaf in jax.tree.leaves((grads, state.params, state.opt_state))}
    assert kinds <= {jnp.dtype(kind) for kind in ("float32", "int32", "bool")}


def test_a_new_adapter_starts_at_log_two(model):
    module, params, _ = model
    adapter = init_lora(jax.random.key(1), params, module.lora)
    batch = pack(PAIRS, pad_id=0)
    batch["reference"] = pair_log_probs(module, {"params": params}, batch, chunk=8)[0]
    loss, metrics = loss_of(adapter, params, batch, module=module, settings=ObjectiveSettings())
    np.testing.assert_allclose(loss, np.log(2), atol=1e-6)
    np.testing.assert_allclose(metrics["margin"], 0, atol=1e-6)
    np.testing.assert_allclose(metrics["kl"], 0, atol=1e-6)


@pytest.mark.parametrize(
    "settings", [ObjectiveSettings(), ObjectiveSettings(length_normalized=True)]
)
def test_the_kl_estimate_is_that_of_plain_log_probabilities(model, settings):
    module, params, adapter = model
    batch = pack(PAIRS, pad_id=0)
    batch["reference"] = pair_log_probs(module, {"params": params}, batch, chunk=8)[0]
    _, metrics = loss_of(adapter, params, batch, module=module, settings=settings)
    ratios = []
    for pair in PAIRS:
        for response in pair.responses:
            policy, base = (
                np.float64(plain_log_prob(module, variables, pair.prompt, response))
                for variables in ({"params": params, "lora": adapter}, {"params": params})
            )
            length = len(response) if settings.length_normalized else 1
            ratios.append((policy - base) / length)
    assert np.abs(ratios).max() > 1e-2
    np.testing.assert_allclose(metrics["kl"], np.mean(ratios), atol=1e-5)


def first_tokens(module, params, adapter, prompts):
    """How often each token begins a sampled text: [vocabulary] shares."""
    engine = Engine(
        module, params, adapter=adapter, slots=16, prompt_buckets=(4,), max_new_tokens=1,
        eos_ids=(2,), pad_id=0, seed=0,
    )  # fmt: skip
    requests = [Request(f"q{i}", s, p, 1.0, 1.0, 1) for i, p in enumerate(prompts) for s in (0, 1)]
    tokens = [completion.tokens[0] for completion in engine.generate(requests)]
    return np.bincount(tokens, minlength=module.config.vocab_size) / len(tokens)


def test_an_obvious_preference_is_learned_and_sampled_and_the_base_does_not_move(model):
    module, params, _ = model
    before = jax.tree.map(np.array, params)
    rng = np.random.default_rng(0)
    prompts = [(3, *rng.integers(9, 23, 2).tolist()) for _ in range(300)]
    trained, unseen = prompts[:100], prompts[100:]
    pairs = [Example(prompt, ([7, 7, 2], [8, 8, 2])) for prompt in trained]
    optimizer = optax.adam(3e-2)
    state = TrainState.create(init_lora(jax.random.key(1), params, module.lora), optimizer)
    start = first_tokens(module, params, state.params, unseen)
    reference = jax.jit(
        lambda batch: pair_log_probs(module, {"params": params}, batch, chunk=64)[0]
    )
    step = jax.jit(
        functools.partial(
            dpo_step, module=module, settings=ObjectiveSettings(), optimizer=optimizer
        )
    )
    accuracies = []
    for number in range(20):
        part = pairs[number % 5 :: 5]
        batch = pack(part, pad_id=0)
        batch["reference"] = reference(batch)
        state, metrics = step(state, params, batch, jax.random.key(0))
        accuracies.append(metrics["accuracy"])
    assert accuracies[-5:] == [1.0] * 5  # All hundred pairs.
    assert metrics["margin"] > 1.0
    jax.tree.map(np.testing.assert_array_equal, params, before)
    end = first_tokens(module, params, state.params, unseen)
    assert end[7] > 1.5 * start[7] > 0
    assert end[8] < 0.5 * start[8]


def test_pack_lays_out_a_pair():
    batch = pack(PAIRS[:1], pad_id=0)
    np.testing.assert_array_equal(batch["tokens"][0, :9], [5, 6, 7, 8, 9, 2, 10, 2, 0])
    np.testing.assert_array_equal(batch["positions"][0, :8], [0, 1, 2, 3, 4, 5, 3, 4])
    np.testing.assert_array_equal(batch["segments"][0, :9], [0, 0, 0, 1, 1, 1, 2, 2, -1])
    np.testing.assert_array_equal(batch["sources"][0, :5], [2, 3, 4, 2, 6])
    np.testing.assert_array_equal(batch["targets"][0, :5], [8, 9, 2, 10, 2])
    np.testing.assert_array_equal(batch["responses"][0, :6], [1, 1, 1, 2, 2, -1])


def test_sizes_hold_their_batches_and_change_no_loss(model):
    module, params, adapter = model
    needed = [pair.size for pair in PAIRS]
    assert needed == [(8, 5), (12, 7), (5, 4), (7, 4)]
    assert row_sizes([(40, 17), (33, 30), (90, 20), (100, 60)], 2) == [(48, 32), (112, 64)]
    sizes = [(9, 4), (12, 8), (16, 8)]  # The first has too few places for responses.
    packed = pack(PAIRS, 0, sizes)
    assert packed["tokens"].shape == (4, 12)
    assert packed["targets"].shape == (4, 8)
    assert pack(PAIRS, 0, sizes[:1])["tokens"].shape == (4, 16)
    variables = {"params": params, "lora": adapter}
    for chunk in (5, 64):
        found = pair_log_probs(module, variables, packed, chunk=chunk)
        expected = pair_log_probs(module, variables, pack(PAIRS, 0), chunk=8)
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_accumulated_batches_update_as_one_large_batch_does(model):
    module, params, adapter = model
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(2, 4)).astype(np.float32) - 10

    def batch(*indices):
        batch = pack([PAIRS[i] for i in indices], pad_id=0)
        batch["reference"] = reference[:, list(indices)].T
        return batch

    def train(accumulation, batches):
        optimizer = make_optimizer(1e-2, 6, warmup=2, clip_norm=0.1, accumulation=accumulation)
        step = jax.jit(
            functools.partial(
                dpo_step, module=module, settings=ObjectiveSettings(chunk=8), optimizer=optimizer
            )
        )
        state, adapters = TrainState.create(adapter, optimizer), []
        for number in range(3 * len(batches)):
            state, _ = step(state, params, batches[number % len(batches)], jax.random.key(0))
            adapters.append(state.params)
        return adapters

    large = train(1, [batch(0, 1, 2, 3)])
    small = train(2, [batch(0, 1), batch(2, 3)])
    for update in range(3):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
            small[2 * update + 1],
            large[update],
        )
    # The first of two batches changes nothing yet; the updates are far above the tolerance.
    jax.tree.map(np.testing.assert_array_equal, small[0], adapter)
    moved = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), large[2], adapter)
    assert max(jax.tree.leaves(moved)) > 1e-3
