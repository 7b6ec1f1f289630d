"""Step B against TRL's DPOTrainer: tokens, loss, rewards, gradients and updates of one adapter.

What is compared stays within TRL's own limits: prompts that end on a token boundary, and nothing
longer than `max_length`. Where the two differ on purpose, a test says how.
"""

import dataclasses
import functools
import json
import types

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from expandr_jax.data.preferences import read_preferences
from expandr_jax.models.lora import LoraConfig, init_lora
from expandr_jax.objectives.log_probs import response_log_probs
from expandr_jax.objectives.objective import ObjectiveSettings, adapter_loss, adapter_step
from expandr_jax.objectives.packing import pack
from expandr_jax.objectives.registry import OBJECTIVES
from expandr_jax.training.train_state import TrainState, make_optimizer
from expandr_jax.weights.adapter import export_adapter
from expandr_jax.weights.hf import load_generator
from tests.commands import ROOT

pytest.importorskip("trl")

TINY_LLAMA = ROOT / "configs" / "tiny" / "tiny-llama"
LORA = LoraConfig(rank=3, alpha=6.0, dropout=0.0)
PAIRS = [
    ("shape of an array?", "axis 1, axis 2 and a norm", "no"),
    ("What is a loss?", "a scalar", "an optimizer that clips the gradient of a schedule"),
    ("momentum", "weight decay", "Weight decay"),
]
BETA, SMOOTHING = 0.3, 0.1
PREFIX = "base_model.model.model."
DPO = OBJECTIVES["sigmoid"]


