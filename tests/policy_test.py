"""On-policy training of a tiny model: it learns what is rewarded from nothing but its texts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from rich.console import Console

from configs import base
from expandr_jax.config import read_config
from expandr_jax.generation.sampler import Sampler
from expandr_jax.losses.policy import POLICY_LOSSES
from expandr_jax.models.lora import LoraConfig, init_lora
from expandr_jax.objectives.policy import PolicyTrainer, pack_sampled
from expandr_jax.objectives.rollouts import Rollouts
from expandr_jax.objectives.watch import FIRST_STEPS, WATCHED, collapsed
from expandr_jax.pair import GeneratorModel
from expandr_jax.rewards.group import Group
from expandr_jax.runtime.processes import Processes
from expandr_jax.runtime.progress import Reporter
from expandr_jax.sharding import make_mesh
from expandr_jax.training.train_state import make_optimizer
from expandr_jax.weights.hf import load_generator

STEPS = 60
QUESTIONS = {str(i): f"question {i}" for i in range(12)}


@pytest.fixture(scope="module")
def model():
    """The smoke config's generator; its logits are larger, so that an adapter can make it sure."""
    mesh = make_mesh(devices=jax.devices()[:1])
    kind = {"dtype": jnp.float32, "compute_dtype": jnp.float32}
    generator, params = load_generator("configs/tiny/tiny-llama", mesh=mesh, **kind)
    lora = LoraConfig(8, 64.0, 0.0, ("_proj$",))
    generator = dataclasses.replace(generator, module=generator.module.clone(lora=lora))
    params = {**params, "embedding": params["embedding"] * 10}
    return GeneratorModel(mesh, mesh, generator, params, params, "")


def settings_of(**grpo):
    config = base.get_config()
    config.generator.slots = 64
    config.generator.prompt_buckets = (32,)
    config.grpo.update(
        queries=4, samples=16, max_new_tokens=8, learning_rate=5e-3, steps=STEPS, **grpo
    )
    return read_config(config.to_dict())


def holds(word, sign=1.0):
    """Rewards texts that hold a word."""

    def score(groups):
        return [
            dataclasses.replace(
                group,
                candidates=[
                    dataclasses.replace(c, total=sign * (word in c.text), rewards={"word": 0.0})
                    for c in group.candidates
                ],
            )
            for group in groups
        ], {}

    return score


class Training:
    """On-policy training without a run."""

    def __init__(self, model, config, score):
        generator, self.settings = model.generator, config.grpo
        sampler = Sampler(
            generator, model.sampling_params, "", model.sampling_mesh, config.generator, 0,
            Processes(), Reporter(Console(quiet=True)),
        )  # fmt: skip
        optimizer = make_optimizer(config.grpo.learning_rate, STEPS, clip_norm=1.0, constant=True)
        self.trainer = PolicyTrainer(model, config.grpo, optimizer)
        adapter = init_lora(jax.random.key(0), model.generator_params, generator.module.lora)
        self.rollouts = Rollouts(
            sampler, adapter, QUESTIONS, lambda q: Group(q, QUESTIONS[q], "", "", []), score,
            config.grpo,
        )  # fmt: skip
        self.state, self.pad_id = self.trainer.setup.create(adapter), generator.pad_id

    def pack(self, rollout):
        return [pack_sampled(rollout.groups, self.settings, self.pad_id, self.rollouts.sizes)]

    def step(self, number):
        """Takes a step: what its texts were worth, and what the update says."""
        rollout = self.rollouts.sample(number, self.state.params)
        batches = self.trainer.batches(self.state.params, self.pack(rollout))
        self.state, metrics = self.trainer.learn(self.state, batches, 1.0)
        return rollout.statistics["reward"], metrics


def learned(model, loss, score):
    training = Training(model, settings_of(loss=loss), score)
    rewards = [training.step(number)[0] for number in range(STEPS)]
    print(loss, *(f"{reward:.2f}" for reward in rewards))
    return rewards


@pytest.mark.parametrize(
    "loss",
    [
        name if name == "grpo" else pytest.param(name, marks=pytest.mark.slow)
        for name in POLICY_LOSSES
    ],
)
def test_what_is_rewarded_grows_and_what_is_punished_falls(model, loss):
    rewards = learned(model, loss, holds("e"))
    assert np.mean(rewards[:2]) < 0.5
    assert np.mean(rewards[-10:]) >= 0.9
    punished = learned(model, loss, holds("e", -1.0))
    assert np.mean(punished[-20:]) > 0.75 * np.mean(punished[:5])  # Both are below 0.


@pytest.fixture(scope="module")
def training(model):
    """One that nothing is learned in, for tests of its parts."""
    return Training(model, settings_of(resample=12), holds("on"))


