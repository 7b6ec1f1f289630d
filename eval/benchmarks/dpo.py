"""One optimizer step of DPO: SmolLM2, LoRA of rank 8 on q and v, 8 pairs of 256 tokens, float32.

The prompt has 64 of the tokens, each response 192. TRL runs without gradient checkpointing and
bf16, once with the reference's log-probabilities made in the step, its default, and once with them
made before. Here they are always made before, once for all passes over the pairs, and kept with
them. Dropout is off on both sides, so that one gradient can be compared with the other.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping

import numpy as np

from eval.benchmarks import Comparison, Running, check_close, per_second, smollm2

PAIRS = 8
PROMPT, RESPONSE = 64, 192
MICRO_BATCH = 2  # Pairs whose activations our side has in memory at once.
RANK, ALPHA = 8, 32.0
BETA, CLIP_NORM, LEARNING_RATE = 0.1, 10.0, 2e-5
STEPS = 1000  # Length of the learning rate's schedule.
TOLERANCE = 1e-4


def prepare(directory: pathlib.Path) -> None:
    """Writes the model, an adapter that is not zero, and the pairs' ids."""
    import jax

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
    text = "\n".join(getattr(np, name).__doc__ or "" for name in sorted(np.__all__))
    ids = generator.tokenizer(text, add_special_tokens=False)["input_ids"]
    pairs = []
    for _ in range(PAIRS):
        pair = []
        for length in (PROMPT, RESPONSE, RESPONSE):
            pair.append(ids[:length])
            ids = ids[length:]
        for response in pair[1:]:
            response[-1] = generator.end_id
        pairs.append(pair)
    (directory / "pairs.json").write_text(json.dumps(pairs))


def _pairs(directory: pathlib.Path) -> list[list[list[int]]]:
    return json.loads((directory / "pairs.json").read_text())


def start_ours(directory: pathlib.Path) -> Running:
    """`train.generator`'s program on packed pairs, an update for each 8 of them."""
    import jax
    import optax
    from safetensors.numpy import load_file

    from expandr_jax.objectives.adapter import AdapterBatches, adapter_setup
    from expandr_jax.objectives.objective import ObjectiveSettings
    from expandr_jax.objectives.packing import Example
    from expandr_jax.objectives.registry import OBJECTIVES
    from expandr_jax.pair import GeneratorModel
    from expandr_jax.sharding import device_put_shared, make_mesh
    from expandr_jax.training.train_state import make_optimizer
    from expandr_jax.weights.adapter import export_adapter, load_adapter
    from expandr_jax.weights.trees import model_shardings

    generator, params = smollm2.load(directory)
    mesh = make_mesh()
    params = device_put_shared(params, model_shardings(mesh, generator.module, params))
    lora, adapter = load_adapter(str(directory / "adapter"), generator.module.config)
    generator = dataclasses.replace(generator, module=generator.module.clone(lora=lora))
    model = GeneratorModel(mesh, mesh, generator, params, params, "")
    objective, settings = OBJECTIVES["sigmoid"], ObjectiveSettings(beta=BETA)
    pairs = [Example(prompt, responses) for prompt, *responses in _pairs(directory)]
    micro_batches = np.arange(PAIRS).reshape(-1, MICRO_BATCH)
    packed = AdapterBatches(model, objective, settings, MICRO_BATCH)
    packed.choose_sizes(pairs, micro_batches)
    reference = packed.reference(pairs)
    batches = [packed.pack(pairs, indices, reference) for indices in micro_batches]
    optimizer = make_optimizer(
        LEARNING_RATE, STEPS, clip_norm=CLIP_NORM, accumulation=len(micro_batches)
    )
    setup = adapter_setup(model, objective, settings, optimizer)
    state = setup.create(adapter)

    def update() -> float:
        nonlocal state
        losses = []
        for batch in batches:
            state, metrics = setup.step(state, params, batch, jax.random.key(0))
            losses.append(metrics["loss"])
        return float(np.mean(jax.device_get(losses)))

    loss = update()
    gradient = optax.tree_utils.tree_get(state.opt_state, "mu")
    export_adapter(directory / "gradient", gradient, lora, generator.module.config, "base")
    outputs = load_file(directory / "gradient" / "adapter_model.safetensors")
    outputs["loss"] = np.array(loss)
    return Running(per_second(PAIRS, update), outputs, f"micro-batches of {MICRO_BATCH}")