def write_base(directory):
    """Writes a random Llama with a chat template as transformers does; its logits are not flat."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(TINY_LLAMA)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    transformers.AutoTokenizer.from_pretrained(TINY_LLAMA).save_pretrained(directory)
    return directory


def load_ours(base):
    """(generator, its parameters, an adapter that changes the model)."""
    loaded, params = load_generator(str(base))
    generator = dataclasses.replace(loaded, module=loaded.module.clone(lora=LORA))
    adapter = init_lora(jax.random.key(0), params, LORA)
    leaves, structure = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return generator, params, jax.tree.unflatten(structure, moved)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def ours(base):
    return load_ours(base)


@pytest.fixture(scope="module")
def messages():
    return [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
        for prompt, chosen, rejected in PAIRS
    ]


@pytest.fixture(scope="module")
def strings(ours):
    """The same pairs as preferences.jsonl of a run has them."""
    return [
        {"prompt": ours[0].chat_text(prompt), "chosen": chosen, "rejected": rejected}
        for prompt, chosen, rejected in PAIRS
    ]


def peft_tensors(tree, generator, directory):
    """An adapter-shaped tree by the names that peft gives its parameters."""
    export_adapter(directory, tree, LORA, generator.module.config, "base")
    tensors = load_file(directory / "adapter_model.safetensors")
    return {name.replace(".weight", ".default.weight"): value for name, value in tensors.items()}


@pytest.fixture
def make_trainer(base, ours, tmp_path):
    """Builds a DPOTrainer whose adapter is ours; its reference is the base, adapter off."""
    import torch
    import transformers
    from datasets import Dataset
    from peft import LoraConfig as PeftLora
    from trl import DPOConfig as TrlConfig
    from trl import DPOTrainer

    def make(rows, **settings):
        arguments = TrlConfig(
            output_dir=str(tmp_path / "trl"), bf16=False, gradient_checkpointing=False,
            use_cpu=True, report_to=[], beta=BETA, max_length=256, save_strategy="no",
            disable_tqdm=True, per_device_train_batch_size=len(rows),
            dataloader_pin_memory=False, **settings,
        )  # fmt: skip
        trainer = DPOTrainer(
            transformers.AutoModelForCausalLM.from_pretrained(base),
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=transformers.AutoTokenizer.from_pretrained(base),
            peft_config=PeftLora(
                r=LORA.rank, lora_alpha=LORA.alpha, lora_dropout=0.0, task_type="CAUSAL_LM",
                target_modules=["q_proj", "v_proj"],
            ),
        )  # fmt: skip
        generator, _, adapter = ours
        parameters = dict(trainer.model.named_parameters())
        with torch.no_grad():
            for name, value in peft_tensors(adapter, generator, tmp_path / "adapter").items():
                parameters[name].copy_(torch.tensor(value))
        return trainer

    return make


def collated(trainer):
    return trainer.data_collator([trainer.train_dataset[i] for i in range(len(PAIRS))])


def fed(batch):
    """(prompt, chosen, rejected) ids of each pair that TRL feeds its loss."""
    count = len(batch["input_ids"]) // 2
    rows = []
    for ids, kept, response in zip(
        *(batch[name].numpy() for name in ("input_ids", "attention_mask", "completion_mask")),
        strict=True,
    ):
        rows.append((ids[(kept == 1) & (response == 0)].tolist(), ids[response == 1].tolist()))
    chosen, rejected = rows[:count], rows[count:]
    assert [prompt for prompt, _ in chosen] == [prompt for prompt, _ in rejected]
    return [(p, c, r) for (p, c), (_, r) in zip(chosen, rejected, strict=True)]


def our_pairs(generator, rows, **limits):
    limits = {"prompt_length": 64, "response_length": 64, **limits}
    return OBJECTIVES["sigmoid"].tokenize(generator, rows, types.SimpleNamespace(**limits))


def test_the_loss_is_fed_the_tokens_that_trl_feeds_it(ours, strings, make_trainer):
    theirs = fed(collated(make_trainer(strings)))
    pairs, cut = our_pairs(ours[0], strings)
    assert cut == 0
    assert [tuple(p.ids) for p in pairs] == theirs
    bos, eos = 1, 2
    batch = pack(pairs, pad_id=0)
    for row, (prompt, *responses) in enumerate(theirs):
        for segment, response in enumerate(responses, start=1):
            place = batch["responses"][row] == segment
            assert batch["targets"][row][place].tolist() == response
            assert response[-1] == eos
            assert response.count(eos) == 1
            assert bos not in response
        assert prompt.count(bos) == 2  # A turn each; the chat template was applied once.


def test_a_response_that_ends_already_gets_no_second_end(ours, strings, make_trainer):
    ended = [{**row, "chosen": f"{row['chosen']}<|im_end|>"} for row in strings]
    pairs, cut = our_pairs(ours[0], ended)
    assert cut == 0
    assert [tuple(p.ids) for p in pairs] == fed(collated(make_trainer(ended)))
    assert [*pairs] == [*our_pairs(ours[0], strings)[0]]


def test_of_messages_what_the_template_puts_behind_the_end_is_learned_too(
    ours, messages, make_trainer, tmp_path
):
    generator = ours[0]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in messages))
    rows, _ = read_preferences(path, generator.tokenizer, prompt_length=64)
    behind = generator.tokenizer("\n", add_special_tokens=False)["input_ids"]
    for pair, (prompt, chosen, rejected) in zip(
        our_pairs(generator, rows)[0], fed(collated(make_trainer(messages))), strict=True
    ):
        assert pair.ids == [prompt, chosen, rejected]
        assert all(part[-2:] == [generator.end_id, *behind] for part in pair.ids[1:])


def test_a_prompt_keeps_its_last_token_where_trl_lets_the_text_merge(ours, make_trainer):
    """TRL tokenizes prompt and response as one text and leaves out what merges across.

    Ours tokenizes a response by itself, as what is sampled after the prompt's own tokens.
    """
    generator = ours[0]

    def ids(text):
        return generator.tokenizer(text, add_special_tokens=False)["input_ids"]

    row = {"prompt": "retur", "chosen": "ns", "rejected": "1"}
    assert len(ids("returns")) < len(ids("retur")) + len(ids("ns"))
    theirs = fed(collated(make_trainer([row] * len(PAIRS))))[0]
    (pair,), _ = our_pairs(generator, [row])
    assert pair.ids[:2] == [ids("retur"), [*ids("ns"), 2]]
    assert len(theirs[0]) < len(pair.prompt)
    assert theirs[0] + theirs[1] == [*ids("returns"), 2]


log_probs_of = jax.jit(
    functools.partial(response_log_probs, responses=2, chunk=64), static_argnums=0
)
STATIC = ("objective", "module", "settings")
loss_of = jax.jit(adapter_loss, static_argnames=STATIC)
gradients_of = jax.jit(jax.value_and_grad(adapter_loss, has_aux=True), static_argnames=STATIC)


def our_batch(ours, pairs):
    generator, params, _ = ours
    batch = pack(pairs, pad_id=0)
    batch["reference"] = log_probs_of(generator.module, {"params": params}, batch)[0]
    return batch


LOSSES = {
    "sigmoid": (ObjectiveSettings(BETA), {"loss_type": ["sigmoid"]}),
    "hinge": (ObjectiveSettings(BETA), {"loss_type": ["hinge"]}),
    "ipo": (ObjectiveSettings(BETA), {"loss_type": ["ipo"]}),
    "robust": (
        ObjectiveSettings(BETA, SMOOTHING),
        {"loss_type": ["robust"], "label_smoothing": SMOOTHING},
    ),
    "sigmoid, length-normalized": (
        ObjectiveSettings(BETA, length_normalized=True), {"loss_type": ["sigmoid_norm"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_loss_rewards_and_gradients_equal_trl_s(ours, strings, make_trainer, tmp_path, name):
    settings, theirs = LOSSES[name]
    kind = name.split(",")[0]
    generator, params, adapter = ours
    batch = our_batch(ours, our_pairs(generator, strings)[0])
    (loss, metrics), grads = gradients_of(
        adapter, params, batch, objective=OBJECTIVES[kind], module=generator.module,
        settings=settings,
    )  # fmt: skip

    trainer = make_trainer(strings, **theirs)
    trainer.model.train()
    expected = trainer.compute_loss(trainer.model, collated(trainer))
    expected.backward()
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-4)
    theirs = {
        name: parameter.grad.numpy()
        for name, parameter in trainer.model.named_parameters()
        if parameter.requires_grad
    }
    found = peft_tensors(grads, generator, tmp_path / "grads")
    assert found.keys() == theirs.keys()
    assert max(np.abs(value).max() for value in theirs.values()) > 1e-2
    for tensor, value in theirs.items():
        np.testing.assert_allclose(found[tensor], value, atol=1e-4, err_msg=tensor)

    seen = {name: value[0] for name, value in trainer._metrics["train"].items()}
    sides = ("chosen", "rejected")
    for column, side in enumerate(sides):
        log_prob = metrics[f"log_prob_{side}"]
        np.testing.assert_allclose(log_prob, seen[f"logps/{side}"], rtol=1e-4)
        # TRL's reward is of summed log-probabilities whatever the loss compares.
        reward = BETA * (log_prob - np.mean(batch["reference"][:, column]))
        np.testing.assert_allclose(reward, seen[f"rewards/{side}"], atol=1e-4)
    if kind != "ipo" and not settings.length_normalized:
        for side in sides:
            np.testing.assert_allclose(
                metrics[f"reward_{side}"], seen[f"rewards/{side}"], atol=1e-4
            )
        np.testing.assert_allclose(metrics["margin"], seen["rewards/margins"], atol=1e-4)
        np.testing.assert_allclose(metrics["accuracy"], seen["rewards/accuracies"])
        both = seen["rewards/chosen"] + seen["rewards/rejected"]
        np.testing.assert_allclose(BETA * metrics["kl"], both / 2, atol=1e-4)


def test_simpo_equals_trl_s_and_needs_no_reference(
    ours, strings, make_trainer, tmp_path, monkeypatch
):
    """TRL's own functions on the logits that transformers gives of the same tokens."""
    import torch

    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.cpo import CPOTrainer

    generator, params, adapter = ours
    pairs, _ = our_pairs(generator, strings)
    (loss, metrics), grads = gradients_of(
        adapter, params, pack(pairs, pad_id=0), objective=OBJECTIVES["simpo"],
        module=generator.module, settings=ObjectiveSettings(beta=2.0, gamma=0.5),
    )  # fmt: skip
    model = make_trainer(strings).model.train()
    sides = []
    for side in range(2):
        log_probs = []
        for pair in pairs:
            prompt, response = torch.tensor(pair.ids[0]), torch.tensor(pair.ids[1 + side])
            labels = torch.cat([torch.full_like(prompt, -100), response])[None]
            logits = model(torch.cat([prompt, response])[None]).logits
            log_probs.append(CPOTrainer.get_batch_logps(logits, labels, average_log_prob=True))
        sides.append(torch.cat(log_probs))
    settings = types.SimpleNamespace(
        loss_type="simpo", beta=2.0, simpo_gamma=0.5, alpha=0.0, label_smoothing=0.0,
        accelerator=types.SimpleNamespace(device="cpu"),
    )  # fmt: skip
    losses, chosen, rejected = CPOTrainer.cpo_loss(settings, *sides)
    losses.mean().backward()
    np.testing.assert_allclose(loss, losses.mean().item(), rtol=1e-5)
    np.testing.assert_allclose(metrics["reward_chosen"], chosen.mean().item(), rtol=1e-5)
    np.testing.assert_allclose(metrics["reward_rejected"], rejected.mean().item(), rtol=1e-5)
    theirs = {n: p.grad.numpy() for n, p in model.named_parameters() if p.requires_grad}
    assert max(np.abs(value).max() for value in theirs.values()) > 1e-2
    for tensor, value in peft_tensors(grads, generator, tmp_path / "grads").items():
        np.testing.assert_allclose(value, theirs[tensor], atol=1e-5, err_msg=tensor)


