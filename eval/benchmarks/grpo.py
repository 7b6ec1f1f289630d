"""A whole step of GRPO: SmolLM2 samples 16 prompts x 8 texts x 32 tokens and learns of them.

LoRA of rank 8 on q and v, one update, float32; a text is worth how often it has a letter. TRL runs
without vLLM, gradient checkpointing and bf16, samples all texts of a step in one batch, and learns
in micro-batches of the size that is quickest. No token ends a text, on either side. Of texts that
are the same on both sides, gradients and entropies are compared first.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from eval.benchmarks import Comparison, Different, Running, check_close, per_second, smollm2

QUERIES, SAMPLES, NEW_TOKENS = 16, 8, 32
TEXTS = QUERIES * SAMPLES
RANK, ALPHA = 8, 32.0
CLIP_NORM, LEARNING_RATE = 1.0, 1e-5
PARTS = 4  # An update's, one after the other, on our side.
MICRO_BATCHES = (4, 8, 16, 32, 64)  # TRL tries each; 128 texts need some 25 GB.
TOLERANCE = 1e-4
NO_EOS = -1  # No token ends a text.


def reward(text: str) -> float:
    """How often a text has the letter e, and a little for its length, so that few are equal."""
    return text.count("e") + 1e-3 * len(text)


def prepare(directory: pathlib.Path) -> None:
    """Writes model, adapter, prompts, and texts to compare with."""
    import jax

    from expandr_jax.expansion.prompts import PROMPTS
    from expandr_jax.models.lora import LoraConfig, init_lora
    from expandr_jax.weights.adapter import export_adapter

    path = smollm2.export(directory)
    generator, params = smollm2.load(directory)
    lora = LoraConfig(RANK, ALPHA, 0.0)
    adapter = init_lora(jax.random.key(0), params, lora)
    moved = jax.tree.map(
        lambda x: x + 0.02 * jax.random.normal(jax.random.key(1), x.shape), adapter
    )
    export_adapter(directory / "adapter", moved, lora, generator.module.config, str(path))
    messages = [PROMPTS["q2d"].message(text) for text in smollm2.QUESTIONS[:QUERIES]]
    documented = "\n".join(getattr(np, name).__doc__ or "" for name in sorted(np.__all__))
    ids = generator.tokenizer(documented, add_special_tokens=False)["input_ids"]
    tokens = np.array(ids[: TEXTS * NEW_TOKENS]).reshape(TEXTS, NEW_TOKENS).tolist()
    inputs = {
        "messages": messages,
        "prompts": [generator.chat_text(message) for message in messages],
        "prompt_ids": [generator.chat_ids(message, 256)[0] for message in messages],
        "tokens": tokens,
        "texts": generator.tokenizer.batch_decode(tokens, skip_special_tokens=True),
    }
    (directory / "inputs.json").write_text(json.dumps(inputs))


def _inputs(directory: pathlib.Path) -> dict[str, Any]:
    return json.loads((directory / "inputs.json").read_text())


def _shares(seconds: Mapping[str, float], whole: float) -> str:
    """What shares of a step its parts took, for people."""
    return ", ".join(f"{name} {part / whole:.0%}" for name, part in seconds.items())


class _Ours:
    """Steps of `train.policy`, which `run` repeats, with its own functions."""

    def __init__(self, directory: pathlib.Path):
        from configs import grpo
        from expandr_jax.config import read_config
        from expandr_jax.objectives.policy import PolicyTrainer, policy_optimizer
        from expandr_jax.pair import GeneratorModel
        from expandr_jax.sharding import device_put_shared, make_mesh
        from expandr_jax.weights.adapter import load_adapter
        from expandr_jax.weights.trees import model_shardings

        config = read_config(grpo.get_config())
        self.settings = dataclasses.replace(
            config.grpo, loss="grpo", queries=QUERIES, samples=SAMPLES, max_new_tokens=NEW_TOKENS,
            temperature=1.0, top_p=1.0, kl_weight=0.0, accumulation=PARTS,
            learning_rate=LEARNING_RATE, warmup_steps=0, clip_norm=CLIP_NORM,
        )  # fmt: skip
        generator, params = smollm2.load(directory)
        mesh = make_mesh()
        params = device_put_shared(params, model_shardings(mesh, generator.module, params))
        self.lora, adapter = load_adapter(str(directory / "adapter"), generator.module.config)
        module = generator.module.clone(lora=self.lora)
        generator = dataclasses.replace(generator, module=module, eos_ids=(NO_EOS,))
        self._model = GeneratorModel(mesh, mesh, generator, params, params, "")
        optimizer = policy_optimizer(self.settings)
        self._trainer = PolicyTrainer(self._model, self.settings, optimizer)
        self.state = self._trainer.setup.create(adapter)
        self._rollouts = self._made_rollouts(directory, config, adapter)
        self._steps = 0

    def _made_rollouts(self, directory: pathlib.Path, config: Any, adapter: Any) -> Any:
        from rich.console import Console

        from expandr_jax.loading import make_sampler
        from expandr_jax.objectives.rollouts import Rollouts
        from expandr_jax.rewards.group import Group
        from expandr_jax.runtime.processes import Processes
        from expandr_jax.runtime.progress import Reporter

        quiet = Reporter(Console(quiet=True))
        sampler = make_sampler(self._model, config, Processes(), quiet)
        messages = {f"{i}": text for i, text in enumerate(_inputs(directory)["messages"])}

        def score(groups: Sequence[Group]) -> tuple[list[Group], dict[str, float]]:
            rewarded = [
                [dataclasses.replace(c, total=reward(c.text)) for c in group.candidates]
                for group in groups
            ]
            pairs = zip(groups, rewarded, strict=True)
            return [dataclasses.replace(group, candidates=c) for group, c in pairs], {}

        def group(query: str) -> Group:
            return Group(query, messages[query], "", "", [])

        return Rollouts(sampler, adapter, messages, group, score, self.settings)

    def learn(self, groups: Sequence[Any]) -> dict[str, Any]:
        """One update from groups, as a step of training has it."""
        import jax

        from expandr_jax.objectives.policy import pack_sampled

        pad_id, trainer = self._model.generator.pad_id, self._trainer
        packed = pack_sampled(groups, self.settings, pad_id, self._rollouts.sizes)
        kl = trainer.kl(packed)  # Training logs it, where nothing is learned of it.
        updates = trainer.batches(self.state.params, [packed])
        self.state, metrics = trainer.learn(self.state, updates, 1.0)
        jax.block_until_ready(self.state)
        return {**metrics, "kl": kl}

    def step(self) -> dict[str, float]:
        """A whole step; seconds of its parts."""
        from expandr_jax.sharding import whole

        rollout = self._rollouts.sample(self._steps, whole(self.state.params))
        lengths = {len(c.tokens) for row in rollout.groups for c in row.group.candidates}
        if lengths != {NEW_TOKENS} or not all(row.used for row in rollout.groups):
            raise ValueError(f"texts of {sorted(lengths)} tokens, or groups of equal rewards")
        begin = time.perf_counter()
        self.learn(rollout.groups)
        self._steps += 1
        update = time.perf_counter() - begin
        return {"sampling": rollout.seconds["sampling_seconds"], "update": update}

    def compared(self, directory: pathlib.Path) -> dict[str, np.ndarray]:
        """AdamW's first moments after an update from the given texts; entropy, loss, prompts."""
        import optax
        from safetensors.numpy import load_file

        from expandr_jax.weights.adapter import export_adapter

        metrics = self.learn(_given_groups(directory))
        gradient = optax.tree_utils.tree_get(self.state.opt_state, "mu")
        config = self._model.generator.module.config
        export_adapter(directory / "gradient", gradient, self.lora, config, "base")
        outputs = load_file(directory / "gradient" / "adapter_model.safetensors")
        numbers = {name: np.array(metrics[name]) for name in ("loss", "entropy")}
        return outputs | numbers | {"prompts": _flat(_inputs(directory)["prompt_ids"])}


