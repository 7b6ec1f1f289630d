"""On-policy losses against TRL's GRPOTrainer and RLOOTrainer on the same tokens and rewards.

What their `generate` would return is handed to them; masks, advantages, log-probabilities of
reference and old policy, loss and gradients are their own.
"""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest

from configs import smoke
from expandr_jax.config import read_config
from expandr_jax.losses.policy import POLICY_LOSSES, advantages
from expandr_jax.objectives.log_probs import sampled_log_probs
from expandr_jax.objectives.packing import Example, pack
from expandr_jax.objectives.policy import Sampled, pack_sampled, policy_step
from expandr_jax.rewards.group import Candidate, Group
from expandr_jax.training.train_state import TrainState
from tests.trl_test import LORA, load_ours, peft_tensors, write_base

pytest.importorskip("trl")

LONGEST = 9  # `max_completion_length`.
TEMPERATURE = 0.7
END = 2
EXAMPLES = [
    Example([5, 6, 7, 20], [[8, 9, END], [10, END], [11, 12, 13, 14, 15, 16, 17, 18, 19]]),
    Example([9, 30], [[21, 22, 23, END], [24, 25, END], [26, 27, 28, 29, END]]),
]
REWARDS = np.array([[0.5, 2.0, 1.0], [3.0, -1.0, 0.25]])
SAMPLES = REWARDS.shape[1]
TEXTS = [(e.prompt, response) for e in EXAMPLES for response in e.responses]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def ours(base):
    return load_ours(base)


def columns(values):
    """The same as TRL has them, [texts, tokens]."""
    import torch

    made = np.zeros((len(TEXTS), LONGEST), np.float32)
    for row, value in enumerate(values):
        made[row, : len(value)] = value
    return torch.tensor(made)


@pytest.fixture(scope="module")
def known():
    """Log-probabilities that others may have given the texts: by name, a text each."""
    rng = np.random.default_rng(0)
    return {
        name: [rng.uniform(-5.6, -4.8, len(text)).astype(np.float32) for _, text in TEXTS]
        for name in ("old", "sampled")
    }


@pytest.fixture(scope="module")
def reference(ours):
    """Log-probabilities of the texts under the base."""
    generator, params, _ = ours
    log_probs = functools.partial(
        sampled_log_probs, generator.module, responses=SAMPLES, chunk=64, temperature=TEMPERATURE
    )
    return jax.jit(log_probs)({"params": params}, pack(EXAMPLES, 0))[0]


def our_settings(name, **changes):
    """The config's section `grpo` for a loss."""
    settings = read_config(smoke.get_config()).grpo
    return dataclasses.replace(
        settings, loss=name, samples=SAMPLES, queries=len(EXAMPLES), max_new_tokens=LONGEST,
        temperature=TEMPERATURE, chunk=64, **changes,
    )  # fmt: skip


def our_batch(settings, known):
    """The batch of an update, as training packs it; `known`: which log-probabilities are given."""
    sampled = iter(known.get("sampled", [[0.0] * len(text) for _, text in TEXTS]))
    rows = []
    for row, example in enumerate(EXAMPLES):
        candidates = [
            Candidate(
                "", tokens=text, log_probs=next(sampled), total=REWARDS[row, i],
                finished="eos" if text[-1] == END else "length",
            )
            for i, text in enumerate(example.responses)
        ]  # fmt: skip
        rows.append(Sampled(Group(f"{row}", "", "", "", candidates), example.prompt))
    batch = pack_sampled(rows, settings, 0, ())
    if "old" in known:
        batch["old"] = np.zeros_like(batch["sampled"])
        for row in range(len(EXAMPLES)):
            of_row = np.concatenate(known["old"][row * SAMPLES : (row + 1) * SAMPLES])
            batch["old"][row, : len(of_row)] = of_row
    return batch