def test_an_adapter_changes_texts_and_compiles_nothing(model, training):
    rollouts, generator = training.rollouts, model.generator
    moved = jax.tree.map(
        lambda x: x + 0.3 * jax.random.normal(jax.random.key(1), x.shape), training.state.params
    )
    before = rollouts.sample(0, training.state.params)
    engine = rollouts._engine
    base = jax.tree.leaves(engine._variables["params"])
    programs = engine._programs
    compiled = [p._cache_size() for p in (programs.prefill, programs.insert, programs.decode)]
    after = rollouts.sample(0, moved)
    assert compiled == [
        p._cache_size() for p in (programs.prefill, programs.insert, programs.decode)
    ]
    assert all(
        a is b for a, b in zip(base, jax.tree.leaves(engine._variables["params"]), strict=True)
    )
    fresh = Rollouts(
        dataclasses.replace(rollouts._sampler), moved, QUESTIONS, rollouts._group,
        rollouts._score, training.settings,
    ).sample(0, moved)  # fmt: skip
    texts = [[g.group.texts for g in r.groups] for r in (before, after, fresh)]
    assert texts[0] != texts[1] == texts[2]
    again = rollouts.sample(0, training.state.params)
    assert [g.group for g in again.groups] == [g.group for g in before.groups]
    assert generator.decode(before.groups[0].group.candidates[0].tokens)


def test_a_process_reads_its_own_prompts_and_makes_the_engine_of_all(training, monkeypatch):
    whole, asked = training.rollouts, []
    generator = whole._sampler.generator

    def ids(self, message, limit):
        asked.append(message)
        return original(self, message, limit)

    original = type(generator).chat_ids
    monkeypatch.setattr(type(generator), "chat_ids", ids)
    given = []

    class Half(Processes):
        """One of two, which hears what the other has said before."""

        def __init__(self, index):
            super().__init__()
            self.index, self.count, self.others = index, 2, given[:]

        def gather(self, value):
            given.append(value)
            return [self.others.pop(0) if self.others else value, value]

    for index in range(2):
        sampler = dataclasses.replace(whole._sampler, processes=Half(index))
        half = Rollouts(
            sampler, training.state.params, QUESTIONS, whole._group, whole._score,
            training.settings,
        )  # fmt: skip
        assert asked == [*QUESTIONS.values()][index::2]
        asked.clear()
    assert half.sizes == whole.sizes
    assert half._engine.shape == whole._engine.shape
    np.testing.assert_array_equal(half._engine._prefix, whole._engine._prefix)


def test_training_has_the_log_probabilities_of_sampling(model, training):
    """The two programs are the sampler's, slot by slot, and the step's, packed rows."""
    moved = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape), training.state.params
    )
    (packed,) = training.pack(training.rollouts.sample(3, moved))
    (part,) = training.trainer.batches(moved, [packed])[0]
    trained = training.trainer.log_probs({"params": model.generator_params, "lora": moved}, part)
    real = packed["responses"] > 0
    np.testing.assert_allclose(np.asarray(trained)[real], packed["sampled"][real], atol=1e-4)
    assert packed["sampled"][real].std() > 0.1


def test_groups_with_equal_rewards_are_drawn_again_or_left_out(training):
    def score(groups):
        marked, _ = holds("")(groups)  # All are worth the same,
        for number, group in enumerate(marked):
            if int(group.query_id) % 3 == 0:  # but those of some queries.
                first = dataclasses.replace(group.candidates[0], total=0.0)
                marked[number] = dataclasses.replace(
                    group, candidates=[first, *group.candidates[1:]]
                )
        return marked, {}

    rollouts = training.rollouts
    kept, rollouts._score = rollouts._score, score
    try:
        rollout = rollouts.sample(1, training.state.params)
        names = [g.group.query_id for g in rollout.groups]
        teaching = [g.group.query_id for g in rollout.groups if g.used]
        assert len(names) == len(set(names)) == 4
        # All twelve are drawn, if need be.
        assert sorted(teaching) == ["0", "3", "6", "9"]
        rollouts._settings = dataclasses.replace(training.settings, resample=0)
        rollout = rollouts.sample(1, training.state.params)
        used = [g.used for g in rollout.groups]
        assert used == sorted(used, reverse=True)
        assert rollout.statistics["teaching"] == np.mean(used) < 1
        (packed,) = training.pack(rollout)
        for row, group in enumerate(rollout.groups):
            assert (np.abs(packed["weights"][row]).sum() > 0) == group.used
    finally:
        rollouts._score, rollouts._settings = kept, training.settings