def _given_groups(directory: pathlib.Path) -> list[Any]:
    """The texts that both sides are compared by, as if they had been sampled."""
    from expandr_jax.objectives.policy import Sampled
    from expandr_jax.rewards.group import Candidate, Group

    inputs = _inputs(directory)
    candidates = [
        Candidate(
            text, tokens=tokens, log_probs=[0.0] * NEW_TOKENS, finished="length", total=reward(text)
        )
        for text, tokens in zip(inputs["texts"], inputs["tokens"], strict=True)
    ]
    return [
        Sampled(Group("", "", "", "", candidates[row * SAMPLES : (row + 1) * SAMPLES]), prompt)
        for row, prompt in enumerate(inputs["prompt_ids"])
    ]


def _flat(prompts: Sequence[Sequence[int]]) -> np.ndarray:
    return np.concatenate([np.array([len(ids), *ids]) for ids in prompts])


def start_ours(directory: pathlib.Path) -> Running:
    """Steps with the functions of `train.policy`: sampled, rewarded, packed, learned from."""
    ours = _Ours(directory)
    outputs = ours.compared(directory)
    ours.step()  # Compiles what samples.
    return _running(ours.step, outputs, f"{PARTS} parts of {QUERIES // PARTS} prompts")


def _running(
    step: Callable[[], Mapping[str, float]], outputs: Mapping[str, np.ndarray], setting: str
) -> Running:
    """A side, whose setting tells the shares of one step more."""
    begin = time.perf_counter()
    seconds = step()
    shares = _shares(seconds, time.perf_counter() - begin)
    return Running(per_second(1, step), outputs, f"{setting}; {shares}")


