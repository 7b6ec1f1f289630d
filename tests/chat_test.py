"""Chat templates: on a given day they say what transformers says on that day."""

import copy
import dataclasses
import datetime
import json
import pathlib
import re
import types

import pytest
import transformers.utils.chat_template_utils as theirs
import trl
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from trl.data_utils import apply_chat_template, common_prefix_length

from expandr_jax.data.chat import apply_template
from expandr_jax.data.preferences import read_preferences
from expandr_jax.errors import UserError
from expandr_jax.objectives.preference import read_pairs
from expandr_jax.objectives.registry import OBJECTIVES
from expandr_jax.weights.export import export_generator
from expandr_jax.weights.hf import load_generator
from tests.file_options import edit

TINY = pathlib.Path(__file__).parent.parent / "configs" / "tiny" / "tiny-llama"
DAY = datetime.date(2031, 3, 4)
MESSAGES = [{"role": "user", "content": "a query"}]


@pytest.fixture(scope="module")
def tokenizer():
    return PreTrainedTokenizerFast.from_pretrained(TINY)


@pytest.fixture(scope="module")
def generator():
    return load_generator(str(TINY))[0]


@pytest.mark.parametrize(
    "template",
    [
        "{{ strftime_now('%d %b %Y') }}: {{ messages[0]['content'] }}",
        "{% if strftime_now is defined %}{{ strftime_now('%Y-%m-%d, %A %-d %B %%j') }}{% endif %}",
        "{% set today = strftime_now('%Y') %}{{ today }}{{ strftime_now('%H:%M:%S') }}",
        "{% if add_generation_prompt %}{{ strftime_now('no code') }}{% endif %}",
        "{{ messages[0]['role'] }} knows no day",
        "\n  lead {{ strftime_now('%_d|%-m|%') }}",
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


TEMPLATES = (
    "llama3", "llama3_1", "llama3_2", "qwen2_5", "qwen3", "qwen3_instruct_2507", "gemma", "gemma3",
    "phi3", "phi3_5", "deepseek_r1_distill", "glm4moe", "lfm2", "cohere",
)  # fmt: skip
OTHERS = [  # All that TRL carries, but for those of images, which take no plain text.
    pytest.param(path.stem, marks=pytest.mark.slow)
    for path in sorted((pathlib.Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
    if path.stem not in TEMPLATES and not re.match("idefics|llava|smolvlm", path.stem)
]
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe helpful.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}[SYSTEM_PROMPT]Today is {{ strftime_now('%Y-%m-%d') }}.[/SYSTEM_PROMPT]"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST]' + m['content'] + '[/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}"
    "{% endfor %}"
)
ROWS = (
    {"prompt": [{"role": "user", "content": " Q? "}]},
    {"prompt": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "<think>\nhm\n"
                "</think>\n\nA"}, {"role": "user", "content": "R"}]},
    {"prompt": [{"role": "user", "content": "Q"}],
     "chat_template_kwargs": {"enable_thinking": False}},
    {"prompt": [{"role": "user", "content": "Q"}], "tools": [{"type": "function", "function": {
        "name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {
            "x": {"type": "number", "description": "A number."}}}}}]},
)  # fmt: skip


def template_of(name):
    folder = pathlib.Path(trl.__file__).parent / "chat_templates"
    own = {"smollm2": SMOLLM2, "mistral": MISTRAL, "spaced": SPACED}
    return own[name] if name in own else (folder / f"{name}.jinja").read_text()


@pytest.mark.parametrize("name", [*TEMPLATES, *OTHERS, "smollm2", "mistral"])
def test_pairs_have_the_texts_of_trl(tokenizer, monkeypatch, tmp_path, name):
    monkeypatch.setattr(tokenizer, "chat_template", template_of(name))
    compared, today = 0, datetime.date.today()
    for number, row in enumerate(ROWS):
        for chosen in ("good ", "<think>\nso\n</think>\n\ngood"):
            row = {
                **row,
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": "bad"}],
            }
            (path := tmp_path / f"{number}.jsonl").write_text(json.dumps(row))
            try:
                right = apply_chat_template(row, tokenizer, tools=row.get("tools"))
            except Exception:  # The template has no tools, or is strict about them.
                with pytest.raises(UserError, match=r"jsonl:1: the chat template refuses"):
                    read_preferences(path, tokenizer, prompt_length=10**6)
                continue
            ((found,), _) = read_preferences(path, tokenizer, prompt_length=10**6, today=today)
            end = tokenizer.eos_token
            right = {k: v if k == "prompt" else v.removesuffix(end) for k, v in right.items()}
            assert found == {k: right[k] for k in found}
            compared += 1
    assert compared >= (4 if name in TEMPLATES else 1)


NAMED = {name: f"{name} {MISTRAL}" for name in ("default", "tool_use", "rag")}