def test_without_a_difference_nothing_is_learned(training):
    rollouts = training.rollouts
    kept, rollouts._score = rollouts._score, holds("")
    try:
        rollout = rollouts.sample(2, training.state.params)
    finally:
        rollouts._score = kept
    assert rollout.statistics["teaching"] == 0
    before = jax.tree.map(np.array, training.state.params)
    batches = training.trainer.batches(training.state.params, training.pack(rollout))
    training.state, metrics = training.trainer.learn(training.state, batches, 1.0)
    assert metrics["grad_norm"] == 0
    jax.tree.map(
        np.testing.assert_array_equal, before, jax.tree.map(np.array, training.state.params)
    )


HEALTHY = {
    "kl": 0.01, "entropy": 2.0, "repetitive": 0.1, "reward": 0.5, "reward_deviation": 0.2,
    "reward_error": 0.01,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"kl": 1.5}, "mine.watch_kl"),
        ({"entropy": 0.1}, "mine.watch_entropy allows 0.2 to 6"),
        ({"entropy": 7.0}, "mine.watch_entropy"),
        ({"repetitive": 0.7}, "mine.watch_repetitive"),
        ({"reward": 0.25}, "below 0.3"),
    ],
)
def test_a_collapse_is_seen_when_it_lasts(changed, why):
    settings = settings_of(watch_steps=4).grpo
    rows = [HEALTHY] * (FIRST_STEPS + 10)
    assert collapsed(rows, settings, "mine") is None
    rows += [{**HEALTHY, **changed}] * 3
    assert collapsed(rows, settings, "mine") is None
    assert why in collapsed([*rows, rows[-1]], settings, "mine")
    assert collapsed([*rows, HEALTHY, rows[-1]], settings, "mine") is None


def steps_of(rng, steps, mean, between=0.4, within=0.03, queries=16):
    """Steps whose queries differ much in what they are worth, and the texts of each but little."""
    worth = mean + between * rng.normal(size=(steps, queries))
    return [
        {**HEALTHY, "reward": row.mean(), "reward_deviation": within,
         "reward_error": row.std(ddof=1) / np.sqrt(queries)}
        for row in worth
    ]  # fmt: skip


def test_other_queries_are_no_collapse_and_worse_texts_are():
    settings, length = settings_of().grpo, settings_of().grpo.watch_steps
    first = FIRST_STEPS + length
    for seed in range(40):
        rng = np.random.default_rng(seed)
        rows = steps_of(rng, 300, mean=0.5)
        assert not any(collapsed(rows[:end], settings, "mine") for end in range(first, 301)), seed
        rows += steps_of(rng, length, mean=0.1, between=0.1)
        assert "(mine.watch_reward deviations" in collapsed(rows, settings, "mine"), seed
    # Runs of before know no standard errors.
    older = [{k: v for k, v in row.items() if k != "reward_error"} for row in rows]
    assert "(mine.watch_reward deviations" in collapsed(older, settings, "mine")


def test_a_step_s_standard_error_is_that_of_its_queries(training, monkeypatch):
    once = dataclasses.replace(training.settings, resample=0)
    monkeypatch.setattr(training.rollouts, "_settings", once)
    rollout = training.rollouts.sample(4, training.state.params)
    means = [np.mean([c.total for c in row.group.candidates]) for row in rollout.groups]
    expected = scipy.stats.sem(means)
    assert expected > 0
    assert rollout.statistics["reward_error"] == pytest.approx(expected)


@pytest.mark.slow
def test_a_rate_far_too_high_collapses_at_the_limits_as_they_are(model):
    config = settings_of()
    grpo = dataclasses.replace(config.grpo, learning_rate=1.0)
    training = Training(model, dataclasses.replace(config, grpo=grpo), holds("e"))
    rows, why = [], None
    for number in range(STEPS):
        rollout = training.rollouts.sample(number, training.state.params)
        packed = training.pack(rollout)
        batches = training.trainer.batches(training.state.params, packed)
        kl = training.trainer.kl(packed[0])
        training.state, metrics = training.trainer.learn(training.state, batches, 1.0)
        step = {**metrics, **rollout.statistics, "kl": kl}
        rows.append({name: float(step[name]) for name in WATCHED})
        if why := collapsed(rows, grpo, "mine"):
            break
    assert "(mine.watch_" in why


def test_the_kl_of_a_warm_start_is_no_collapse_and_one_at_once_is():
    settings = settings_of(watch_steps=4).grpo
    warm = [{**HEALTHY, "kl": 2.0}] * 20
    assert collapsed(warm, settings, "mine") is None
    assert "mine.watch_kl" in collapsed([*warm, *[{**HEALTHY, "kl": 3.1}] * 4], settings, "mine")
    at_once = [HEALTHY, *[{**HEALTHY, "kl": 2.0}] * 20]  # From the second step on.
    assert "mine.watch_kl" in collapsed(at_once, settings, "mine")
