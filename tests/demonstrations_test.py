"""Prompts with examples: what they show, which are kept, and what is learned without them."""

import dataclasses
import json

import numpy as np
import pytest

from expandr_jax.expansion.demonstrations import (
    Demonstration,
    best_draws,
    draw_examples,
    message_with_examples,
)
from expandr_jax.expansion.expand import Expander
from expandr_jax.expansion.strategies import STRATEGIES
from expandr_jax.files.records import read_jsonl
from expandr_jax.generation.requests import Request, Requests
from tests.commands import finish, start, step_metrics
from tests.rewrite_run_test import collection  # noqa: F401

PROMPT = STRATEGIES["rewrite"].asks[-1].prompt
POOL = [Demonstration(f"q{i}", f"query {i}", f"text {i}") for i in range(5)]


def test_a_message_shows_examples_as_they_would_be_asked_and_answered():
    def message(examples, query="q9", fits=lambda _: True):
        return message_with_examples(PROMPT, examples, query, "asked", fits)

    assert message([]) == PROMPT.message("asked")
    assert message(POOL[:2]) == "\n\n".join(
        [
            PROMPT.message("query 0") + " text 0",
            PROMPT.message("query 1") + " text 1",
            PROMPT.message("asked"),
        ]
    )
    assert message(POOL[:2], query="q0") == message(POOL[1:2])  # It is not shown its own text.
    short = message(POOL[1:2])
    assert message(POOL[:2], fits=lambda text: len(text) <= len(short)) == short
    assert message(POOL[:2], fits=lambda _: False) == message([])


def test_draws_differ_and_begin_alike_however_many_there_are():
    draws = draw_examples(POOL, 3, 20, seed=1)
    assert len({*draws}) == len(draws) > 10
    assert all(len({*draw}) == 3 for draw in draws)
    assert draw_examples(POOL, 3, 5, seed=1) == draws[: len(draw_examples(POOL, 3, 5, seed=1))]
    assert draw_examples(POOL[:1], 3, 5, seed=1) == [(POOL[0],)]  # There are no more.


def test_the_prompts_that_are_best_on_dev_are_kept():
    rewards = np.array([[0.0, 1.0, 0.5, 1.0], [0.5, 0.0, 0.5, 0.0]])  # Means: .25 .5 .5 .5
    assert best_draws(rewards, 2) == [1, 2]
    assert best_draws(rewards, 9) == [1, 2, 3, 0]


def test_a_query_s_texts_are_divided_among_the_prompts():
    class Sampler:
        def fits(self, _):
            return True

    examples = ((POOL[0],), (POOL[1],))
    expander = Expander(STRATEGIES["rewrite"], Sampler(), None, 100, None, {}, examples)
    plain = Requests(["q"], [5], lambda q: [Request(q, i, "-", 1.0, 1.0, 8) for i in range(5)])
    shown = expander.shown({"q": "asked"}, plain)
    assert len(shown) == 5
    prompts = [request.prompt for request in shown.make("q")]
    texts = [0, 0, 0, 1, 1]  # Those of one prompt follow one another.
    for prompt, number in zip(prompts, texts, strict=True):
        assert f"text {number}" in prompt
        assert prompt.endswith(PROMPT.message("asked"))
    without = dataclasses.replace(expander, examples=())
    assert without.shown({"q": "asked"}, plain) is plain


@pytest.mark.slow
def test_what_is_learned_has_no_examples_in_its_prompt(collection, tmp_path):  # noqa: F811
    settings = {
        "data.kind": "beir", "data.path": str(collection), "expansion.strategy": "rewrite",
        "contrastive.query_weight": 0.0, "reward.query_weight": 0.0,
        "evaluation.query_weights": "(0.0,)", "warm_start": "best",
        "contrastive.batch_size": 2, "contrastive.epochs": 1.0,
        "reward.positive": 0.0, "reward.answer": 0.0, "reward.corpus": 1.0,
        "reward.corpus_measure": "average_precision", "reward.threshold": -2.0,
        "demonstrations.prompts": 2, "demonstrations.examples": 2, "demonstrations.draws": 4,
        "candidates.temperatures": "(1.0,)", "candidates.per_temperature": 4,
        "generator.prompt_buckets": "(96,512)", "dpo.loss": "ipo", "dpo.reference": "start",
        "lora.dropout": 0.0,
        "evaluation.systems": "('zero-shot','expandr')",
    }  # fmt: skip
    overrides = [f"--config.{name}={value}" for name, value in settings.items()]
    run = tmp_path / "run"
    finish(start(run, *overrides))
    prompts = [row for _, row in read_jsonl(run / "demonstrations" / "prompts.jsonl", {})]
    rewards = [row["dev_reward"] for row in prompts]
    assert rewards == sorted(rewards, reverse=True)
    assert [row["chosen"] for row in prompts] == [True] * 2 + [False] * (len(prompts) - 2)
    plain, shown = (
        {row["query_id"]: [c["text"] for c in row["candidates"]] for _, row in read_jsonl(path, {})}
        for path in (run / place / "candidates.jsonl" for place in ("demonstrations", "warm-start"))
    )
    assert plain.keys() <= shown.keys()
    # The same draws of the same model: what differs is what their prompts showed.
    assert all(plain[query] != shown[query] for query in plain)
    for _, pair in read_jsonl(run / "round-0" / "preferences.jsonl", {}):
        assert pair["prompt"].count("Search query:") == 1
    (first, *_) = [row for row in step_metrics(run) if row["phase"] == "generator"]
    # Before the first update the policy is its reference: IPO's loss is (1 / (2 beta))^2.
    assert first["loss"] == pytest.approx(25.0, rel=1e-3)
    assert abs(first["margin"]) < 1e-3
    assert json.loads((run / "results.json").read_text())["rows"]
