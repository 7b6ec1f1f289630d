"""Sampling: 16 prompts, 32 candidates of each, 64 tokens a candidate, top-p 0.9, in float32.

No candidate ends early on either side. transformers takes the batch size that is its quickest,
found in a process of its own, so that the sizes that are not taken cost its peak memory nothing.
A turn does a part of the work, from the prompts to the last token: the candidates that are sampled
at once; the next turn goes on with the next part.
"""

import itertools
import json
import pathlib
from collections.abc import Callable, Mapping

import numpy as np

from eval.benchmarks import Comparison, Different, Running, per_second, smollm2

CANDIDATES = 32
NEW_TOKENS = 64
TOP_P = 0.9
SLOTS = 128  # As in configs/base.py.
CHECKED_TOKENS = 16  # Greedy ones of each prompt, compared before anything is timed.
BATCHES = (16, 32, 64, 128, 256, 512)  # transformers tries each, with all its tokens.
NO_EOS = -1  # No token ends a text.


def prepare(directory: pathlib.Path) -> None:
    """Writes the model and the prompts' ids."""
    from expandr_jax.expansion.prompts import PROMPTS

    smollm2.export(directory)
    generator, _ = smollm2.load(directory)
    messages = [PROMPTS["q2d"].message(text) for text in smollm2.QUESTIONS]
    prompts = [generator.chat_ids(message, 256)[0] for message in messages]
    (directory / "prompts.json").write_text(json.dumps(prompts))


def _prompts(directory: pathlib.Path) -> list[list[int]]:
    return json.loads((directory / "prompts.json").read_text())


def start_ours(directory: pathlib.Path) -> Running:
    """The engine, its slots filled with all candidates in turn."""
    from expandr_jax.generation.engine import Engine
    from expandr_jax.generation.requests import Request, common_prefix
    from expandr_jax.sharding import make_mesh

    prompts = [tuple(prompt) for prompt in _prompts(directory)]
    prefix = common_prefix(prompts)
    generator, params = smollm2.load(directory)
    engine = Engine(
        generator.module,
        params,
        slots=SLOTS,
        prompt_buckets=(max(map(len, prompts)) - len(prefix),),
        max_new_tokens=NEW_TOKENS,
        eos_ids=(NO_EOS,),
        pad_id=generator.pad_id,
        seed=0,
        prefix=prefix,
        mesh=make_mesh(),
    )

    def requests(samples: int, tokens: int, temperature: float) -> list[Request]:
        return [
            Request(f"{number}", sample, prompt, temperature, TOP_P, tokens)
            for number, prompt in enumerate(prompts)
            for sample in range(samples)
        ]

    texts = requests(CANDIDATES, NEW_TOKENS, 1.0)
    parts = itertools.cycle(texts[first : first + SLOTS] for first in range(0, len(texts), SLOTS))

    greedy = {c.id: c for c in engine.generate(requests(1, CHECKED_TOKENS, 0.0))}
    clear = [greedy[f"{n}"].first_near_tie for n in range(len(prompts))]
    outputs = {
        "tokens": np.array([greedy[f"{n}"].tokens for n in range(len(prompts))]),
        "clear": np.array([CHECKED_TOKENS if first is None else first for first in clear]),
    }

    run = per_second(SLOTS * NEW_TOKENS, lambda: list(engine.generate(next(parts))))
    return Running(run, outputs, f"{SLOTS} slots")


def _transformers(
    directory: pathlib.Path,
) -> tuple[np.ndarray, list[list[int]], Callable[[list[list[int]]], float]]:
    """Greedy tokens by transformers, a prompt for each candidate, and how quick a batch is.

    The latter takes prompts, pads them on the left, and gives tokens sampled a second.
    """
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory / "smollm2", dtype=torch.float32
    )
    model.eval()
    pad_id = model.generation_config.pad_token_id

    def generate(rows: list[list[int]], tokens: int, **settings) -> np.ndarray:
        width = max(map(len, rows))
        ids = torch.tensor([[pad_id] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        config = transformers.GenerationConfig(
            max_new_tokens=tokens, eos_token_id=None, pad_token_id=pad_id, **settings
        )
        with torch.inference_mode():
            new = model.generate(ids, attention_mask=mask, generation_config=config)
        return new[:, width:].numpy()

    def rate(rows: list[list[int]]) -> float:
        settings = {"do_sample": True, "temperature": 1.0, "top_p": TOP_P, "top_k": 0}
        return per_second(len(rows) * NEW_TOKENS, lambda: generate(rows, NEW_TOKENS, **settings))()

    prompts = _prompts(directory)
    greedy = generate(prompts, CHECKED_TOKENS, do_sample=False)  # The first call is slower.
    return greedy, [prompt for prompt in prompts for _ in range(CANDIDATES)], rate


def tune_transformers(directory: pathlib.Path) -> None:
    """Writes transformers' best batch size."""
    _, rows, rate = _transformers(directory)
    best = max(BATCHES, key=lambda size: rate(rows[:size]))
    (directory / "batch.json").write_text(json.dumps(best))


def start_transformers(directory: pathlib.Path) -> Running:
    """`generate` of transformers, at its best batch size."""
    greedy, rows, rate = _transformers(directory)
    best = json.loads((directory / "batch.json").read_text())
    parts = itertools.cycle(rows[first : first + best] for first in range(0, len(rows), best))
    return Running(lambda: rate(next(parts)), {"tokens": greedy}, f"batch {best}")


def check(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> str:
    """Greedy texts are the same, each up to its first near tie."""
    before = np.arange(CHECKED_TOKENS) < ours["clear"][:, None]
    differ = before & (ours["tokens"] != theirs["tokens"])
    if differ.any():
        texts = f"{differ.any(axis=1).sum()} of {len(differ)} texts"
        raise Different(f"greedy tokens differ in {texts}")
    return f"{before.sum()} of {before.size} greedy tokens equal, the others after a near tie"


def flops(directory: pathlib.Path) -> float:
    """Operations of a sampled token: products of layers and head, attention to earlier tokens."""
    from expandr_jax.training.flops import forward_flops

    generator, params = smollm2.load(directory)
    return forward_flops(generator.module, params, 1, 1, keys=_attended(directory), logits=1)


def read_bytes(directory: pathlib.Path) -> float:
    """Bytes read for a sampled token: its share of the weights, keys and values before it."""
    import jax

    generator, params = smollm2.load(directory)
    config = generator.module.config
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    kept = 2 * config.num_layers * config.num_kv_heads * config.head_dim * _attended(directory)
    return weights / SLOTS + 4 * kept


def _attended(directory: pathlib.Path) -> float:
    """How many tokens one attends to on average."""
    return float(np.mean([len(prompt) for prompt in _prompts(directory)])) + NEW_TOKENS / 2


ROWS = (
    Comparison(
        name="sampling",
        unit="tokens/s",
        peer_name="transformers",
        packages=("transformers", "torch"),
        ours=start_ours,
        peer=start_transformers,
        check=check,
        tune=tune_transformers,
        flops=flops,
        bytes=read_bytes,
    ),
)