class _Trl:
    """Steps of TRL's GRPOTrainer, as its own loop would make them."""

    def __init__(self, directory: pathlib.Path, micro_batch: int):
        import torch
        import transformers
        from datasets import Dataset
        from peft import LoraConfig
        from safetensors.torch import load_file
        from trl import GRPOConfig, GRPOTrainer

        path, self._parts = directory / "smollm2", TEXTS // micro_batch
        arguments = GRPOConfig(
            output_dir=str(directory / "trl"), bf16=False, gradient_checkpointing=False,
            use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
            dataloader_pin_memory=False, per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=self._parts, steps_per_generation=self._parts,
            num_generations=SAMPLES, max_completion_length=NEW_TOKENS, loss_type="grpo",
            scale_rewards="group", beta=0.0, temperature=1.0, top_p=1.0, top_k=0,
            learning_rate=LEARNING_RATE, lr_scheduler_type="constant", max_grad_norm=CLIP_NORM,
        )  # fmt: skip
        self._inputs = _inputs(directory)
        rows = [{"prompt": text} for text in self._inputs["prompts"]]
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self._trainer = trainer = GRPOTrainer(
            model,
            reward_funcs=lambda completions, **_: [reward(text) for text in completions],
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=transformers.AutoTokenizer.from_pretrained(path),
            peft_config=LoraConfig(
                r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, task_type="CAUSAL_LM",
                target_modules=["q_proj", "v_proj"],
            ),
        )  # fmt: skip
        self.parameters = {
            name.replace(".default.", "."): parameter
            for name, parameter in trainer.model.named_parameters()
            if parameter.requires_grad
        }
        with torch.no_grad():
            adapter = load_file(directory / "adapter" / "adapter_model.safetensors")
            for name, value in adapter.items():
                self.parameters[name].copy_(value)
        trainer.eos_token_ids = [NO_EOS]
        for config in (trainer.generation_config, model.generation_config):
            config.eos_token_id = None
        trainer.generation_kwargs["eos_token_id"] = None
        trainer.create_optimizer_and_scheduler(1)
        trainer.current_gradient_accumulation_steps = self._parts  # Its own loop would say so.
        trainer.model.train()
        self._batch = [row for row in rows for _ in range(SAMPLES)]
        self._generate, self._sampling = trainer._generate, 0.0

    def step(self) -> dict[str, float]:
        """A whole step; seconds of its parts."""
        begin = time.perf_counter()
        self._trainer._generate = self._timed
        self._learn()
        seconds = time.perf_counter() - begin - self._sampling
        return {"sampling": self._sampling, "update": seconds}

    def _timed(self, prompts: Sequence[str]) -> Any:
        begin = time.perf_counter()
        made = self._generate(prompts)
        self._sampling = time.perf_counter() - begin
        if {len(tokens) for tokens in made[1]} != {NEW_TOKENS}:
            raise ValueError("texts ended early")
        return made

    def _given(self, prompts: Sequence[str]) -> Any:
        """What `_generate` returns, of the texts that both sides are compared by."""
        ids = self._trainer._tokenize_prompts(prompts)[0]
        return ids, self._inputs["tokens"], None, self._inputs["texts"], None, {}, None, None

    def _learn(self) -> float:
        import torch

        trainer = self._trainer
        loss = sum(
            float(trainer.training_step(trainer.model, self._batch, None))
            for _ in range(self._parts)
        )
        torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), CLIP_NORM)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        trainer.optimizer.zero_grad()
        return loss

    def seconds_a_text(self) -> float:
        """What learning takes, in the second micro-batch."""
        trainer = self._trainer
        trainer._generate = self._given
        trainer.training_step(trainer.model, self._batch, None)
        begin = time.perf_counter()
        trainer.training_step(trainer.model, self._batch, None)
        return (time.perf_counter() - begin) * self._parts / TEXTS

    def compared(self) -> dict[str, np.ndarray]:
        """As `_Ours.compared`."""
        trainer = self._trainer
        trainer._generate = self._given
        loss = self._learn()
        moments = {
            name: trainer.optimizer.state[parameter]["exp_avg"].numpy().copy()
            for name, parameter in self.parameters.items()
        }
        prompts = trainer._tokenize_prompts(self._inputs["prompts"])[0]
        entropy = np.mean(trainer._metrics["train"]["entropy"])
        return moments | {
            "loss": np.array(loss), "entropy": entropy, "prompts": _flat(prompts)
        }  # fmt: skip