def our_loss(ours, reference, settings, known, directory):
    """The loss, the adapter's gradients by peft's names, and metrics, of training's own step."""
    generator, params, adapter = ours
    optimizer = optax.sgd(1.0)
    step = functools.partial(
        policy_step, optimizer=optimizer, module=generator.module,
        loss=POLICY_LOSSES[settings.loss], settings=settings,
    )  # fmt: skip
    state = TrainState.create(adapter, optimizer)
    batch = {**our_batch(settings, known), "reference": reference}
    state, metrics = jax.jit(step)(state, params, batch, 1.0)
    gradients = jax.tree.map(np.subtract, adapter, state.params)
    return float(metrics["loss"]), peft_tensors(gradients, generator, directory), metrics


@pytest.fixture
def make_trainer(base, ours, tmp_path):
    """Builds a trainer of TRL's whose adapter is ours, and which samples `TEXTS`."""
    import torch
    import transformers
    from datasets import Dataset
    from peft import LoraConfig as PeftLora
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    def make(kind="grpo", sampled=None, **settings):
        config, trainer = GRPOConfig, GRPOTrainer
        if kind == "rloo":
            config, trainer = RLOOConfig, RLOOTrainer
        arguments = config(
            output_dir=str(tmp_path / "trl"), bf16=False, gradient_checkpointing=False,
            use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
            per_device_train_batch_size=len(TEXTS), num_generations=SAMPLES,
            max_completion_length=LONGEST, temperature=TEMPERATURE, dataloader_pin_memory=False,
            **settings,
        )  # fmt: skip
        made = trainer(
            transformers.AutoModelForCausalLM.from_pretrained(base),
            reward_funcs=lambda **_: REWARDS.ravel().tolist(),
            args=arguments,
            train_dataset=Dataset.from_list([{"prompt": "a"}] * len(TEXTS)),
            processing_class=transformers.AutoTokenizer.from_pretrained(base),
            peft_config=PeftLora(
                r=LORA.rank, lora_alpha=LORA.alpha, lora_dropout=0.0, task_type="CAUSAL_LM",
                target_modules=["q_proj", "v_proj"],
            ),
        )  # fmt: skip
        generator, _, adapter = ours
        parameters = dict(made.model.named_parameters())
        with torch.no_grad():
            for name, value in peft_tensors(adapter, generator, tmp_path / "adapter").items():
                parameters[name].copy_(torch.tensor(value))
        prompts, texts = ([list(part) for part in side] for side in zip(*TEXTS, strict=True))
        sampled = None if sampled is None else [value.tolist() for value in sampled]
        generated = (prompts, texts, None, texts, sampled, {}, None, None)
        made._generate = lambda _: (prompts, texts, texts) if kind == "rloo" else generated
        made.current_gradient_accumulation_steps = 1  # Its own loop would say so.
        made.model.train()
        return made

    return make


def their_loss(trainer, old=None):
    """Their loss, gradients, and what they made of the texts; `old`: the old policy's numbers."""
    inputs = trainer._generate_and_score_completions([{"prompt": "a"}] * len(TEXTS))
    if old is not None:
        inputs["old_per_token_logps"] = columns(old)
        inputs["old_logps"] = columns(old).sum(1)
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    gradients = {
        name: parameter.grad.numpy()
        for name, parameter in trainer.model.named_parameters()
        if parameter.requires_grad
    }
    return loss.item(), gradients, inputs


def assert_equal(found, expected):
    np.testing.assert_allclose(found[0], expected[0], atol=1e-4)
    assert found[1].keys() == expected[1].keys()
    assert max(np.abs(value).max() for value in expected[1].values()) > 1e-2
    for tensor, value in expected[1].items():
        np.testing.assert_allclose(found[1][tensor], value, atol=1e-4, err_msg=tensor)


