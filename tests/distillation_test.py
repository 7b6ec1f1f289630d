"""A query tower learns the vectors of expanded queries, against numpy and sentence-transformers."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from configs import base
from expandr_jax.config import read_config, with_settings
from expandr_jax.data.generated import (
    COPIED,
    EMPTY,
    HEADING,
    REPEATED,
    SHORT,
    TESTED,
    drawn_documents,
    first_query,
    sorted_out,
)
from expandr_jax.errors import UserError
from expandr_jax.losses.distillation import cosine_distance, ranking_kl
from expandr_jax.objectives.distillation import (
    DistillationBatches,
    contrastive_losses,
    distillation_setup,
    distilled_losses,
    documents_of,
    targets_of,
)
from expandr_jax.objectives.trained import training_retriever
from expandr_jax.planning.programs import planned_programs
from expandr_jax.sharding import make_mesh
from expandr_jax.training.setup import section_optimizer
from expandr_jax.vectors.encoder import TextEncoder
from expandr_jax.weights.hf import load_retriever
from tests.eight_devices import QUIET, machine, smoke_on_meshes
from train import plan
from train.distill import EPOCHS, distill, distilling
from train.evaluation import systems_of_run

TINY = str(pathlib.Path(__file__).parent.parent / "configs" / "tiny" / "tiny-bert")
QUERIES = ["compute the gradient", "return an array", "scale the norm", "count the steps of a loss",
           "the shape", "an array of zeros", "clip it", "sum of squares"]  # fmt: skip
PASSAGES = [["gradient of parameters", "a loss"], ["an array, returned", "shape"], ["a clip factor",
            "norm"], ["count by one", "steps"], ["the shape of an array", "axes"], ["zeros", "all"],
            ["within a range", "clipped"], ["squares, summed", "a norm"]]  # fmt: skip
ASKED = "Write questions that the following document answers.\nDocument: \nQuestions:"
BASE = read_config(base.get_config())
SETTINGS = dataclasses.replace(BASE.distill, batch_size=8, learning_rate=3e-3, kl_weight=0.5)


@pytest.fixture(scope="module")
def tiny():
    return load_retriever(TINY)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def test_losses_are_those_of_numpy_whatever_the_length_of_a_query_s_vector():
    draw = np.random.default_rng(0)
    student, teacher, documents = (
        draw.normal(size=(n, 6)).astype(np.float32) for n in (3, 3, 5)
    )  # fmt: skip
    cosine = 1 - (unit(student) * unit(teacher)).sum(axis=1)
    p, q = (softmax(unit(x) @ documents.T / 0.3) for x in (teacher, student))
    kl = (p * np.log(p / q)).sum(axis=1)
    for scale in (1.0, 7.0):
        found = cosine_distance(scale * student, teacher)
        np.testing.assert_allclose(found, cosine, atol=1e-6)
        found = ranking_kl(scale * student, teacher, documents, temperature=0.3)
        np.testing.assert_allclose(found, kl, rtol=1e-4)
    np.testing.assert_allclose(cosine_distance(teacher, 2 * teacher), 0.0, atol=1e-6)
    np.testing.assert_allclose(ranking_kl(teacher, teacher, documents, temperature=0.3), 0.0)
    settings = dataclasses.replace(SETTINGS, cosine_weight=2.0, kl_weight=0.5, temperature=0.3)
    batch = {"targets": teacher, "documents": documents}
    losses, metrics = distilled_losses(student, batch, settings)
    np.testing.assert_allclose(losses, 2 * cosine + 0.5 * kl, rtol=1e-4)
    np.testing.assert_allclose(metrics["cosine"], 1 - cosine, atol=1e-6)


def test_the_control_holds_no_relevant_document_against_a_query():
    draw = np.random.default_rng(0)
    documents = unit(draw.normal(size=(6, 4)))
    positives = [[2, 5], [5], [0], [3]]  # The second query's document is relevant to the first.
    indices = np.array([1, 0, 3])
    arrays = documents_of(positives, documents)(indices, slice(None))
    np.testing.assert_array_equal(arrays["documents"], documents[[5, 2, 3]].astype(np.float32))
    assert arrays["excluded"].tolist() == [[True, False, False], [True, True, False],
                                           [False, False, True]]  # fmt: skip
    query = draw.normal(size=(3, 4)).astype(np.float32)
    losses, metrics = contrastive_losses(
        query, arrays, dataclasses.replace(SETTINGS, temperature=0.2)
    )
    scores = unit(query) @ documents[[5, 2, 3]].T / 0.2
    scores[1, 0] = -np.inf
    expected = -np.log(softmax(scores)[range(3), range(3)])
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    np.testing.assert_array_equal(metrics["in_batch_accuracy"], expected < np.log(2))
    rows = documents_of(positives, documents)(indices, np.array([1, 2]))
    for name, array in rows.items():
        np.testing.assert_array_equal(array, arrays[name][1:])


def trained(tiny, mesh, targets, documents, found, steps):
    """A tower after some steps, and each step's metrics."""
    retriever, params = tiny
    encoder = TextEncoder(retriever, mesh)
    retriever = training_retriever(retriever, BASE.contrastive)
    batches = DistillationBatches(
        encoder.tokenize(QUERIES, "query"), QUERIES, targets_of(targets, documents, found), 8, 0,
        retriever.tokenizer.pad_token_id, retriever.max_length,
    )  # fmt: skip
    optimizer = section_optimizer(SETTINGS, 80)
    setup = distillation_setup(mesh, retriever, params, distilled_losses, SETTINGS, optimizer)
    state, told = setup.create(params), []
    for step in range(steps):
        batch, contents = batches.batch(step, slice(None), lambda length: length)
        assert sorted(contents.ids) == sorted(QUERIES)
        state, metrics = setup.step(state, batch, None)
        told.append({name: float(value) for name, value in metrics.items()})
    return jax.device_get(state.params), told


