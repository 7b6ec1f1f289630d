"""Prompts are those of querygym, a package of the methods' prompts, but for worked examples.

Its files are read and none of its code is run: it is installed without what it depends on.
"""

import ast
import importlib.util
import pathlib

import pytest
import yaml

from expandr_jax.expansion.patterns import PATTERNS
from expandr_jax.expansion.prompts import GENQR_ENSEMBLE, PROMPTS

SPEC = importlib.util.find_spec("querygym")  # Which imports nothing.
if SPEC is None:
    pytest.skip("there is no querygym: pip install --no-deps querygym", allow_module_level=True)
HERE = pathlib.Path(SPEC.origin).parent
BANK = {prompt["id"]: prompt["template"] for prompt in yaml.safe_load(
    (HERE / "prompt_bank.yaml").read_text())}  # fmt: skip
PASSAGES = ["one", "two"]
SHOWN = {
    "query": "who flew", "contexts": "1. one\n2. two", "documents_text": "one\n\ntwo",
    "questions": "Q", "answers": "A", "transformation_rule": "R", "examples_json": "E",
    "patterns_json": "P", "examples": "",
}  # fmt: skip


def lines(text):
    """Those of a text, without white space at their ends and empty lines at the text's."""
    return [line.rstrip() for line in text.strip().splitlines()]


def theirs(name):
    """What the system says, an empty line, what the user says."""
    said = (BANK[name].get(role, "") for role in ("system", "user"))
    said = (text.replace("{examples}\n", "").format(**SHOWN).strip() for text in said)
    return lines("\n\n".join(filter(None, said)))


def ours(name):
    written = {"questions": "Q", "answers": "A", "rule": "R", "examples": "E"}
    return lines(PROMPTS[name].message("who flew", "", PASSAGES, **written))


@pytest.mark.parametrize(
    ("name", "in_bank"),
    [
        ("q2c", "query2doc.cot.v1"),
        ("mugi", "mugi.zeroshot.v1"),  # It has the answer begin, which we leave to the model.
        ("lamer", "lamer.msmarco.v1"),
        ("thinkqe", "thinkqe.v1"),
        ("keqe", "keqe.v1"),
        ("q2e", "q2e.fs.v1"),  # Without examples.
        ("genqr", "genqr.keywords.v1"),
        *((name, f"genqr_ensemble.inst{i}.v1") for i, name in enumerate(GENQR_ENSEMBLE, start=1)),
        ("qa-expand-questions", "qa_expand.subq.v1"),
        ("qa-expand-answers", "qa_expand.answer.v1"),
        ("qa-expand", "qa_expand.refine.v1"),
        ("reformer", "reformer.pattern_application.v1"),
    ],
)
def test_a_prompt_is_what_the_system_and_the_user_say(name, in_bank):
    assert ours(name) == theirs(in_bank)


@pytest.mark.parametrize(
    ("name", "in_bank", "first", "examples"),
    [("query2doc", "query2doc.fewshot.v1", 2, 4), ("csqe", "csqe.v1", 4, 1)],
)
def test_a_prompt_with_worked_examples_has_the_same_around_them(name, in_bank, first, examples):
    """`first` lines come before the examples."""
    whole, mine = theirs(in_bank), ours(name)
    last = len(whole) - first
    if name == "query2doc":
        last -= 1  # An empty line after the examples, which stand for nothing.
    assert mine[:first] == whole[:first]
    assert mine[-last:] == whole[-last:]
    between = mine[first:-last]
    assert sum(line.startswith("Query:") for line in between) == examples
    said = " ".join(str(BANK).split())
    passages = [line for line in between if len(line) > 60 and line not in whole]
    assert len(passages) >= examples
    assert not [line for line in passages if line in said]


def test_reformer_chooses_among_the_same_patterns():
    written = PROMPTS["reformer-pattern"].message("who flew", "", PASSAGES)
    first, last = written.index("["), written.rindex("]") + 1
    assert lines(written[:first] + "P" + written[last:]) == theirs("reformer.pattern_selection.v1")
    module = ast.parse((HERE / "methods" / "reformer.py").read_text())
    (library,) = (
        node.value for node in module.body
        if isinstance(node, ast.AnnAssign) and node.target.id == "DEFAULT_PATTERNS"
    )  # fmt: skip
    library = ast.literal_eval(library)
    assert [{**p, "examples": None} for p in PATTERNS] == [{**p, "examples": None} for p in library]
    copied = {str(example) for p in library for example in p["examples"]}
    assert not copied & {str(example) for p in PATTERNS for example in p["examples"]}
