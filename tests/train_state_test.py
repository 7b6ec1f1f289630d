"""The optimizer's schedule and decay against transformers', whose trainers the paper used."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from eval import tiny_anchordr, tiny_models
from expandr_jax.models.lora import LoraConfig, init_lora
from expandr_jax.training.train_state import TrainState, decayed, make_optimizer, make_schedule
from tests.load_model import load_model

UPDATES = 10
FAMILIES = (
    *("bert", "roberta", "modernbert-biases", "t5", "t5-gated"),
    *("llama", "mistral", "qwen2", "qwen3", "gemma3"),
)


@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_the_rate_rises_and_falls_as_transformers_has_it(warmup):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-3)
    theirs = transformers.get_linear_schedule_with_warmup(optimizer, warmup, UPDATES)
    rate = make_schedule(3e-3, UPDATES, warmup)
    for update in range(UPDATES + 1):
        np.testing.assert_allclose(rate(update), theirs.get_last_lr()[0], rtol=1e-6, atol=1e-12)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("accumulation", [1, 3])
def test_warm_up_counts_updates_not_batches(accumulation):
    """Where the gradient is constant, Adam's update is the rate itself."""
    rate = make_schedule(1e-2, UPDATES, 4)
    optimizer = make_optimizer(1e-2, UPDATES, warmup=4, accumulation=accumulation)
    state, moved = TrainState.create(jnp.ones((2, 2)), optimizer), []
    apply = jax.jit(lambda state: state.apply(jnp.full((2, 2), 0.1), optimizer))
    for _ in range(UPDATES * accumulation):
        after = apply(state)
        moved.append(float(jnp.max(state.params - after.params)))
        state = after
    expected = np.zeros((UPDATES, accumulation))
    expected[:, -1] = [rate(update) for update in range(UPDATES)]
    np.testing.assert_allclose(moved, expected.ravel(), atol=1e-6)
    assert np.argmax(moved) == (4 + 1) * accumulation - 1


def check_decay(params):
    """Parameters of ones are decayed, those of zeros are not; there are some of both."""
    marks = jax.tree.map(lambda x: bool(np.all(np.asarray(x) == 1)), params)
    assert all(np.ptp(np.asarray(leaf)) == 0 for leaf in jax.tree.leaves(params))
    assert marks == decayed(params)
    assert {*jax.tree.leaves(marks)} == {True, False}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_decays_is_what_transformers_decays(tmp_path, family):
    """Each parameter is marked by what their rule says of it, and found under our name."""
    model = tiny_models.torch_model(family, head=family in tiny_models.DECODERS)
    names = transformers.Trainer.get_decay_parameter_names(None, model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(float(name in names))
    model.save_pretrained(tmp_path)
    check_decay(load_model(str(tmp_path))[1])


def test_anchordr_decays_by_the_same_rule(tmp_path):
    model = tmp_path / "model"
    tiny_anchordr.save(model, tiny_anchordr.train_pieces(tmp_path))
    path = model / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        tensor[:] = not re.search("bias|norm", name)
    save_file(tensors, path, {"format": "pt"})
    check_decay(load_model(str(model))[1])


def test_adapters_decay_and_a_temperature_does_not():
    base = {"layers": {"q_proj": {"kernel": jnp.ones((2, 8, 8)), "bias": jnp.ones((2, 8))}}}
    adapter = init_lora(jax.random.key(0), base, LoraConfig(rank=2, targets=("q_proj",)))
    assert jax.tree.leaves(decayed(adapter)) == [True, True]
    assert decayed({"retriever": base, "log_temperature": jnp.zeros(())}) == {
        "retriever": {"layers": {"q_proj": {"kernel": True, "bias": False}}},
        "log_temperature": False,
    }


def test_a_stacked_norm_keeps_its_scale_where_gradients_are_zero():
    params = {"kernel": jnp.ones((3, 4, 4)), "norm": {"scale": jnp.ones((3, 4))}}
    optimizer = make_optimizer(0.1, UPDATES, weight_decay=0.5)
    state = TrainState.create(params, optimizer)
    after = state.apply(jax.tree.map(jnp.zeros_like, params), optimizer).params
    np.testing.assert_allclose(after["kernel"], 1 - 0.1 * 0.5)
    np.testing.assert_array_equal(after["norm"]["scale"], 1)
