"""The optimizer's schedule against that of transformers, whose trainers the paper used."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from expandr_jax.training.train_state import TrainState, make_optimizer, make_schedule

UPDATES = 10


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
    for _ in range(UPDATES * accumulation):
        after = state.apply(jnp.full((2, 2), 0.1), optimizer)
        moved.append(float(jnp.max(state.params - after.params)))
        state = after
    expected = np.zeros((UPDATES, accumulation))
    expected[:, -1] = [rate(update) for update in range(UPDATES)]
    np.testing.assert_allclose(moved, expected.ravel(), atol=1e-6)
    assert np.argmax(moved) == (4 + 1) * accumulation - 1
