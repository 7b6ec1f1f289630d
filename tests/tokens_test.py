"""How many tokens an evaluation's texts took, where a strategy asks more than it uses."""

import json
import types

import numpy as np
import pytest

from expandr_jax.expansion.counted import texts_with_counts
from expandr_jax.expansion.expand import Expander
from expandr_jax.expansion.sampled import SampledTexts
from expandr_jax.expansion.strategies import STRATEGIES
from tests.commands import finish, start


@pytest.mark.parametrize("samples", [1, 2])
def test_tokens_of_what_is_not_used_count_to_the_first_text(samples):
    drawn = {"qa-expand-questions": 7, "qa-expand-answers": 5}

    def sample(step, requests):
        rows = [
            {
                "query_id": request.id,
                "sample": request.sample,
                "text": "{}",
                "tokens": drawn.get(step.name, 3) + request.sample,
            }
            for request in requests
        ]
        return SampledTexts(rows, strip=False)

    options = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 8, "top_k": 0, "min_p": 0.0}
    settings = types.SimpleNamespace(**options, repetition_penalty=1.0)
    sampler = types.SimpleNamespace(fits=lambda message: True)
    expander = Expander(STRATEGIES["qa-expand"], sampler, settings, 100, None, {})
    texts, tokens, told = texts_with_counts(expander, {"q": "why"}, samples, sample)
    assert told is None
    assert tokens["q"] == [[15, 4][:samples]]
    assert [len(each) for each in texts["q"]] == [samples]


@pytest.mark.parametrize("kept", [True, False])
def test_log_probabilities_are_a_text_s_own_mean(kept):
    """The mean is of what is used alone; there is none where one text of a journal has none."""

    def sample(step, requests):
        rows = [
            {"query_id": r.id, "sample": r.sample, "text": "{}", "tokens": 2,
             "log_probs": [-1.0 - r.sample, -3.0] if step.used else [-9.0]}
            for r in requests
        ]  # fmt: skip
        if not kept and step.used:
            del rows[-1]["log_probs"]
        return SampledTexts(rows, strip=False)

    options = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 8, "top_k": 0, "min_p": 0.0}
    settings = types.SimpleNamespace(**options, repetition_penalty=1.0)
    sampler = types.SimpleNamespace(fits=lambda message: True)
    expander = Expander(STRATEGIES["qa-expand"], sampler, settings, 100, None, {})
    *_, told = texts_with_counts(expander, {"q": "why", "r": "how"}, 2, sample)
    assert told is None or dict(told) == {query: [[-2.0, -2.5]] for query in "qr"}
    assert (told is not None) == kept


@pytest.mark.slow
def test_a_gate_after_generation_reads_them(tmp_path):
    """Its standardisation says what it read: means over dev of what the journal has."""
    systems = "('expandr','expandr-plain','expandr-gated-after')"
    finish(start(tmp_path, f"--config.evaluation.systems={systems}"))
    gate = json.loads((tmp_path / "evaluation/gates.json").read_text())["expandr-gated-after"]
    chosen = json.loads((tmp_path / "results.json").read_text())["chosen"]["expandr"]
    lines = (tmp_path / "evaluation/expansions.jsonl").read_text().splitlines()
    dev = {row["query_id"]: set() for row in map(json.loads, lines) if row["split"] == "dev"}
    for row in map(json.loads, lines):
        if row["query_id"] in dev and row["expansion"] and row["sample"] < chosen["samples"]:
            dev[row["query_id"]].add(row["sample"])
    journal = (tmp_path / "work/evaluation-trained.jsonl").read_text().splitlines()
    rows = {(row["query_id"], row["sample"]): row["log_probs"] for row in map(json.loads, journal)}
    means = [np.mean([np.mean(rows[q, n]) for n in used]) if used else 0 for q, used in dev.items()]
    place = gate["features"].index("log_probability")
    assert gate["means"][place] == pytest.approx(np.mean(means), abs=1e-6)
    assert gate["means"][place] < 0