def start_trl(directory: pathlib.Path, precompute: bool) -> Running:
    """The training step of TRL's DPOTrainer, then the optimizer's.

    The reference's log-probabilities are made before, or in each step, as TRL has it by default.
    """
    import torch
    import transformers
    from datasets import Dataset
    from peft import LoraConfig
    from safetensors.torch import load_file
    from trl import DPOConfig, DPOTrainer

    path = directory / "smollm2"
    arguments = DPOConfig(
        output_dir=str(directory / "trl"), bf16=False, gradient_checkpointing=False, use_cpu=True,
        report_to=[], beta=BETA, max_length=PROMPT + RESPONSE, save_strategy="no",
        disable_tqdm=True, per_device_train_batch_size=PAIRS, learning_rate=LEARNING_RATE,
        max_grad_norm=CLIP_NORM, lr_scheduler_type="linear", warmup_steps=0,
        dataloader_pin_memory=False,
    )  # fmt: skip
    # The trainer wants a set of texts; the pairs are handed to its collator as ids below.
    texts = Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}])
    trainer = DPOTrainer(
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        args=arguments,
        train_dataset=texts,
        processing_class=transformers.AutoTokenizer.from_pretrained(path),
        peft_config=LoraConfig(
            r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, task_type="CAUSAL_LM",
            target_modules=["q_proj", "v_proj"],
        ),
    )  # fmt: skip
    parameters = {
        name.replace(".default.", "."): parameter
        for name, parameter in trainer.model.named_parameters()
        if parameter.requires_grad
    }
    with torch.no_grad():
        for name, value in load_file(directory / "adapter" / "adapter_model.safetensors").items():
            parameters[name].copy_(value)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    batch = trainer.data_collator(
        [dict(zip(names, pair, strict=True)) for pair in _pairs(directory)]
    )
    if precompute:
        with torch.no_grad():
            chosen, rejected = trainer.compute_ref_log_probs(trainer.model, dict(batch))
        batch |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        trainer.precompute_ref_logps = True
    trainer.create_optimizer_and_scheduler(STEPS)
    trainer.current_gradient_accumulation_steps = 1  # Its own loop would say so.

    def update() -> float:
        loss = trainer.training_step(trainer.model, dict(batch))
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), CLIP_NORM)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        trainer.optimizer.zero_grad()
        return float(loss)

    loss = update()
    outputs = {
        name: trainer.optimizer.state[parameter]["exp_avg"].numpy().copy()
        for name, parameter in parameters.items()
    }

    return Running(per_second(PAIRS, update), {"loss": np.array(loss), **outputs})


def check(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> str:
    """Losses are equal, and so are the first moments of AdamW: 0.1 times the clipped gradient."""
    said = check_close(ours["loss"], theirs["loss"], TOLERANCE, "losses")
    names = sorted(theirs.keys() - {"loss"})
    flat = [np.concatenate([side[name].ravel() for name in names]) for side in (ours, theirs)]
    largest = np.abs(flat[1]).max()
    return f"{said}, {check_close(*(x / largest for x in flat), TOLERANCE, 'gradients')}"


def flops(directory: pathlib.Path) -> float:
    """Operations of a pair: its tokens in the layers, its responses in the head, and backward.

    The backward pass has no gradients of the frozen weights. Attention is left out.
    """
    from expandr_jax.training.flops import FROZEN, forward_flops

    generator, params = smollm2.load(directory)
    tokens, learned = PROMPT + 2 * RESPONSE, 2 * RESPONSE
    return FROZEN * forward_flops(generator.module, params, 1, tokens, keys=0, logits=learned)


ROWS = tuple(
    Comparison(
        name=name,
        unit="pairs/s",
        peer_name="trl",
        packages=("trl", "torch", "peft", "transformers"),
        ours=start_ours,
        peer=functools.partial(start_trl, precompute=precompute),
        check=check,
        flops=flops,
    )
    for name, precompute in (("dpo", False), ("dpo, reference made before", True))
)