@pytest.mark.parametrize("form", ["config", "files", "export"])
def test_of_several_templates_the_one_for_tools_is_taken_where_there_are_any(
    tokenizer, tmp_path, form
):
    for file in TINY.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").unlink()
    if form == "files":
        folder = tmp_path / "additional_chat_templates"
        folder.mkdir()
        for name, text in NAMED.items():
            (folder / f"{name}.jinja").write_text(text)
        (folder / "default.jinja").rename(tmp_path / "chat_template.jinja")
    else:
        named = [{"name": name, "template": text} for name, text in NAMED.items()]
        edit(tmp_path / "tokenizer_config.json", chat_template=named)
    own, params = load_generator(str(tmp_path))
    if form == "export":
        export_generator(tmp_path / "export", own, params)
        own, _ = load_generator(str(tmp_path / "export"))
    theirs_own = AutoTokenizer.from_pretrained(tmp_path / ("export" * (form == "export")))
    begins = []
    for row in (ROWS[0], ROWS[3], {**ROWS[0], "chat_template_kwargs": {"chat_template": "rag"}}):
        row = {key: value for key, value in row.items() if key != "prompt"} | {
            "prompt": ROWS[0]["prompt"],
            "chosen": [{"role": "assistant", "content": "good"}],
            "rejected": [{"role": "assistant", "content": "bad"}],
        }
        (path := tmp_path / "pairs.jsonl").write_text(json.dumps(row))
        right = apply_chat_template(row, theirs_own, tools=row.get("tools"))
        ((found,), _) = read_preferences(path, own.tokenizer, prompt_length=10**6)
        assert found["prompt"] == right["prompt"]
        begins.append(found["prompt"].split()[0])
    assert begins == [*NAMED]
    assert own.chat_text("a query").startswith("default ")


def test_several_templates_without_a_default_are_refused(tmp_path):
    for file in TINY.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").unlink()
    for names, message in (
        (["tool_use", "rag"], "multiple chat templates with no default"),
        (["default", "../rag"], r"chat_template.name is '../rag'; expected a file's name"),
    ):
        named = [{"name": name, "template": "x"} for name in names]
        edit(tmp_path / "tokenizer_config.json", chat_template=named)
        with pytest.raises(UserError, match=message):
            load_generator(str(tmp_path))


# Its prompt ends within a token of the tiny model's tokenizer, which has " good" in one piece.
SPACED = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.mark.parametrize("name", [*TEMPLATES, *OTHERS, "smollm2", "mistral", "spaced"])
@pytest.mark.parametrize("chosen", ["good", "\n good", "<think>\nso\n</think>\n\ngood"])
def test_pairs_have_the_ids_of_trl(generator, monkeypatch, tmp_path, name, chosen):
    tokenizer = generator.tokenizer
    monkeypatch.setattr(tokenizer, "chat_template", template_of(name))
    messages = [
        ROWS[0]["prompt"], *([{"role": "assistant", "content": text}] for text in (chosen, "bad"))
    ]  # fmt: skip
    row = dict(zip(("prompt", "chosen", "rejected"), messages, strict=True))
    (path := tmp_path / "pairs.jsonl").write_text(json.dumps(row))
    own = dataclasses.replace(generator, today=datetime.date.today())  # `end_id` is the template's.
    section = types.SimpleNamespace(prompt_length=10**6, response_length=10**6, on_bad_pair="error")
    rows, _ = read_pairs(path, own, section, None, 0.0, own=False)
    ((found,), cut) = OBJECTIVES["sigmoid"].tokenize(own, rows, section)
    # As in TRL's DPOTrainer, which has it in a closure.
    prompt, *whole = (
        tokenizer.apply_chat_template(conversation, return_dict=False, **options)
        for conversation, options in (
            (messages[0], {"add_generation_prompt": True}),
            (messages[0] + messages[1], {}),
            (messages[0] + messages[2], {}),
        )
    )
    shared = min(common_prefix_length(prompt, ids) for ids in whole)
    assert (found.ids[0], cut) == (prompt[:shared], 0)
    if (name, chosen) == ("spaced", "good"):
        assert shared < len(prompt)
    for ours, theirs_ids in zip(found.ids[1:], (ids[shared:] for ids in whole), strict=True):
        # A template that puts no end behind an answer gets one.
        assert ours in (theirs_ids, [*theirs_ids, own.end_id])


@pytest.mark.parametrize("starts", [True, False])
def test_prompts_that_are_text_begin_as_the_tokenizer_has_it(generator, tmp_path, starts):
    """trl#907: a prompt without the first token that the model has always seen."""
    tokenizer, start = copy.deepcopy(generator.tokenizer), "<|im_start|>"
    if starts:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, tokenizer.bos_token_id)]
        )
    own = dataclasses.replace(generator, tokenizer=tokenizer)
    section = types.SimpleNamespace(prompt_length=10**6, response_length=10**6, on_bad_pair="error")
    for prompt in ("Q: a query\nA:", f"{start}user\na query"):
        row = {"prompt": prompt, "chosen": " good", "rejected": " bad"}
        (path := tmp_path / "pairs.jsonl").write_text(json.dumps(row))
        rows, _ = read_pairs(path, own, section, None, 0.0, own=False)
        ((found,), _) = OBJECTIVES["sigmoid"].tokenize(own, rows, section)
        # Of a prompt that has the token, TRL's ids begin with it twice.
        twice = starts and prompt.startswith(start)
        assert found.ids[0] == tokenizer(prompt)["input_ids"][twice:]
