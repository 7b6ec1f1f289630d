"""Memory: what was freed goes back to the system, what is needed is known before a run."""

import ctypes
import gc
import pathlib

import jax
import numpy as np
import psutil
import pytest

from configs import smoke
from expandr_jax.config import read_config
from expandr_jax.generation.engine import Engine
from expandr_jax.generation.requests import Request
from expandr_jax.generation.sampler import slots_of_a_process
from expandr_jax.loading import load_models
from expandr_jax.runtime.host_memory import release_memory
from expandr_jax.weights.hf import load_generator


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="no glibc")
def test_what_was_freed_below_something_that_stays_is_returned():
    pieces = [np.ones(12_000) for _ in range(3000)]  # Too small for a mapping of their own.
    stays = pieces[-1]
    held = psutil.Process().memory_info().rss
    del pieces
    release_memory()
    assert held - psutil.Process().memory_info().rss > 200e6
    assert stays.sum() == 12_000


@pytest.mark.parametrize("texts", [1, 3])  # Only the first of three is asked for.
def test_an_engines_cache_is_gone_when_its_memory_is_given_back(monkeypatch, texts):
    generator, params = load_generator(
        str(pathlib.Path(__file__).parent.parent / "configs" / "tiny" / "tiny-llama")
    )
    engine = Engine(
        generator.module, params, slots=4, prompt_buckets=(16,), max_new_tokens=4,
        eos_ids=generator.eos_ids, pad_id=generator.pad_id, seed=0,
    )  # fmt: skip

    def held() -> int:
        gc.collect()
        return sum(array.nbytes for array in jax.live_arrays())

    before, seen = held(), []
    monkeypatch.setattr("expandr_jax.generation.engine.trim_memory", lambda: seen.append(held()))
    requests = [Request(f"{i}", 0, (5, 6, 7), 1.0, 0.9, 1 + i) for i in range(texts)]
    completions = engine.generate(requests)
    if texts == 1:
        assert len(list(completions)) == 1
    else:
        next(completions)
        assert held() > before
        completions.close()
    assert seen == [before]


@pytest.mark.parametrize("stage", ["expansion", "candidates", "answer"])
def test_a_penalty_of_any_stage_is_in_the_plan_of_a_run(monkeypatch, stage):
    config, plans = smoke.get_config(), []
    monkeypatch.setattr(
        "expandr_jax.loading.check_memory", lambda plan, _: plans.append(plan["slots"])
    )
    for penalty in (1.0, 1.2):
        config[stage].repetition_penalty = penalty
        models = load_models(read_config(config), lambda _: None)
    rows = slots_of_a_process(config.generator, models.sampling_mesh) // 8
    assert plans[1] - plans[0] == rows * models.generator.module.config.vocab_size
