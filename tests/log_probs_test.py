"""Log-probabilities of sampled tokens: those of a full pass, whatever was filtered; draws stay."""

import dataclasses
import functools

import numpy as np
import pytest
import scipy.special
import torch
from rich.console import Console

from configs import smoke
from eval import tiny_models
from expandr_jax.config import read_config
from expandr_jax.expansion.sampled import sample_journal
from expandr_jax.generation.engine import Engine
from expandr_jax.generation.requests import Request
from expandr_jax.loading import load_generator_model, make_sampler
from expandr_jax.runtime.processes import Processes
from expandr_jax.runtime.progress import Reporter
from expandr_jax.sharding import make_mesh
from tests.engine_test import SETTINGS, make_requests, next_logits, random_decoder, run
from tests.load_model import load_model

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def tiny():
    return random_decoder(37, 2.5)


def assert_log_probs(completion, request, logits_of):
    """They are those of the softmax over the whole vocabulary at the request's temperature."""
    assert len(completion.log_probs) == len(completion.tokens)
    for i, (token, found) in enumerate(zip(completion.tokens, completion.log_probs, strict=True)):
        logits = np.asarray(logits_of(request.prompt + completion.tokens[:i]), np.float64).ravel()
        expected = scipy.special.log_softmax(logits / (request.temperature or 1.0))[token]
        assert found == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"min_p": 0.3}, {"repetition_penalty": 1.3}])
def test_they_are_of_the_full_softmax_at_the_request_s_temperature(tiny, options):
    requests = make_requests(6, **options)
    penalize = "repetition_penalty" in options
    without = run(tiny, requests, repetition_penalty=penalize)
    found = run(tiny, requests, repetition_penalty=penalize, log_probs=True)
    for request in requests:
        completion = found[request.id, request.sample]
        assert_log_probs(completion, request, functools.partial(next_logits, tiny))
        # The draws are those of an engine that keeps nothing.
        plain = without[request.id, request.sample]
        assert plain == dataclasses.replace(completion, log_probs=None)


def test_on_a_mesh_and_up_to_a_stop_string(tiny):
    requests = make_requests(6)
    alone = run(tiny, requests, log_probs=True)
    spread = run(tiny, requests, log_probs=True, mesh=make_mesh(2, 2, 2))
    stopped = run(
        tiny, requests, log_probs=True, stop=("7",),
        decode=lambda tokens: " ".join(map(str, tokens)),
    )  # fmt: skip
    for request in requests:
        logits_of = functools.partial(next_logits, tiny)
        assert_log_probs(spread[request.id, request.sample], request, logits_of)
    for key, completion in alone.items():
        count = len(stopped[key].tokens)
        assert stopped[key].tokens == completion.tokens[:count]
        assert len(stopped[key].log_probs) == count
    assert any(c.finished == "stop" for c in stopped.values())


def test_they_are_transformers_own(tmp_path):
    peer = tiny_models.torch_model("llama-3.2", head=True)
    peer.save_pretrained(tmp_path)
    module, params, _ = load_model(str(tmp_path))
    requests = [Request("q", i, (5, 6, 7, 8), t, 0.9, 6) for i, t in enumerate((0.0, 0.7, 1.0))]
    settings = {**SETTINGS, "prompt_buckets": (8,)}
    engine = Engine(module, params, slots=4, log_probs=True, **settings)

    def logits_of(tokens):
        with torch.inference_mode():
            return peer(torch.tensor([tokens])).logits[0, -1]

    for completion in engine.generate(requests):
        assert_log_probs(completion, requests[completion.sample], logits_of)


def test_a_journal_keeps_ids_and_log_probabilities_where_they_are_asked_for(tmp_path):
    config = read_config(smoke.get_config())
    models = load_generator_model(config)
    plain = make_sampler(models, config, Processes(), Reporter(Console(quiet=True)), tmp_path)
    requests = [Request(f"q{i}", 0, f"shape {i}?", 1.0, 0.9, 8) for i in range(3)]
    rows = {}
    for name, sampler in (
        ("plain", plain), ("asked", dataclasses.replace(plain, log_probs=True)),
    ):  # fmt: skip
        path = tmp_path / f"{name}.jsonl"
        rows[name] = [*sample_journal(sampler, None, requests, path=path, purpose="test")]
        again = sample_journal(sampler, None, requests, path=path, purpose="test")
        assert [*again] == rows[name]
    for kept, row in zip(rows["plain"], rows["asked"], strict=True):
        ids, log_probs = row.pop("token_ids"), row.pop("log_probs")
        assert row == kept
        assert len(ids) == len(log_probs) == row["tokens"]
        assert models.generator.decode(ids) == row["text"]
        assert all(value <= 0 for value in log_probs)