KL = 0.3
PLAIN_KL = {"beta": KL, "use_bias_correction_kl": False}
# TRL's arguments for each loss; CISPO's upper border is 1 + 0.5 here and there.
LOSSES = {
    "grpo": {"loss_type": "grpo", **PLAIN_KL},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none", **PLAIN_KL},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28, **PLAIN_KL},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.5, **PLAIN_KL},
    "gspo": {
        "loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4,
        "epsilon_high": 4e-4, **PLAIN_KL,
    },
    "rloo": {"beta": 0.0},  # There the KL is part of the reward.
}  # fmt: skip


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_loss_and_gradients_of_an_older_policy_s_texts(
    ours, reference, known, make_trainer, tmp_path, name
):
    trainer = make_trainer("rloo" if name == "rloo" else "grpo", **LOSSES[name])
    expected = their_loss(trainer, known["old"])
    settings = our_settings(
        name, kl_weight=LOSSES[name]["beta"], clip_high=0.5 if name == "cispo" else None
    )
    found = our_loss(ours, reference, settings, {"old": known["old"]}, tmp_path / "grads")
    assert_equal(found, expected)
    of_texts = advantages(REWARDS, POLICY_LOSSES[name].advantage).ravel()
    np.testing.assert_allclose(of_texts, expected[2]["advantages"], atol=1e-6)
    seen = {key: value[0] for key, value in trainer._metrics["train"].items()}
    np.testing.assert_allclose(found[2]["entropy"], seen["entropy"], rtol=1e-5)
    if name in ("grpo", "dr_grpo", "dapo"):
        held = seen["clip_ratio/region_mean"]
        np.testing.assert_allclose(found[2]["clip_fraction"], held, rtol=1e-5)
        assert 0 < held < 1
    if settings.kl_weight:
        np.testing.assert_allclose(found[2]["kl"], seen["kl"], rtol=1e-4)


UNBIASED = {"use_bias_correction_kl": True}, {"kl_unbiased": True}
CUT = {"mask_truncated_completions": True}, {"mask_cut": True}
OPTIONS = {  # The loss, TRL's arguments and our settings.
    "unbiased KL": ("grpo", *UNBIASED),
    "unbiased KL of sequences": ("gspo", *UNBIASED),
    "entropy": ("grpo", {"entropy_coef": 0.4}, {"entropy_weight": 0.4}),
    "cut texts, by response": ("grpo", *CUT),
    "cut texts, by batch": ("dapo", *CUT),
    "cut texts, by length": ("dr_grpo", *CUT),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_loss_and_gradients_with_options(ours, reference, make_trainer, tmp_path, option):
    name, theirs, mine = OPTIONS[option]
    expected = their_loss(make_trainer(**{**LOSSES[name], **theirs}))
    settings = our_settings(name, kl_weight=KL, **mine)
    assert_equal(our_loss(ours, reference, settings, {}, tmp_path / "grads"), expected)


def test_truncated_importance_weights(ours, reference, known, make_trainer, tmp_path):
    """TRL has them for what vLLM samples, whose log-probabilities it is given."""
    trainer = make_trainer(sampled=known["sampled"], **LOSSES["grpo"])
    trainer.use_vllm, trainer.vllm_importance_sampling_correction = True, True
    trainer.vllm_importance_sampling_mode = "token_truncate"
    trainer.vllm_importance_sampling_clip_min = None
    trainer.vllm_importance_sampling_clip_max = 1.1
    expected = their_loss(trainer)
    settings = our_settings("grpo", kl_weight=KL, importance_cap=1.1)
    found = our_loss(ours, reference, settings, {"sampled": known["sampled"]}, tmp_path / "grads")
    assert_equal(found, expected)
    seen = {key: value[0] for key, value in trainer._metrics["train"].items()}
    for ours_, theirs in (("mismatch", "mean"), ("largest_mismatch", "max")):
        expected = seen[f"sampling/sampling_logp_difference/{theirs}"]
        np.testing.assert_allclose(found[2][ours_], expected, rtol=1e-4)
    assert seen["sampling/importance_sampling_ratio/max"] == pytest.approx(1.1)
