"""SmolLM2's greedy text, by cached decoding, against transformers' token for token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from expandr_jax.models.decoder import KVCache, unstack_layers
from expandr_jax.weights.source import locate
from tests import conftest

LENGTH, PROMPTS = 64, 50
NEAR = 1e-3  # Two logits this near may change places by rounding alone.
SUBJECTS = ("an array", "a list", "a matrix", "the Fourier transform", "a random number")
QUESTIONS = (
    "How do I sort {}?",
    "What is {}, in one sentence?",
    "Write a short poem about {}.",
    "Name three uses of {} in science.",
    "Explain {} to a child.",
    "Give an example of {} in Python.",
    "Who first wrote about {}?",
    "Why does {} matter?",
    "Compare {} and a number, please.",
    "Finish this: the best thing about {} is",
)


def greedy(generator, params, prompts):
    """Greedy tokens [prompts, LENGTH] and, for each, how far the second best logit was."""
    module, params = generator.module.clone(unroll=True), unstack_layers(params)
    lengths = np.array([len(prompt) for prompt in prompts])
    fed = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in enumerate(prompts):
        fed[row, : len(prompt)] = prompt
    steps = int(lengths.max()) + LENGTH - 1
    cache = KVCache.zeros(module.config, len(prompts), steps, jnp.float32)

    @jax.jit
    def step(params, cache, token):
        hidden, cache = module.apply({"params": params}, token, cache, method="decode")
        logits = module.apply({"params": params}, hidden, method="logits")
        best, ids = jax.lax.top_k(logits, 2)
        return ids[:, 0], best[:, 0] - best[:, 1], cache

    chosen, gaps = (np.zeros((len(prompts), steps), kind) for kind in (np.int32, np.float32))
    token = fed[:, 0]
    for t in range(steps):
        ids, gap, cache = step(params, cache, jnp.asarray(token))
        chosen[:, t], gaps[:, t] = ids, gap
        if t + 1 < steps:
            prompted = fed[:, min(t + 1, fed.shape[1] - 1)]
            token = np.where(t + 1 < lengths, prompted, chosen[:, t])
    place = lengths[:, None] - 1 + np.arange(LENGTH)
    rows = np.arange(len(prompts))[:, None]
    return chosen[rows, place], gaps[rows, place]


@pytest.mark.slow
def test_smollm2_greedy_text_equals_transformers_up_to_the_first_near_tie(smollm2, capsys):
    generator, params = smollm2
    texts = [question.format(subject) for question in QUESTIONS for subject in SUBJECTS]
    prompts = [generator.chat_ids(text, 200)[0] for text in texts]
    assert len(prompts) == PROMPTS
    path = locate(conftest.SMOLLM2)
    reference = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
    width = max(map(len, prompts))
    ids = torch.tensor([[generator.pad_id] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    with torch.no_grad():
        theirs = (
            reference.eval()
            .generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=LENGTH,
                pad_token_id=generator.pad_id,
            )[:, width:]
            .numpy()
        )
    ours, gaps = greedy(generator, params, prompts)
    whole, ties, compared = 0, 0, 0
    for row in range(PROMPTS):
        ends = np.flatnonzero(np.isin(theirs[row], generator.eos_ids))
        length = ends[0] + 1 if len(ends) else theirs.shape[1]
        same = ours[row, :length] == theirs[row, :length]
        first = length if same.all() else int(np.argmin(same))
        compared += first
        whole += first == length
        if first < length:
            ties += 1
            assert gaps[row, first] < NEAR, (texts[row], first, gaps[row, first])
    with capsys.disabled():
        print(
            f"\ngreedy text of SmolLM2: {whole} of {PROMPTS} prompts whole, {ties} up to a "
            f"near-tie; {compared} tokens equal, smallest gap {gaps.min():.1e}"
        )