def test_an_added_sft_term_equals_trl_s_of_each_pair_alone(ours, strings, make_trainer):
    """TRL's is a mean over a batch's tokens, ours over each response's; alone they are one."""
    generator, params, adapter = ours
    settings = ObjectiveSettings(BETA, sft_weight=0.7)
    trainer = make_trainer(strings, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.7])
    for row, pair in enumerate(our_pairs(generator, strings)[0]):
        batch = our_batch(ours, [pair])
        loss, _ = loss_of(
            adapter, params, batch, objective=DPO, module=generator.module, settings=settings
        )
        alone = trainer.data_collator([trainer.train_dataset[row]])
        expected = trainer.compute_loss(trainer.model, alone).item()
        np.testing.assert_allclose(loss, expected, rtol=1e-4)


def test_updates_equal_those_of_trl_s_own_training(ours, strings, make_trainer, tmp_path):
    generator, params, adapter = ours
    steps = 4
    trainer = make_trainer(
        strings, max_steps=steps, learning_rate=1e-2, lr_scheduler_type="linear", warmup_steps=0,
        max_grad_norm=0.5, weight_decay=0.0, adam_beta2=0.999, adam_epsilon=1e-8,
    )  # fmt: skip
    trainer.train()
    batch = our_batch(ours, our_pairs(generator, strings)[0])
    optimizer = make_optimizer(1e-2, steps, clip_norm=0.5)
    step = jax.jit(
        functools.partial(
            adapter_step,
            objective=DPO,
            module=generator.module,
            settings=ObjectiveSettings(BETA),
            optimizer=optimizer,
        )
    )
    state = TrainState.create(adapter, optimizer)
    for _ in range(steps):
        state, _ = step(state, params, batch, jax.random.key(0))
    theirs = dict(trainer.model.named_parameters())
    before = peft_tensors(adapter, generator, tmp_path / "before")
    for tensor, value in peft_tensors(state.params, generator, tmp_path / "after").items():
        np.testing.assert_allclose(value, theirs[tensor].detach().numpy(), atol=1e-4)
        assert np.abs(value - before[tensor]).max() > 1e-2
