"""Preference files: the formats of TRL, and pairs that cannot be trained on."""

import json
import pathlib

import pytest
from transformers import AutoTokenizer

from expandr_jax.data.preferences import read_preferences
from expandr_jax.errors import UserError

TINY_LLAMA = pathlib.Path(__file__).parent.parent / "configs" / "tiny" / "tiny-llama"
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Shape?"}
FIRST = {"role": "assistant", "content": "Which one?"}
GOOD = {"role": "assistant", "content": "(2, 3)"}
BAD = {"role": "assistant", "content": "No."}
# What the template of configs/tiny/tiny-llama makes of SYSTEM and USER, written out.
CHAT = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nShape?<|im_end|>\n"
    "<|im_start|>assistant\n"
)
END = "<|im_end|>\n"  # What that template puts behind each message, behind responses too.


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_LLAMA)


@pytest.fixture
def read(tmp_path, tokenizer):
    """Writes rows to a file and reads them as pairs."""

    def read(*rows, prompt_length=100, **options):
        path = tmp_path / "preferences.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return read_preferences(path, tokenizer, prompt_length=prompt_length, **options)

    return read


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": CHAT, "chosen": f"(2, 3){END}", "rejected": f"No.{END}"},
        {"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]},
        {"prompt": "Shape?", "chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]},
    ],
    ids=["strings", "messages", "implicit prompt", "conversations beside a string"],
)
def test_every_format_gives_the_same_texts(read, row):
    pairs, dropped = read({**row, "score": 0.5})
    assert [*pairs] == [{"prompt": CHAT, "chosen": f"(2, 3){END}", "rejected": f"No.{END}"}]
    assert dropped == {}


def test_a_longer_conversation_before_the_responses(read):
    before = [USER, FIRST, USER]
    (pair,), _ = read({"chosen": [*before, GOOD], "rejected": [*before, BAD]})
    assert pair["prompt"].count("<|im_start|>") == 4
    assert pair["prompt"].endswith("Shape?<|im_end|>\n<|im_start|>assistant\n")
    assert (pair["chosen"], pair["rejected"]) == (f"(2, 3){END}", f"No.{END}")


FINE = {"prompt": "a", "chosen": "b", "rejected": "c"}
BROKEN = [
    ({"prompt": "a", "chosen": "b"}, "missing field", 'no field "rejected"'),
    ({"chosen": "b", "rejected": "c"}, "missing field", 'no field "prompt"'),
    ({"chosen": [USER], "rejected": [SYSTEM]}, "missing field", "no common message"),
    ({**FINE, "chosen": 1}, "wrong type", "chosen must be"),
    ({**FINE, "prompt": [USER]}, "wrong type", "prompt must be a string"),
    ({**FINE, "chosen": [GOOD]}, "wrong type", "rejected must be"),
    ({"prompt": [USER], "chosen": [], "rejected": [BAD]}, "wrong type", "chosen must be"),
    ({"prompt": [{"role": "user"}], "chosen": [GOOD], "rejected": [BAD]}, "wrong type", "content"),
    ({"prompt": [FIRST], "chosen": [GOOD], "rejected": [BAD]}, "wrong type", "ends with"),
    ({"prompt": [USER], "chosen": [GOOD, USER], "rejected": [BAD]}, "wrong type", "one assistant"),
    ({**FINE, "images": ["a.png"]}, "wrong type", 'field "images" is not supported'),
    ({**FINE, "chosen": " \n"}, "empty", "chosen is empty"),
    ({**FINE, "prompt": ""}, "empty", "prompt is empty"),
    ({**FINE, "rejected": "b"}, "nothing preferred", "same text"),
    ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "nothing preferred", "same text"),
    ({**FINE, "prompt": "a" * 40}, "prompt too long", "at most 10"),
]


@pytest.mark.parametrize(("row", "reason", "message"), BROKEN)
def test_a_bad_pair_is_named_by_file_and_line(read, row, reason, message):
    with pytest.raises(UserError) as caught:
        read(FINE, row, prompt_length=10 if "long" in reason else 100)
    assert "preferences.jsonl:2: " in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_pairs_are_dropped_and_counted_where_that_is_asked_for(read):
    rows = [row for row, reason, _ in BROKEN if reason != "prompt too long"]
    pairs, dropped = read(FINE, *rows, FINE, on_bad_pair="drop")
    assert [*pairs] == [FINE, FINE]
    assert dropped == {"missing field": 3, "wrong type": 8, "empty": 2, "nothing preferred": 2}


def test_a_prompt_of_exactly_the_limit_is_used(read, tokenizer):
    count = len(tokenizer(CHAT, add_special_tokens=False)["input_ids"])
    row = {"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD]}
    assert len(read(row, prompt_length=count)[0]) == 1
    with pytest.raises(UserError, match=f"has {count} tokens; at most {count - 1}"):
        read(row, prompt_length=count - 1)


def test_responses_that_are_one_once_cut_prefer_nothing(read):
    rows = [FINE, {"prompt": "a", "chosen": "a b c", "rejected": "a b d"}, FINE]
    assert [*read(*rows)[0]] == rows
    learned = {"learned": lambda text: text.split()[:2]}
    with pytest.raises(UserError, match=r"jsonl:2: chosen and rejected are the same 2 tokens"):
        read(*rows, **learned)
    pairs, dropped = read(*rows, on_bad_pair="drop", **learned)
    assert [*pairs] == [FINE, FINE]
    assert dropped == {"nothing preferred": 1}


def test_a_damaged_line_stops_the_reading_whatever_is_allowed(tmp_path, tokenizer):
    path = tmp_path / "preferences.jsonl"
    path.write_text('{"prompt": "a"\n')
    with pytest.raises(UserError, match=r"preferences.jsonl:1: not JSON"):
        read_preferences(path, tokenizer, prompt_length=10, on_bad_pair="drop")