def test_a_handful_is_learned_until_the_student_says_what_the_teacher_says(tiny):
    """The teacher's vectors are those of sentence-transformers, averaged by numpy."""
    model = SentenceTransformer(TINY, device="cpu")
    own = model.encode(QUERIES, normalize_embeddings=True)
    texts = np.stack([model.encode(each, normalize_embeddings=True) for each in PASSAGES])
    targets = unit(0.3 * own + 0.7 * texts.mean(axis=1)).astype(np.float32)
    documents = model.encode([text for each in PASSAGES for text in each])
    found = np.argsort(-(targets @ documents.T), axis=1)[:, :4].astype(np.int32)
    before, kept = (own * targets).sum(axis=1), documents.copy()
    assert before.min() < 0.97
    params, told = trained(
        tiny, make_mesh(devices=jax.devices()[:1]), targets, documents, found, 80
    )
    np.testing.assert_allclose(told[0]["cosine"], before.mean(), atol=1e-4)
    encoder = TextEncoder(tiny[0], make_mesh(devices=jax.devices()[:1]))
    student = unit(encoder.encode(params, QUERIES, "query"))
    assert (student * targets).sum(axis=1).min() > 0.99
    assert told[-1]["kl"] < told[0]["kl"] / 10
    np.testing.assert_array_equal(documents, kept)


@pytest.mark.slow
def test_spread_over_eight_devices_it_is_the_same_training(tiny):
    draw = np.random.default_rng(0)
    targets, documents = (unit(draw.normal(size=(n, 32))).astype(np.float32) for n in (8, 16))
    found = np.arange(32).reshape(8, 4) % 16
    one, spread = (
        trained(tiny, mesh, targets, documents, found, 3)[1]
        for mesh in (make_mesh(devices=jax.devices()[:1]), make_mesh(4, 2))
    )
    for alone, together in zip(one, spread, strict=True):
        np.testing.assert_allclose([*alone.values()], [*together.values()], rtol=2e-3, atol=1e-5)


