"""How many tokens an evaluation's texts took, where a strategy asks more than it uses."""

import types

import pytest

from expandr_jax.expansion.expand import Expander
from expandr_jax.expansion.sampled import SampledTexts
from expandr_jax.expansion.strategies import STRATEGIES
from train.expansions import _with_tokens


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
    expander = Expander(STRATEGIES["qa-expand"], sampler, settings, 100, None)
    texts, tokens = _with_tokens(expander, {"q": "why"}, samples, sample)
    assert tokens["q"] == [[15, 4][:samples]]
    assert [len(each) for each in texts["q"]] == [samples]
