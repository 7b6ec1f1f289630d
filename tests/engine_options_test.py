"""What an engine can be asked for beside plain texts, and what it refuses."""

import dataclasses
import random

import jax
import jax.numpy as jnp
import pytest
import torch

from eval import tiny_models
from expandr_jax.errors import NotFiniteError, UserError
from expandr_jax.generation.engine import Engine
from expandr_jax.generation.requests import Extent, Request, common_prefix
from expandr_jax.models.lora import init_lora, merge_lora
from expandr_jax.sharding import make_mesh
from tests.engine_test import (
    EOS,
    SETTINGS,
    assert_equal_up_to_near_ties,
    make_requests,
    random_decoder,
    run,
)
from tests.load_model import load_model


@pytest.fixture(scope="module")
def tiny():
    return random_decoder(37, 2.5)


PREFIX = (7, 31, 12, 5, 9)


@pytest.mark.parametrize("axes", [None, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_a_prefix_that_is_run_once_changes_no_text(tiny, axes):
    """One of the prompts adds a single token; the repetition penalty counts the prefix's too."""
    requests = make_requests(repetition_penalty=1.3)
    requests.append(dataclasses.replace(requests[0], id="short", prompt=(21,)))
    requests = [dataclasses.replace(r, prompt=PREFIX + r.prompt) for r in requests]
    options = {"slots": 16, "repetition_penalty": True}
    expected = run(tiny, requests, **{**options, "prompt_buckets": (24,)})
    mesh = None if axes is None else make_mesh(**axes)
    found = run(tiny, requests, prefix=PREFIX, mesh=mesh, **options)
    assert_equal_up_to_near_ties(found, expected)


def test_common_prefix_leaves_each_prompt_a_token():
    assert common_prefix([]) == ()
    assert common_prefix([(4, 5, 6)]) == (4, 5)
    assert common_prefix([(4, 5, 6, 7), (4, 5), (4, 5, 9)]) == (4,)
    assert common_prefix([(4, 5, 6, 7), (4, 5, 6, 8, 1), (4, 5, 6, 7, 7)]) == (4, 5, 6)
    assert common_prefix([(4, 5), (5, 4)]) == ()


def test_what_an_engine_must_know_is_the_same_of_all_requests_and_of_shares():
    draw = random.Random(0)
    for _ in range(20):
        prompts = [
            (7,) * draw.randint(1, 3) + tuple(draw.choices((7, 8), k=draw.randint(1, 4)))
            for _ in range(9)
        ]
        requests = [
            Request("q", i, prompt, 1.0, 1.0, draw.randint(1, 9), repetition_penalty=1 + i // 8)
            for i, prompt in enumerate(prompts)
        ]
        whole = Extent.of(iter(requests))
        shares = [Extent.of(requests[i::4]) for i in range(4)] + [Extent.of([])]
        assert Extent.joined(shares) == whole
        assert whole.prefix == common_prefix(prompts)
        assert (whole.count, whole.penalty) == (9, True)
        assert whole.most == max(request.max_new_tokens for request in requests)
        assert (whole.shortest, whole.longest) == (min(map(len, prompts)), max(map(len, prompts)))


def test_stop_strings_cut_the_same_place_however_often_we_look(tiny):
    expected = run(tiny, make_requests())
    letters = "".join(chr(ord("a") + i % 26) for i in range(37))

    def text(ids):
        return "".join(letters[i] for i in ids if i != EOS)

    stop = sorted({text(c.tokens)[3:5] for c in expected.values() if len(c.tokens) > 5})[:3]
    requests = make_requests()
    found = run(tiny, requests, stop=stop, decode=text, steps_per_call=1)
    assert run(tiny, requests, stop=stop, decode=text) == found
    assert {c.finished for c in found.values()} == {"eos", "length", "stop"}
    for key, completion in found.items():
        whole = text(expected[key].tokens)
        places = [whole.find(s) for s in stop if s in whole]
        assert completion.text == whole[: min(places, default=None)]
        assert completion.tokens == expected[key].tokens[: len(completion.tokens)]
        assert (completion.finished == "stop") == bool(places)
        assert any(s in text(completion.tokens) for s in stop) == bool(places)
        assert not any(s in text(completion.tokens[:-1]) for s in stop)


def test_repetition_penalty_equals_transformers(tmp_path):
    reference = tiny_models.torch_model("qwen2", head=True)
    reference.save_pretrained(tmp_path)
    module, params, _ = load_model(str(tmp_path))
    requests = [
        dataclasses.replace(r, temperature=0.0, repetition_penalty=p, max_new_tokens=10)
        for r, p in zip(make_requests(4, 1), (1.0, 1.2, 1.5, 3.0), strict=True)
    ]
    found = run((module, params), requests, slots=2, repetition_penalty=True)
    for request in requests:
        theirs = reference.generate(
            torch.tensor([request.prompt]),
            do_sample=False,
            max_new_tokens=10,
            eos_token_id=EOS,
            repetition_penalty=request.repetition_penalty,
        )
        assert found[request.id, 0].tokens == tuple(theirs[0, len(request.prompt) :].tolist())


def test_an_adapter_changes_texts_as_its_merged_form_does(tiny):
    module, params = tiny
    adapter = init_lora(jax.random.key(1), params, module.lora)
    adapter = jax.tree.map(lambda x: x + 0.05, adapter)
    requests = [r for r in make_requests() if r.temperature == 0]
    merged = run((module, merge_lora(params, adapter, module.lora)), requests)
    assert_equal_up_to_near_ties(run(tiny, requests, adapter=adapter), merged)
    assert run(tiny, requests) != merged


def test_half_precision_weights_are_cast_once_and_run(tiny):
    module, params = tiny
    engine = Engine(module.clone(dtype=jnp.bfloat16), params, slots=8, **SETTINGS)
    kernels = engine._variables["params"]["layer_0"]["mlp"]
    assert kernels["up_proj"]["kernel"].dtype == jnp.bfloat16
    assert len(list(engine.generate(make_requests(3)))) == 12


def test_damaged_weights_are_told_by_the_request_that_meets_them(tiny):
    module, params = tiny
    damaged = {**params, "embedding": params["embedding"].at[36].set(jnp.nan)}
    first, *others = make_requests(3)
    bad = dataclasses.replace(first, id="the bad one", prompt=(5, 36))
    with pytest.raises(NotFiniteError, match="'the bad one': the generator's logits are not fin"):
        run((module, damaged), [bad, *others])


def test_the_plan_counts_the_cache_to_the_byte(tiny):
    for mesh, devices in ((None, 1), (make_mesh(data=4, tensor=2), 8)):
        engine = Engine(*tiny, slots=16, mesh=mesh, repetition_penalty=True, **SETTINGS)
        slots = engine._programs.empty(None)
        cache = sum(x.nbytes for x in (*slots.cache.keys, *slots.cache.values)) // devices
        seen = slots.seen.nbytes // min(devices, 4)
        assert engine.memory["slots"] == cache + seen


@pytest.mark.parametrize(
    ("options", "request_options", "message"),
    [
        ({"memory_limit_bytes": 100_000}, {}, "sampling needs 0.000"),
        ({"slots": 4, "mesh": True}, {}, "4 slots cannot be split over 8 devices"),
        ({}, {"prompt": (5,) * 17}, "the prompt has 17 tokens; the largest bucket holds 16"),
        ({"prefix": (9, 9)}, {}, "does not go on from the engine's prefix of 2 tokens"),
        ({"prefix": (3, 4)}, {"prompt": (3, 4)}, "does not go on from the engine's prefix"),
        ({}, {"max_new_tokens": 13}, "max_new_tokens is 13; the engine was made for 12"),
        ({}, {"repetition_penalty": 1.1}, "has a repetition penalty"),
        ({}, {"top_p": 0.0}, "top_p is 0.0; expected above 0 and at most 1"),
        ({}, {"temperature": -1.0}, "temperature is -1.0"),
        ({}, {"prompt": ()}, "prompt is (); expected at least one token"),
    ],
)
def test_mistakes_are_named(tiny, options, request_options, message):
    options = {"slots": 8, **SETTINGS, **options}
    if "mesh" in options:
        options["mesh"] = make_mesh(data=8)

    def generate():
        request = dataclasses.replace(make_requests(1, 1)[0], **request_options)
        return list(Engine(*tiny, **options).generate([request]))

    with pytest.raises(UserError) as error:
        generate()
    assert message in str(error.value)
