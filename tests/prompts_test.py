"""Prompts to the letter, and what is taken off answers."""

import pytest

from expandr_jax.errors import UserError
from expandr_jax.expansion.prompts import (
    DOCUMENT_STRATEGIES,
    STRATEGIES,
    is_repetitive,
    render,
    render_document,
    strategy,
    strip_lead_in,
)


def test_the_paper_s_prompts_to_the_letter():
    assert render("q2d", "why is the sky blue") == (
        "Please write a passage to answer the question.\nQuestion: why is the sky blue\nPassage:"
    )
    assert render("q2a", "Q", document="D") == (
        "You are given a query and a related document. Based on the query, generate a direct and "
        "relevant answer using the information in the document. If the query is a statement, "
        "expand on it. If it is a question, provide a direct answer. Avoid any extra description "
        "or irrelevant content.\nQuery: Q\nRelated Document: D\nAnswer:"
    )


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_shows_the_query(name):
    text = render(name, "the query {x}", document="{d}", passages=["one", "two"])
    assert "the query {x}" in text


def test_documents_are_shown_as_they_are():
    for name in DOCUMENT_STRATEGIES:
        assert "Document: a {b} c\n" in render_document(name, "a {b} c")


def test_lamer_numbers_its_passages():
    assert "1. one\n2. two\n" in render("lamer", "Q", passages=["one", "two"])
    with pytest.raises(ValueError, match="passages"):
        render("lamer", "Q")


def test_templates_of_the_user():
    assert render("q2d", "Q", template="Explain {query} in {{braces}}") == "Explain Q in {braces}"
    for template in ("no placeholder", "{query} {other}", "{query", "{query} {}", "{query:d}"):
        with pytest.raises(UserError, match="template"):
            strategy("q2d", template)
    with pytest.raises(UserError, match="q2x"):
        strategy("q2x")


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


def test_repetition():
    assert is_repetitive("the array is the array is " * 6)
    assert not is_repetitive("Returns the sum of the elements over the given axis of an array.")
    assert not is_repetitive("short")
