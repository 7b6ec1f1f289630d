"""Chat templates: on a given day they say what transformers says on that day."""

import datetime
import pathlib
import types

import pytest
import transformers.utils.chat_template_utils as theirs
from transformers import PreTrainedTokenizerFast

from expandr_jax.models.chat import apply_template

TINY = pathlib.Path(__file__).parent.parent / "configs" / "tiny" / "tiny-llama"
DAY = datetime.date(2031, 3, 4)
MESSAGES = [{"role": "user", "content": "a query"}]


@pytest.fixture(scope="module")
def tokenizer():
    return PreTrainedTokenizerFast.from_pretrained(TINY)


@pytest.mark.parametrize(
    "template",
    [
        "{{ strftime_now('%d %b %Y') }}: {{ messages[0]['content'] }}",
        "{% if strftime_now is defined %}{{ strftime_now('%Y-%m-%d, %A %-d %B %%j') }}{% endif %}",
        "{% set today = strftime_now('%Y') %}{{ today }}{{ strftime_now('%H:%M:%S') }}",
        "{% if add_generation_prompt %}{{ strftime_now('no code') }}{% endif %}",
        "{{ messages[0]['role'] }} knows no day",
    ],
)
def test_a_template_is_told_the_run_s_day(tokenizer, monkeypatch, template):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    found = apply_template(tokenizer, MESSAGES, DAY, add_generation_prompt=True)

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(DAY.year, DAY.month, DAY.day)

    monkeypatch.setattr(theirs, "datetime", Clock)
    expected = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    assert found == expected
    monkeypatch.setattr(theirs, "datetime", types.SimpleNamespace())  # No clock is asked at all.
    assert apply_template(tokenizer, MESSAGES, DAY, add_generation_prompt=True) == expected
