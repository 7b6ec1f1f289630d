"""Memory: what was freed goes back to the system, what is needed is known before a run."""

import ctypes
import dataclasses
import gc
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest
from rich.console import Console

from configs import smoke
from expandr_jax.config import read_config
from expandr_jax.errors import UserError
from expandr_jax.generation import engine as engines
from expandr_jax.generation.engine import Engine
from expandr_jax.generation.requests import Extent, Request
from expandr_jax.generation.sampler import Sampler, slots_of_a_process
from expandr_jax.loading import _bytes_held, _check_sampling, load_generator_model, load_models
from expandr_jax.models.decoder import cast_weights
from expandr_jax.runtime.host_memory import release_memory
from expandr_jax.runtime.processes import Processes
from expandr_jax.runtime.progress import Reporter
from expandr_jax.serving.expansions import SlotSampler
from expandr_jax.sharding import device_put_shared, make_mesh
from expandr_jax.weights.hf import load_generator
from expandr_jax.weights.trees import model_shardings

TINY = str(pathlib.Path(__file__).parent.parent / "configs" / "tiny" / "tiny-llama")
SETTINGS = {"slots": 8, "prompt_buckets": (16,), "max_new_tokens": 4, "pad_id": 0, "seed": 0}


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


def test_on_policy_all_that_samples_is_in_the_plan_of_a_run(monkeypatch):
    """The texts of a step's documents, too, and the candidates that a warm start learns from."""
    config, plans = smoke.get_config(), []
    monkeypatch.setattr("expandr_jax.loading.check_memory", lambda plan, _: plans.append(plan))
    config.generator.slots, config.step_b = 64, "grpo"
    config.reward.update({"positive": 0.0, "answer": 0.0, "corpus": 0.0, "group": 1.0})
    config.grpo.update({"queries": 4, "samples": 2, "max_new_tokens": 8})
    config.candidates.max_new_tokens = 100
    model = load_generator_model(read_config(config))

    def planned(documents=0, warm_start=""):
        config.grpo.documents, config.warm_start = documents, warm_start
        _check_sampling(read_config(config), model, 0)
        before, step = (plan["slots"] for plan in plans[-2:])
        return before, step

    before, step = planned()
    assert planned(documents=7) == (before, 8 * step)
    longer = before * (max(config.generator.prompt_buckets) + 100)
    most = max(config[stage].max_new_tokens for stage in ("expansion", "answer"))
    longer //= max(config.generator.prompt_buckets) + most
    assert planned(warm_start="best") == (longer, step)


def test_the_retrievers_that_stay_on_the_devices_are_in_the_plan_of_a_run(monkeypatch):
    config, plans = smoke.get_config(), []
    monkeypatch.setattr("expandr_jax.loading.check_memory", lambda plan, _: plans.append(plan))
    models = load_models(read_config(config), int)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(models.retriever_params))
    assert plans[-1]["retrievers"] == size
    load_models(read_config(config), int, trains_retriever=True)
    assert plans[-1]["retrievers"] == 2 * size  # As it came, and trained.
    on_host = jax.tree.map(np.asarray, models.retriever_params)
    assert _bytes_held(on_host) == 0
    config.generator.memory_limit = 1.0  # What sampling alone may take.
    load_models(read_config(config), int, trains_retriever=True)
    assert "retrievers" not in plans[-1]
    config.generator.memory_limit, config.contrastive.lora.rank = 0.0, 2
    load_models(read_config(config), int, trains_retriever=True)
    assert plans[-1]["retrievers"] == size  # The adapter's base is the same one.


def test_what_stays_to_answer_questions_keeps_to_the_limit_too():
    generator, params = load_generator(TINY)
    config = read_config(smoke.get_config())
    asked = Extent.of([Request("", 0, (5, 6), 1.0, 1.0, 4)])

    def sampler(limit):
        settings = dataclasses.replace(config.generator, memory_limit=limit)
        quiet = Reporter(Console(quiet=True))
        return Sampler(generator, params, "", make_mesh(), settings, 0, Processes(), quiet)

    assert SlotSampler(sampler(1.0), config.expansion, 8).slots == 8
    assert sampler(1.0).engine(None, asked).shape.max_new_tokens == 4
    with pytest.raises(UserError, match=r"sampling needs 0\.000.* and may use 0\.0001"):
        SlotSampler(sampler(1e-4), config.expansion, 8)


@pytest.mark.parametrize(
    ("axes", "compute", "copies"),
    [((8, 1, 1), "float32", 0), ((8, 1, 1), "bfloat16", 1), ((1, 8, 1), "float32", 1 / 8)],
)
def test_the_weights_that_training_keeps_are_counted_beside_the_engine_s(axes, compute, copies):
    """But for those that a processor's engine has views of: there is one copy of them."""
    generator, params = load_generator(TINY, compute_dtype=jnp.dtype(compute))
    training = make_mesh(*axes)
    shardings = model_shardings(training, generator.module, params)
    trained = device_put_shared(params, shardings)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    norms = 5 * 32 * 4  # They are whole on every device, and never cast.
    given = {"eos_ids": generator.eos_ids, "mesh": make_mesh(), **SETTINGS}
    for own, held in ((trained, None), (jax.tree.map(np.asarray, params), trained)):
        engine = Engine(generator.module, own, held=held, **given)
        expected = pytest.approx(copies * size, abs=2 * norms)
        assert engine.memory["stacked weights"] == expected
    # They decide whether sampling fits.
    limit = sum(engine.memory.values()) - 1
    with pytest.raises(UserError, match=r"stacked weights .*; take fewer slots"):
        Engine(generator.module, own, held=held, memory_limit_bytes=limit, **given)


def test_weights_that_have_their_type_are_not_copied():
    _, params = load_generator(TINY)
    for tree in (params, jax.tree.map(np.asarray, params)):
        cast = cast_weights(tree, jnp.float32)
        assert all(map(lambda a, b: a is b, jax.tree.leaves(tree), jax.tree.leaves(cast)))


def test_an_engine_never_holds_a_second_stack(monkeypatch):
    """On an accelerator its layers are cut out of a stack on its mesh: of one leaf at a time."""
    generator, params = load_generator(TINY)
    module = dataclasses.replace(generator.module, dtype=jnp.bfloat16)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    given = {"eos_ids": generator.eos_ids, **SETTINGS}
    views = Engine(module, params, **given)

    def held() -> int:
        return sum(array.nbytes for array in jax.live_arrays())

    peaks, put = [], engines.device_put_shared

    def watched(*args):
        peaks.append(held())
        return put(*args)

    before = held()
    monkeypatch.setattr(engines, "device_put_shared", watched)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    engine = Engine(module, params, **given)
    assert max(peaks) < before + size / 2 + 3 * largest
    jax.tree.map(np.testing.assert_array_equal, engine._variables, views._variables)