def test_a_batch_is_the_same_whoever_makes_its_rows():
    queries = [[1] * n for n in (3, 32, 5, 20, 7, 2)]
    batches = DistillationBatches(
        queries, [*"abcdef"], targets_of(np.eye(6), np.eye(9), np.arange(12).reshape(6, 2) % 9),
        4, 3, 0, 32,
    )  # fmt: skip
    for number in range(3):
        whole, contents = batches.batch(number, slice(None), lambda length: 2 * length)
        assert whole["query_ids"].shape[1] <= 32
        assert whole["documents"].shape == (8, 9)
        parts = [
            batches.batch(number, np.array(rows), lambda length: 0)[0] for rows in ([0, 1], [2, 3])
        ]
        for name, array in whole.items():
            np.testing.assert_array_equal(array, np.concatenate([part[name] for part in parts]))
        names = [*contents.ids]
        assert contents.tokens == sum(len(queries["abcdef".index(name)]) for name in names)


def test_queries_that_nearly_are_test_queries_are_left_out_and_say_why():
    tested = ["How do I pad the last axis of an array with zeros?", "sort a list"]
    texts = {
        "same": "1. how do I pad the last axis of an array with zeros",
        "near": "How do I pad the last axis of an array with zeros, quickly?",
        "far": "How do I pad an image with the values of its last axis?",
        "short": "Sort a list!",
        "longer": "Sort a list of names",
        "empty": " \n- \n",
        "again": "- sort a LIST of names",
        "trained": "What is a norm",
        "label": "Question 1.",
        "asked": "Questions that the following document answers",
    }  # fmt: skip
    sorted_ = sorted_out(texts.items(), ["what is a norm?"], tested, ASKED)
    found = {name: why for name, _, why in sorted_}
    assert found == {
        "same": TESTED, "near": TESTED, "far": "", "short": TESTED, "longer": "", "empty": EMPTY,
        "again": REPEATED, "trained": REPEATED, "label": SHORT, "asked": COPIED,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "query"),
    [
        ("\n1. What is a norm?\n2. And a scale?", "What is a norm?"),
        ("Q1: What is a norm?", "What is a norm?"),
        ("- **What is it?**", "What is it?"),
        ('"Pad an array"', "Pad an array"),
        ("2D arrays of zeros", "2D arrays of zeros"),
        ("1.5 is what of 3?", "1.5 is what of 3?"),
        ("Questions:\n 1) What is a norm?", "What is a norm?"),
        ("1. 1. What is a norm?", "What is a norm?"),
        ("**Question 2:** What is a norm?", "What is a norm?"),
        ("Question 1.\nHow is it padded?", "How is it padded?"),
        ("====\nHow is it padded?", "How is it padded?"),
        ("# Questions on norms of arrays\n- What is a norm?", "What is a norm?"),
        ("## What is a norm?", "What is a norm?"),
        ("```python\nimport numpy as np\n```\nWhat does it import?", "What does it import?"),
        ("```\nWhat is a norm?\n```", "What is a norm?"),
        ("Write questions that the document answers.\nIs it padded?", "Is it padded?"),
        ("What questions does a user of norms ask?", "What questions does a user of norms ask?"),
        (
            "\u6c42\u6570\u7ec4\u5143\u7d20\u7684\u548c",
            "\u6c42\u6570\u7ec4\u5143\u7d20\u7684\u548c",
        ),
    ],
)
def test_the_first_question_of_a_list(text, query):
    assert first_query(text, ASKED) == (query, "")


@pytest.mark.parametrize(
    ("text", "line", "why"),
    [
        ("", "", EMPTY),
        ("====\n{\n", "", EMPTY),
        ("```python\nimport numpy as np\nnp.zeros(3)", "", EMPTY),
        ("1.", "1.", SHORT),
        ("Question 1.", "Question 1.", SHORT),
        ("Question: 4", "4", SHORT),
        ("2023-02-24 12 30 5", "2023-02-24 12 30 5", SHORT),
        ("python", "python", SHORT),
        ("jax.numpy.linalg.norm", "jax.numpy.linalg.norm", SHORT),
        ("Is a\nYes.", "Is a", SHORT),
        ("Answer: the array", "Answer: the array", SHORT),
        ("\u6570\u7ec4", "\u6570\u7ec4", SHORT),
        ("Questions a user may have:", "Questions a user may have:", HEADING),
        ("### Questions on norms of arrays", "Questions on norms of arrays", HEADING),
        ("Questions on the following document", "Questions on the following document", COPIED),
        ("The following document answers many questions.",
         "The following document answers many questions.", COPIED),
    ],
)  # fmt: skip
def test_what_is_no_query(text, line, why):
    assert first_query(text, ASKED) == (line, why)


