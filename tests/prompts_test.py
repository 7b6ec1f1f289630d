"""Prompts to the letter, and what is taken off answers."""

import pytest

from expandr_jax.errors import UserError
from expandr_jax.expansion.prompts import (
    DOCUMENT_PROMPTS,
    PROMPTS,
    custom_prompt,
    is_repetitive,
    strip_lead_in,
)


def test_the_paper_s_prompts_to_the_letter():
    assert PROMPTS["q2d"].message("why is the sky blue") == (
        "Please write a passage to answer the question.\nQuestion: why is the sky blue\nPassage:"
    )
    assert PROMPTS["q2a"].message("Q", document="D") == (
        "You are given a query and a related document. Based on the query, generate a direct and "
        "relevant answer using the information in the document. If the query is a statement, "
        "expand on it. If it is a question, provide a direct answer. Avoid any extra description "
        "or irrelevant content.\nQuery: Q\nRelated Document: D\nAnswer:"
    )


@pytest.mark.parametrize("name", PROMPTS)
def test_every_prompt_shows_the_query(name):
    written = dict.fromkeys(("questions", "answers", "rule", "examples"), "{w}")
    text = PROMPTS[name].message("the query {x}", "{d}", ["one", "two"], **written)
    # The answers are to questions, which were made of the query.
    assert ("the query {x}" in text) is (name != "qa-expand-answers")
    assert ("{w}" in text) is (name in ("qa-expand-answers", "qa-expand", "reformer"))


def test_documents_are_shown_as_they_are():
    for prompt in DOCUMENT_PROMPTS.values():
        assert "Document: a {b} c\n" in prompt.message(document="a {b} c")


def test_lamer_numbers_its_passages():
    assert "1. one\n2. two\n" in PROMPTS["lamer"].message("Q", passages=["one", "two"])
    with pytest.raises(ValueError, match="passages"):
        PROMPTS["lamer"].message("Q")


def test_of_answers_in_json_the_answers_are_left():
    whole = '{"answer1": "A \\"b\\"\\nc.", "answer2": "", "answer3": "D"}'
    for text in (whole, f"Sure! Here is the JSON:\n```json\n{whole}\n```"):
        assert strip_lead_in(text) == 'A "b" c.\nD'
    assert strip_lead_in('{ "question1":"One?", "question2": "Tw') == "One?\nTw"  # It was cut.
    assert strip_lead_in('{"answer1": "bad \\x escape"}') == "bad \\x escape"
    assert strip_lead_in('{"answer1": ""}') == ""
    for text in ('{"a": "b"}', "{answer1} is a placeholder", 'An "answer1": "x"'):
        assert strip_lead_in(text) == text


def test_templates_of_the_user():
    assert custom_prompt("Explain {query} in {{braces}}").message("Q") == "Explain Q in {braces}"
    shown = custom_prompt("{query}:\n{passages}").message("Q", passages=["one", "two"])
    assert shown == "Q:\n1. one\n2. two"
    for template in (
        "no placeholder", "{passages}", "{query} {other}", "{query} {document}", "{query",
        "{query} {}", "{query:d}",
    ):  # fmt: skip
        with pytest.raises(UserError, match="template"):
            custom_prompt(template)


@pytest.mark.parametrize(
    "lead_in",
    [
        "Here is a passage that answers the question: ",
        "Here's a possible answer:\n\n",
        "Here is the passage: \nPassage: ",
        "Sure! ",
        "Sure! Here is the documentation of the function:\n",
        "Certainly, here are the keywords:\n",
        "Sure, I'd be happy to help. Here is a counter argument:\n\n",
        "The following is a passage about tides:\n",
        "The following passage answers the question:\n",
        "The documentation of the function is as follows: ",
        "**Answer:** ",
        "Passage: ",
        "<think>\nHere is what they want: tides.\n</think>\n\nPassage: ",
        "  ",
        "",
    ],
)
def test_lead_ins_are_stripped(lead_in):
    text = "The tides are caused by the Moon: here is a passage about it."
    assert strip_lead_in(lead_in + text + "\n") == text


@pytest.mark.parametrize(
    "text",
    [
        "Here in the north, the rule is: never swim alone.",
        "Here is the Moon. It has two effects: tides and light.",
        "Sure signs of rain: dark clouds.",
        "Of course, the Moon is smaller.",
        "The sky is blue: it scatters.",
        "Returns: the array.",
        "Answering machines record calls.",
        "",
    ],
)
def test_what_is_no_lead_in_stays(text):
    assert strip_lead_in(text) == text


def test_thoughts_that_were_cut_are_no_answer():
    assert strip_lead_in("\n<think>\nThey ask for a passage. Passage: The tides") == ""


def test_repetition():
    assert is_repetitive("the array is the array is " * 6)
    assert not is_repetitive("Returns the sum of the elements over the given axis of an array.")
    assert not is_repetitive("short")
