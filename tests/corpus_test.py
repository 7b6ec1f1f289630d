"""Texts and a corpus as vectors and as an index, as a run has them."""

import dataclasses
import io
import pathlib
import types

import numpy as np
import pytest
from rich.console import Console

from configs import base, smoke
from expandr_jax.config import read_config
from expandr_jax.errors import NotFiniteError
from expandr_jax.runtime.processes import Processes
from expandr_jax.runtime.run import Run
from expandr_jax.search import ExactIndex, ScannIndex, scann
from expandr_jax.sharding import make_mesh
from expandr_jax.vectors.corpus import Corpus, CorpusRetriever
from expandr_jax.vectors.encoder import TextEncoder
from expandr_jax.weights.hf import load_retriever
from tests.processes_test import group, together  # noqa: F401 (the fixture)
from train.encoding import run_retriever

needs_scann = pytest.mark.skipif(not scann.installed(), reason="there is no ScaNN wheel")
VECTORS = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
TINY = str(pathlib.Path(__file__).parent.parent / "configs" / "tiny" / "tiny-bert")
TEXTS = {"d-first": "the loss of an array", "d-bad": "a gradient", "d-last": "the array"}


@pytest.fixture(scope="module")
def model():
    """A retriever, with weights that make no finite vector of "a gradient" alone."""
    retriever, params = load_retriever(TINY, max_length=16)
    models = types.SimpleNamespace(encoder=TextEncoder(retriever, make_mesh()), normalize="both")
    ids = {
        name: set(tokens)
        for name, tokens in zip(TEXTS, retriever.token_ids([*TEXTS.values()], ""), strict=True)
    }
    bad = sorted(ids["d-bad"] - ids["d-first"] - ids["d-last"])
    return models, {**params, "embedding": params["embedding"].at[np.array(bad)].set(np.nan)}


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "run", read_config(smoke.get_config()), Console(file=io.StringIO()))
    run.last_good = "step 7 somewhere"
    yield run
    run.close()


def test_a_document_without_a_finite_vector_is_named_with_the_last_checkpoint(model, run):
    models, params = model
    with (
        pytest.raises(
            NotFiniteError,
            match=r"^document d-bad: .*zero-shot.npy.part.*'a gradient'.*not finite;.*"
            r"The last good checkpoint: step 7 somewhere$",
        ),
        run.phase("encode"),
    ):
        _ = run_retriever(run, models, TEXTS, params, "zero-shot").corpus


def test_documents_that_are_cut_are_told(run):
    retriever, params = load_retriever(TINY, max_length=6)
    models = types.SimpleNamespace(encoder=TextEncoder(retriever, make_mesh()), normalize="before")
    texts = {"short": "the loss", "long": "the loss of an array of the norm", "longer": "norm " * 9}
    for _ in range(2):  # Also where they are encoded already.
        corpus = run_retriever(run, models, texts, params, "zero-shot").corpus
        assert corpus.normalize == "before"
        printed = " ".join(run.console.file.getvalue().split())
        assert "2 of 3 documents (66.7 %) are longer than retriever.max_length, 6" in printed
        run.console.file.truncate(0)


def test_queries_and_other_texts_that_are_cut_are_told_when_all_is_encoded(run):
    retriever, params = load_retriever(TINY, max_length=6)
    (ids,) = retriever.token_ids(["the loss"])  # Of which none is lost.
    retriever = dataclasses.replace(retriever, query_length=len(ids))
    models = types.SimpleNamespace(encoder=TextEncoder(retriever, make_mesh()), normalize="before")
    found = run_retriever(run, models, TEXTS, params, "zero-shot")
    long = "the loss of an array of the norm"
    for _ in range(2):
        found.encode(["the loss", long], "query")
    found.encode(["the loss", "the loss", long], "document")
    assert "longer" not in run.console.file.getvalue()
    found.release()
    printed = " ".join(run.console.file.getvalue().split())
    assert "zero-shot: 2 of 4 texts that are read as queries (50.0 %) are longer than" in printed
    assert "1 of 3 texts that are read as documents (33.3 %) are" in printed
    run.console.file.truncate(0)
    found.release()
    assert "longer" not in run.console.file.getvalue()