def test_documents_are_drawn_by_themselves():
    ids = [f"d{i}" for i in range(200)]
    drawn = drawn_documents(ids, 20, 0)
    assert len(drawn) == 20
    assert drawn == drawn_documents(ids[::-1], 20, 0)
    assert drawn != drawn_documents(ids, 20, 1)
    left = [i for i in ids if i != drawn[0]]
    assert {*drawn[1:]} < {*drawn_documents(left, 20, 0)}
    assert drawn_documents(ids, 500, 0) == sorted(ids)


def test_a_run_has_rows_of_the_towers_that_it_distills():
    def rows(**distill):
        named = {f"distill.{name}": value for name, value in distill.items()}
        return [system.name for system in systems_of_run(with_settings(BASE, named))]

    off = rows()
    assert rows(epochs=1.0) == [*off, "expandr-distilled"]
    assert rows(epochs=1.0, control=True) == [
        *off,
        "expandr-distilled",
        "expandr-distilled-control",
    ]
    fused = "interpolation:bm25:expandr-distilled"
    config = with_settings(BASE, {"evaluation.systems": ("bm25", fused)})
    with pytest.raises(UserError, match=r"rests on expandr-distilled, which .* distill.epochs"):
        systems_of_run(config)
    found = systems_of_run(distilling(config, {}))
    assert [system.name for system in found] == ["bm25", fused, "expandr-distilled"]
    assert {leaf.name for leaf in found[1].leaves} == {"bm25", "expandr-distilled"}


def test_what_the_command_adds_to_a_run_s_config():
    assert distilling(BASE, {}).distill == dataclasses.replace(BASE.distill, epochs=EPOCHS)
    on = with_settings(BASE, {"distill.epochs": 5.0})
    assert distilling(on, {}) == on
    assert distilling(on, {"distill.documents": 7}).distill.documents == 7
    with pytest.raises(UserError, match="=0: no query tower"):
        distilling(on, {"distill.epochs": 0.0})
    with pytest.raises(UserError, match=r"^distill\.depth is 0; expected a whole number from 1"):
        distilling(BASE, {"distill.depth": 0})
    server = with_settings(BASE, {"generator.server.url": "http://x"})
    with pytest.raises(UserError, match=r"^generator\.server\.url is .*distill\.epochs is above 0"):
        distilling(server, {})


def test_a_directory_that_holds_no_run_is_refused_in_a_line(tmp_path):
    with pytest.raises(UserError, match=r"config.json: not a run's config; expected the workdir"):
        distill(tmp_path, {"distill.epochs": 2.0}, QUIET)


def planned(**distill):
    named = {f"distill.{name}": value for name, value in distill.items()}
    return planned_programs(with_settings(smoke_on_meshes(), named), machine())


def test_a_plan_has_the_step_where_a_tower_is_distilled():
    assert [*planned(epochs=1.0)] == [*planned(), "distillation step"]
    alone, ranked = (
        planned(epochs=1.0, batch_size=16, kl_weight=weight)["distillation step"]()
        for weight in (0.0, 1.0)
    )
    width = alone.arguments[1]["targets"].shape[1]
    assert ranked.arguments[1]["documents"].shape == (16 * BASE.distill.depth, width)
    scores = 2 * 16 * 16 * BASE.distill.depth * width
    assert ranked.forward_flops - alone.forward_flops == scores
    assert "documents" not in alone.arguments[1]


@pytest.mark.slow
def test_a_planned_step_fits_and_is_compiled():
    settings = {"distill.epochs": 1.0, "distill.kl_weight": 1.0}
    config = with_settings(smoke_on_meshes(), settings)
    (row,) = plan.plan(config, machine(), QUIET, only=["distillation step"], repeats=1)["rows"]
    assert row["fits"]
    assert row["seconds"] > 0
    assert row["rows"] == 32
