"""How a response ends that the generator learns: which token, and only once."""

import json
import shutil
import types

import pytest
from transformers import tokenization_utils_base

from expandr_jax.data.preferences import read_preferences
from expandr_jax.objectives.registry import OBJECTIVES
from expandr_jax.rewards.group import Group
from expandr_jax.weights.hf import load_generator
from tests.commands import ROOT

TINY_LLAMA = ROOT / "configs" / "tiny" / "tiny-llama"
TEXT_END, TURN_END = 0, 2  # <|endoftext|> and <|im_end|>; the template puts the latter.
USER_ALONE = "{{ messages[0]['content'] }}\n"
REFUSES = "{% if messages|length > 1 %}{{ raise_exception('one') }}{% endif %}" + USER_ALONE
PLAIN = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
SPACED = "{% for m in messages %}{{ m['content'] }} <|im_end|>\n{% endfor %}"
SETTINGS = types.SimpleNamespace(prompt_length=8, response_length=5, reward_temperature=1.0)


@pytest.fixture
def load(tmp_path):
    """Loads the tiny generator with these ids that end a text, and this chat template and token."""

    def load(eos_ids, template=None, eos_token=None):
        path = shutil.copytree(TINY_LLAMA, tmp_path / "model")
        changes = {"generation_config.json": {"eos_token_id": eos_ids}}
        if eos_token is not None:
            changes["tokenizer_config.json"] = {"eos_token": eos_token}
        for name, fields in changes.items():
            file = path / name
            file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
        if template is not None:
            (path / "chat_template.jinja").write_text(template)
        return load_generator(str(path))[0]

    return load


@pytest.mark.parametrize(
    ("eos_ids", "template", "eos_token", "expected"),
    [
        ([TEXT_END, TURN_END], None, None, TURN_END),
        ([TEXT_END, TURN_END], None, "<|endoftext|>", TURN_END),
        ([5, TURN_END], SPACED, "<|endoftext|>", TURN_END),
        ([TEXT_END, 5], None, "<|endoftext|>", TEXT_END),
        ([5, TEXT_END], PLAIN, "<|endoftext|>", TEXT_END),
        ([5, TEXT_END], REFUSES, "<|endoftext|>", TEXT_END),
        ([5, TURN_END], USER_ALONE, None, TURN_END),
        ([5, 6], None, None, 5),
        ([6, 5], PLAIN, "<|endoftext|>", 6),
    ],
    ids=[
        "as Llama 3", "as Llama 3, another eos token", "behind a space", "the template's ends none",
        "the template puts none", "the template refuses", "the template leaves it out",
        "no known end", "no end at all",
    ],
)  # fmt: skip
def test_the_template_names_the_end_then_the_tokenizer(
    load, eos_ids, template, eos_token, expected
):
    assert load(eos_ids, template, eos_token).end_id == expected


def test_long_texts_are_cut_without_a_warning_of_indexing_errors(load, tmp_path, monkeypatch):
    """transformers says so once, of texts that are longer than the model; none is run whole."""
    said = []
    monkeypatch.setattr(tokenization_utils_base.logger, "warning", said.append)
    generator = load([TEXT_END, TURN_END])
    long = "a " * (generator.tokenizer.model_max_length + 1)
    row = {
        "prompt": long,
        "chosen": long,
        "rejected": "no",
        "candidates": [{"text": long, "reward": 1.0}],
    }
    assert OBJECTIVES["sigmoid"].tokenize(generator, [row], SETTINGS)[1] == 2
    assert OBJECTIVES["reward-sft"].tokenize(generator, [Group.from_row(row)], SETTINGS)[1] == 2
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(row) + "\n")
    assert read_preferences(path, generator.tokenizer, prompt_length=8, on_bad_pair="drop")[1]
    assert not said
    generator.tokenizer.deprecation_warnings.clear()  # What keeps it from being said.
    generator.tokenizer(long)
    assert len(said) == 1


def test_pairs_and_candidates_end_as_the_template_has_it_and_only_once(load):
    generator = load([TEXT_END, TURN_END])
    sentence = "a norm, a loss, a scalar"
    short, long = generator.tokenizer(["axis", sentence], add_special_tokens=False)["input_ids"]
    assert len(short) < SETTINGS.response_length < len(long)
    exact = generator.tokenizer.decode(long[: SETTINGS.response_length - 1])
    expected = {
        "axis": [*short, TURN_END],
        "axis<|im_end|>": [*short, TURN_END],
        "axis<|endoftext|>": [*short, TEXT_END, TURN_END],
        exact: [*long[:4], TURN_END],
        f"{exact}<|im_end|>": [*long[:4], TURN_END],
        sentence: [*long[:4], TURN_END],
        f"{sentence}<|im_end|>": [*long[:4], TURN_END],
    }
    for text, ids in expected.items():
        cut = text.startswith(sentence)
        row = {"prompt": "a?", "chosen": text, "rejected": "no"}
        (pair,), was_cut = OBJECTIVES["sigmoid"].tokenize(generator, [row], SETTINGS)
        assert (pair.ids[1], was_cut) == (ids, cut), text
        assert pair.responses[1][-1] == TURN_END
        row = {"prompt": "a?", "candidates": [{"text": text, "reward": 1.0}]}
        (one,), was_cut = OBJECTIVES["reward-sft"].tokenize(
            generator, [Group.from_row(row)], SETTINGS
        )
        assert (one.ids[1], was_cut) == (ids, cut), text


def test_what_stands_behind_the_end_of_a_response(load):
    generator = load([TURN_END])
    (line,) = generator.token_ids(["\n"])
    assert generator.decode(line) == "\n"

    def ends(ids, most=9):
        return generator.response_ids(ids, most)

    assert ends([5, 6]) == ([5, 6, TURN_END], False)
    assert ends([5, TURN_END, *line]) == ([5, TURN_END, *line], False)
    assert ends([5, TURN_END, 6]) == ([5, TURN_END, 6, TURN_END], False)  # It ends no response.
    assert ends([5, TURN_END, *line], 2) == ([5, TURN_END], False)  # The template's line alone.
    assert ends([5, 6, TURN_END, *line], 2) == ([5, TURN_END], True)
    assert ends([5, TURN_END, 6, 7], 3) == ([5, TURN_END, TURN_END], True)
    assert ends([]) == ([TURN_END], False)