def test_a_query_without_a_finite_vector_is_named(model, run):
    models, params = model
    retriever = run_retriever(run, models, TEXTS, params, "zero-shot")
    with pytest.raises(NotFiniteError, match=r"^d-bad: text 1 .'a gradient'.: .*not finite"):
        retriever.encode(list(TEXTS.values()), "query", list(TEXTS))
    with pytest.raises(NotFiniteError, match=r"^text 1 .'a gradient'.: .*not finite"):
        retriever.encode(list(TEXTS.values()), "query")


def section(**settings):
    config = base.get_config()
    config.update_from_flattened_dict(settings)
    return read_config(config).search


@needs_scann
@pytest.mark.parametrize("backend", ["auto", "scann"])
def test_scann_has_its_options(backend):
    settings = {"search.backend": backend, "search.scann.method": "tree",
                "search.scann.leaves": 3, "search.exact.block_rows": 7}  # fmt: skip
    index = Corpus([], VECTORS, section(**settings)).index
    assert isinstance(index, ScannIndex)
    assert (index.method, index.leaves) == ("tree", 3)


@needs_scann
def test_results_are_exact_unless_the_index_is_asked_for():
    """Where one leaf of a tree is looked at, training finds a part of what there is."""
    vectors = np.random.default_rng(1).normal(size=(2000, 8)).astype(np.float32)
    queries, ids = vectors[:50] + 0.1, [str(i) for i in range(len(vectors))]
    tree = {"search.scann.method": "tree", "search.scann.leaves": 40,
            "search.scann.leaves_to_search": 1}  # fmt: skip
    exact = np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, :10]
    corpus = Corpus(ids, vectors, section(**tree))
    assert corpus.approximate
    np.testing.assert_array_equal(corpus.evaluated.search(queries, 10)[1], exact)
    assert corpus.recall(queries, 10) == 1.0
    assert "index" not in vars(corpus)  # It is not built for this.
    asked = Corpus(ids, vectors, section(**tree, **{"search.evaluation": "index"}))
    assert asked.evaluated is asked.index
    found = asked.index.search(queries, 10)[1]
    shares = [len({*a} & {*b}) / 10 for a, b in zip(exact.tolist(), found.tolist(), strict=True)]
    assert asked.recall(queries, 10) == pytest.approx(np.mean(shares))
    assert 0.01 < asked.recall(queries, 10) < 0.9


@pytest.mark.parametrize("evaluation", ["exact", "index"])
def test_a_small_corpus_has_one_index_for_both(evaluation):
    settings = section(**{"search.evaluation": evaluation})
    corpus = Corpus([str(i) for i in range(60)], VECTORS, settings)
    assert not corpus.approximate
    assert corpus.evaluated is corpus.index


def test_exact_search_has_its_own():
    settings = {"search.backend": "exact", "search.scann.method": "tree",
                "search.exact.block_rows": 7}  # fmt: skip
    index = Corpus([], VECTORS, section(**settings)).index
    assert isinstance(index, ExactIndex)
    assert index.options.block_rows == 7


def test_processes_encode_together_for_all_or_for_the_first_alone(group, tmp_path):  # noqa: F811
    retriever, params = load_retriever(TINY, max_length=6)
    encoder, texts = TextEncoder(retriever, make_mesh()), [*TEXTS.values()] * 3
    lost: list[bool] = []
    expected = encoder.encode(params, texts, "query", None, lost.extend)
    assert any(lost)

    def encode(member: Processes) -> list[np.ndarray]:
        told = []
        own = CorpusRetriever(
            encoder, params, {}, tmp_path / "v.npy", "float32", section(), member,
            types.SimpleNamespace(say=told.append), tmp_path / "shares", "both",
        )  # fmt: skip
        options = [{}, {"main_alone": True}, {"main_alone": True}]
        made = [own.encode(texts, "query", **each) for each in options]
        own.release()
        (line,) = told  # Each tells of all texts, of three calls.
        assert f"{3 * sum(lost)} of {3 * len(texts)} texts that are read as queries" in line
        member.barrier()
        assert not [*(tmp_path / "shares").iterdir()]
        member.barrier()
        return made

    for index, (every, *others) in enumerate(together(group, encode)):
        np.testing.assert_allclose(every, expected, atol=1e-6)
        for found in others:
            assert found.shape == (len(texts) if index == 0 else 0, expected.shape[1])
            np.testing.assert_array_equal(found, every[: len(found)])