def tune_trl(directory: pathlib.Path) -> None:
    """Writes TRL's best micro-batch."""
    best = min(MICRO_BATCHES, key=lambda size: _Trl(directory, size).seconds_a_text())
    (directory / "micro_batch.json").write_text(json.dumps(best))


def start_trl(directory: pathlib.Path) -> Running:
    """TRL's training steps, as many as an update has, and its optimizer's."""
    micro_batch = json.loads((directory / "micro_batch.json").read_text())
    trl = _Trl(directory, micro_batch)
    outputs = trl.compared()
    return _running(trl.step, outputs, f"micro-batches of {micro_batch}")


def check(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> str:
    """Prompts are the same; entropies, losses and AdamW's first moments are equal.

    The moments are 0.1 times the clipped gradient. The loss of texts of one length is nearly 0.
    """
    if not np.array_equal(ours["prompts"], theirs["prompts"]):
        raise Different("the prompts' ids differ")
    said = [
        check_close(ours[name], theirs[name], TOLERANCE, what)
        for name, what in (("loss", "losses"), ("entropy", "entropies"))
    ]
    names = sorted(theirs.keys() - {"loss", "entropy", "prompts"})
    flat = [np.concatenate([side[name].ravel() for name in names]) for side in (ours, theirs)]
    largest = np.abs(flat[1]).max()
    said.append(check_close(*(x / largest for x in flat), TOLERANCE, "gradients"))
    return ", ".join(said)


def flops(directory: pathlib.Path) -> float:
    """Operations of a step: prompts and texts once in sampling, and an update, backward too.

    The backward pass has no gradients of the frozen weights. Attention is left out.
    """
    from expandr_jax.training.flops import FROZEN, forward_flops

    generator, params = smollm2.load(directory)
    texts = TEXTS * NEW_TOKENS
    tokens = sum(map(len, _inputs(directory)["prompt_ids"])) + texts
    forward = forward_flops(generator.module, params, 1, tokens, keys=0, logits=texts)
    return (1 + FROZEN) * forward


ROWS = (
    Comparison(
        name="grpo",
        unit="steps/s",
        peer_name="trl",
        packages=("trl", "torch", "peft", "transformers"),
        ours=start_ours,
        peer=start_trl,
        check=check,
        tune=tune_trl,
        flops=flops,
    ),
)
