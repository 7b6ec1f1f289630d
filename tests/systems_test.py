"""Names of systems: what each is made of, and what is refused."""

import pytest

from expandr_jax.errors import UserError
from expandr_jax.expansion.strategies import PUBLISHED
from expandr_jax.ranking.stages import FEEDBACKS, FUSIONS, WEIGHINGS, WORD_FEEDBACKS
from expandr_jax.ranking.systems import (
    System,
    counterparts,
    parse_system,
    parse_systems,
    row_of_round,
)


def test_a_leaf_has_a_retriever_and_what_expands_its_queries_and_documents():
    for name, expected in {
        "bm25": ("bm25", None, None, None),
        "dense": ("zero-shot", None, None, None),
        "dense+query2doc": ("zero-shot", "base", "query2doc", None),
        "dense@d2q+q2d": ("zero-shot", "base", "q2d", "d2q"),
        "zero-shot": ("zero-shot", None, None, None),
        "zero-shot+expansion": ("zero-shot", "base", "expansion", None),
        "fine-tuned": ("fine-tuned", None, None, None),
        "fine-tuned-all": ("fine-tuned-all", None, None, None),
        "fine-tuned-all+hyde": ("fine-tuned-all", "base", "hyde", None),
        "fine-tuned+expansion": ("fine-tuned", "base", "expansion", None),
        "expandr": ("expandr", "trained", "expansion", None),
        "expandr-base-generator": ("expandr", "base", "expansion", None),
        "expandr-plain": ("expandr", None, None, None),
        "expandr-plain+hyde": ("expandr", "base", "hyde", None),
        "expandr-round2": ("round-2", "round-2", "expansion", None),
        "bm25+expansion": ("bm25", "trained", "expansion", None),
    }.items():
        assert parse_system(name) == System(name, *expected)
    assert parse_system("expandr-round2") == row_of_round(2)
    weighing = parse_system("bm25q@d2q+q2d")
    expected = ("bm25", "base", "q2d", "d2q")
    assert weighing == System("bm25q@d2q+q2d", *expected, weighing="bm25q")


def test_a_stage_has_parts_which_are_systems_themselves():
    fused = parse_system("rrf:bm25+q2d:dense")
    assert [part.name for part in fused.with_parts()] == ["bm25+q2d", "dense", "rrf:bm25+q2d:dense"]
    assert (fused.stage, fused.retrievers, fused.generators) == (
        "rrf", {"bm25", "zero-shot"}, {"base"},
    )  # fmt: skip
    assert parse_system("dense@d2q").generators == {"base"}
    feedback = parse_system("dense@d2q+prf-rocchio")
    assert (feedback.stage, feedback.parts) == ("prf-rocchio", (parse_system("dense@d2q"),))
    feedback = parse_system("zero-shot+expansion+prf-average")
    assert feedback.parts == (parse_system("zero-shot+expansion"),)
    for name in ("bm25q+rm3", "bm25@d2q+q2e+rm3", "bm25+expansion+rm3"):
        part = parse_system(name.removesuffix("+rm3"))
        assert parse_system(name) == System(name, stage="rm3", parts=(part,))
    nested = parse_system("interpolation:bm25:rrf:dense:expandr")
    assert [part.name for part in nested.parts] == ["bm25", "rrf:dense:expandr"]
    assert [leaf.name for leaf in nested.leaves] == ["bm25", "dense", "expandr"]


def test_a_stage_over_ours_is_compared_with_the_same_stage_over_others():
    names = (
        "bm25", "expandr", "fine-tuned", "expandr-plain+prf-average", "expandr+prf-average",
        "interpolation:bm25:fine-tuned", "interpolation:bm25:expandr",
        "interpolation:bm25:fine-tuned+prf-average", "rrf:bm25:fine-tuned",
        "interpolation:expandr:bm25", "interpolation:bm25:rrf:dense:expandr",
        "interpolation:bm25:rrf:dense:fine-tuned", "interpolation:bm25:fine-tuned:expandr",
    )  # fmt: skip
    assert counterparts([parse_system(name) for name in names]) == [
        ("expandr+prf-average", "expandr-plain+prf-average"),
        ("interpolation:bm25:expandr", "bm25"),
        ("interpolation:bm25:expandr", "interpolation:bm25:fine-tuned"),
        ("interpolation:bm25:expandr", "interpolation:bm25:fine-tuned+prf-average"),
        ("interpolation:bm25:expandr", "interpolation:bm25:rrf:dense:expandr"),
        ("interpolation:bm25:expandr", "interpolation:bm25:rrf:dense:fine-tuned"),
        ("interpolation:expandr:bm25", "bm25"),
        ("interpolation:bm25:rrf:dense:expandr", "bm25"),
        ("interpolation:bm25:rrf:dense:expandr", "interpolation:bm25:rrf:dense:fine-tuned"),
        ("interpolation:bm25:fine-tuned:expandr", "bm25"),
        ("interpolation:bm25:fine-tuned:expandr", "fine-tuned"),
    ]


def test_what_needs_training():
    for name in ("bm25", "dense+q2d", "zero-shot+expansion", "rrf:bm25@d2q:dense+prf-average"):
        assert not parse_system(name).needs_training
    for name in ("expandr", "fine-tuned", "rrf:bm25:expandr-plain", "bm25+expansion",
                 "expandr-round0"):  # fmt: skip
        assert parse_system(name).needs_training


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("bm25@q2d", "expected bm25@ one of d2q, d2e, d2d"),
        ("dense@", "expected dense@ one of"),
        ("rrf@d2q", "a system begins with"),
        ("splada", "a system begins with one of bm25, dense, "),
        ("dense+q2x", r"expected dense\+ one of q2d"),
        ("dense+", r"expected dense\+ one of"),
        ("bm25+prf-average", r"expected bm25\+ one of"),
        ("bm25+q2d+prf-average", r"expected bm25\+ one of"),
        ("dense+rm3", r"expected dense\+ one of .*prf-average"),
        ("bm25q+rm4", r"expected bm25q\+ one of .*rm3"),
        ("bm25+rm3+prf-average", r"expected bm25\+ one of"),
        ("dense+prf-average+rm3", r"expected dense\+ one of"),
        ("dense+prf-average+q2d", r"expected dense\+ one of"),
        ("rrf:bm25", "expected two systems to fuse"),
        ("rrf:bm25:bm25", "expected two systems to fuse"),
        ("rrf:bm25:rrf", "expected two systems to fuse"),
        ("bm25:dense", "dense follows a system that is complete"),
        ("expandr-round", "is unknown"),
        ("", "is unknown"),
    ],
)
def test_a_name_of_nothing_is_refused_in_a_line(name, complaint):
    with pytest.raises(UserError, match=complaint) as error:
        parse_system(name)
    assert "\n" not in str(error.value)


def test_all_is_every_published_strategy_feedback_and_fusion():
    systems = parse_systems(["dense", "all", "bm25"])
    names = [system.name for system in systems]
    assert names[:2] == ["dense", "bm25"]
    assert len(set(names)) == len(names)
    for base in ("bm25", "dense"):
        assert {f"{base}+{name}" for name in PUBLISHED} <= {*names}
    assert {s.stage for s in systems if s.stage} == {*FEEDBACKS, *WORD_FEEDBACKS, *FUSIONS}
    assert {*WEIGHINGS} <= {*names}
    assert {s.documents for s in systems} == {None}  # A text for each document is asked for.
    with pytest.raises(UserError, match="no systems"):
        parse_systems([])
    with pytest.raises(UserError, match="'everything' is unknown"):
        parse_systems(["everything"])
