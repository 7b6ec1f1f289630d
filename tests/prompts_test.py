"""Prompts to the letter, and what is taken off answers."""

import pytest

from expandr_jax.errors import UserError
from expandr_jax.prompts import STRATEGIES, is_repetitive, render, strategy, strip_lead_in


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


def test_lamer_numbers_its_passages():
    assert "1. one\n2. two\n" in render("lamer", "Q", passages=["one", "two"])
    with pytest.raises(ValueError, match="passages"):
        render("lamer", "Q")


def test_templates_of_the_user():
    assert render("q2d", "Q", template="Explain {query} in {{braces}}") == "Explain Q in {braces}"
    for template in ("no placeholder", "{query} {other}", "{query"):
        with pytest.raises(UserError, match="template"):
            strategy("q2d", template)
    with pytest.raises(UserError, match="q2x"):
        strategy("q2x")


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("Here is a passage that answers the question: The sky is blue.", "The sky is blue."),
        ("Here's a passage:\n\nRayleigh scattering.", "Rayleigh scattering."),
        ("Sure! The sky is blue.", "The sky is blue."),
        ("Passage: Light scatters: a lot.", "Light scatters: a lot."),
        ("The sky is blue: it scatters.", "The sky is blue: it scatters."),
        ("Returns: the array.", "Returns: the array."),
        ("  spaces  ", "spaces"),
        ("", ""),
    ],
)
def test_lead_ins_are_stripped_once(said, kept):
    assert strip_lead_in(said) == kept


def test_repetition():
    assert is_repetitive("the array is the array is " * 6)
    assert not is_repetitive("Returns the sum of the elements over the given axis of an array.")
    assert not is_repetitive("short")
