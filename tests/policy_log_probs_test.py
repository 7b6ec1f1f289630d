"""Log-probabilities and entropies that policies learn from, against full passes and the engine."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from expandr_jax.generation.engine import Engine
from expandr_jax.generation.requests import Request
from expandr_jax.models.decoder import token_positions
from expandr_jax.models.lora import init_lora
from expandr_jax.models.mask import causal_mask
from expandr_jax.objectives.log_probs import sampled_log_probs
from expandr_jax.objectives.packing import Example, pack
from tests.engine_test import SETTINGS, random_decoder

EXAMPLES = [
    Example([5, 6, 7], [[8, 9, 2], [10, 2], [11, 12, 13, 14, 15]]),
    Example([9, 3, 21, 22], [[2], [4, 5, 2], [30, 31]]),
]
CHUNK = 8  # Less than a row's response tokens: there are several.


@pytest.fixture(scope="module")
def model():
    """A tiny decoder with an adapter that changes it: (module, params, adapter)."""
    module, params = random_decoder(37, 1.5)
    adapter = init_lora(jax.random.key(1), params, module.lora)
    return module, params, jax.tree.map(lambda leaf: leaf + 0.01, adapter)


def plain(module, params, adapter, temperature):
    """Log-probabilities and entropies of each response's tokens: all logits, nothing shared."""
    texts = [(example.prompt, response) for example in EXAMPLES for response in example.responses]
    ids, there = np.zeros((2, len(texts), 12), np.int32)
    for row, (prompt, response) in enumerate(texts):
        ids[row, : len(prompt) + len(response)] = [*prompt, *response]
        there[row, : len(prompt) + len(response)] = 1
    variables = {"params": params, "lora": adapter}
    hidden = module.apply(variables, ids, token_positions(there), causal_mask(there))
    logits = module.apply(variables, hidden, method="logits") / temperature
    logs, made = jax.nn.log_softmax(logits), []
    for row, (prompt, response) in enumerate(texts):
        own = logs[row, len(prompt) - 1 :][: len(response)]
        entropies = -jnp.sum(jnp.exp(own) * own, axis=-1)
        made.append((own[jnp.arange(len(response)), np.array(response)], entropies))
    return [jnp.concatenate(column) for column in zip(*made, strict=True)]


def ours(module, params, adapter, **settings):
    """The same, of packed rows."""
    batch = pack(EXAMPLES, pad_id=0)
    variables = {"params": params, "lora": adapter}
    made = sampled_log_probs(module, variables, batch, responses=3, chunk=CHUNK, **settings)
    return [column[batch["responses"] > 0] for column in made]


@pytest.mark.parametrize(("temperature", "learn_entropy"), [(1.0, False), (0.7, True)])
def test_they_and_their_slopes_are_those_of_a_full_pass(model, temperature, learn_entropy):
    module, params, adapter = model
    weights = np.random.default_rng(0).normal(size=(2, 16)).astype(np.float32)

    def summed(of, adapter, **settings):
        made = of(module, params, adapter, temperature=temperature, **settings)
        if not learn_entropy and of is plain:
            made[1] = jax.lax.stop_gradient(made[1])
        return sum(jnp.sum(w * x) for w, x in zip(weights, made, strict=True)), made

    (_, expected), slopes = jax.jit(
        jax.value_and_grad(functools.partial(summed, plain), has_aux=True)
    )(adapter)
    found, own = jax.jit(
        jax.value_and_grad(
            lambda tree: summed(ours, tree, learn_entropy=learn_entropy), has_aux=True
        )
    )(adapter)
    for mine, theirs in zip(found[1], expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-5)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(slopes))
    assert largest > 0.1
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5 * largest)
    jax.tree.map(close, own, slopes)


def test_they_are_those_that_the_engine_sampled_with(model):
    module, params, adapter = model
    engine = Engine(module, params, slots=4, adapter=adapter, log_probs=True, **SETTINGS)
    prompts = {"a": (5, 6, 7), "b": (9, 3, 21, 22, 8, 30)}
    requests = [
        Request(name, sample, prompt, 0.7, 1.0, 9 - 3 * sample)
        for name, prompt in prompts.items()
        for sample in range(3)
    ]
    done = {(c.id, c.sample): c for c in engine.generate(requests)}
    groups = [[done[name, sample] for sample in range(3)] for name in prompts]
    examples = [
        Example(prompts[group[0].id], [completion.tokens for completion in group])
        for group in groups
    ]
    batch = pack(examples, pad_id=0)
    log_probs = functools.partial(
        sampled_log_probs, module, responses=3, chunk=CHUNK, temperature=0.7
    )
    found, _ = jax.jit(log_probs)({"params": params, "lora": adapter}, batch)
    for row, group in enumerate(groups):
        for number, completion in enumerate(group, start=1):
            own = np.asarray(found)[row, batch["responses"][row] == number]
            np.testing.assert_allclose(own, completion.log_probs, atol=1e-4)
