"""The teacher of distilled expansion, against numpy, and what is kept of it."""

import dataclasses
import io
import types
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from configs import base
from expandr_jax.config import read_config
from expandr_jax.data.beir import Collection
from expandr_jax.data.generated import COPIED, EMPTY, REPEATED, JudgedQueries, generated_rows
from expandr_jax.expansion.strategies import STRATEGIES
from expandr_jax.objectives.distillation_stage import compared_with_teacher
from expandr_jax.ranking.choices import Choice
from expandr_jax.ranking.sources import Expansions
from expandr_jax.ranking.teacher import TAUGHT_AT_ONCE, Teacher, best_use, found_by_teacher
from expandr_jax.runtime.checksums import Checksums
from expandr_jax.runtime.processes import Processes
from expandr_jax.runtime.progress import Reporter
from expandr_jax.search import build_index
from expandr_jax.vectors.corpus import Corpus
from expandr_jax.vectors.stored import open_vectors
from tests.processes_test import COUNT, group, together  # noqa: F401 (the fixture)

SETTINGS = read_config(base.get_config()).evaluation
DISTILL = read_config(base.get_config()).distill
TEXTS = {"a": [["one", "two", "three"]], "b": [["four", "", "five"]], "c": [["", "", ""]]}


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Every text has a vector of its own, of unit length."""

    processes: Processes
    separator: str = "[SEP]"
    normalize: str = "both"
    texts: tuple = ()

    def encode(self, texts, kind, *_):
        rows = [np.random.default_rng([*f"{kind} {t}".encode()]).normal(size=8) for t in texts]
        return unit(np.stack(rows)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Searched(Encoder):
    """The same with documents."""

    corpus: Any = None


@pytest.mark.parametrize(("samples", "weight"), [(1, 0.5), (2, 0.3), (3, 0.0)])
def test_a_teacher_s_vectors_are_means_of_query_and_passages(samples, weight):
    """The mean is of those passages alone that there are; without any it is the query's own."""
    encoder = Encoder(Processes(index=1, count=2))  # Of several, the first one makes them alone.
    teacher = Teacher(encoder, STRATEGIES["q2d"], Choice(weight, samples), SETTINGS)
    queries = {query: f"query {query}" for query in TEXTS}
    found = teacher.vectors(queries, TEXTS)
    expected = []
    for query, text in queries.items():
        own = encoder.encode([text], "query")[0]
        if read := [passage for passage in TEXTS[query][0][:samples] if passage]:
            passages = encoder.encode(read, "document").mean(axis=0)
            own = weight * own + (1 - weight) * passages
        expected.append(unit(own))
    np.testing.assert_allclose(found, expected, atol=1e-6)


@dataclasses.dataclass(frozen=True)
class Whole(Encoder):
    """The same, which a file of vectors can be told to be of."""

    params: Any = dataclasses.field(default_factory=lambda: {"w": np.zeros(1)})

    @property
    def encoder(self):
        retriever = types.SimpleNamespace(identity="", pooling="mean", normalize=True, max_length=8)
        return types.SimpleNamespace(retriever=retriever, prompt=lambda kind: "")


def test_processes_make_the_teacher_s_vectors_together(group, tmp_path):  # noqa: F811
    """Each its share, in blocks; one process alone makes the same of all."""
    queries = {f"q{i}": f"query {i}" for i in range(COUNT * TAUGHT_AT_ONCE + 5)}
    texts = {query: [[f"passage of {query}"]] for query in queries}
    choice, made, told = Choice(0.5, 1), {}, {}

    class Counted(Teacher):
        def vectors(self, queries, texts):
            made[self.retriever.processes.index].append(len(queries))
            return super().vectors(queries, texts)

    def write(member, path):
        made[member.index], told[member.index] = [], []
        teacher = Counted(Whole(member), STRATEGIES["q2d"], choice, SETTINGS)
        teacher.write(path, queries, texts, told[member.index].append)
        assert open_vectors(path).shape == (len(queries), 8)  # It is there for all of them.

    together(group, lambda member: write(member, tmp_path / "divided.npy"))
    assert sum(map(sum, made.values())) == len(queries)
    assert max(map(sum, made.values())) <= len(queries) // COUNT + 1
    assert max(map(max, made.values())) <= TAUGHT_AT_ONCE
    assert [*map(sum, told.values())] == pytest.approx([len(queries)] * COUNT)
    assert {path.name for path in tmp_path.iterdir()} == {"divided.npy", "divided.npy.jsonl"}
    write(Processes(), tmp_path / "alone.npy")
    alone, divided = (open_vectors(tmp_path / f"{name}.npy") for name in ("alone", "divided"))
    np.testing.assert_allclose(divided[:], alone[:], atol=1e-6)
    together(group, lambda member: write(member, tmp_path / "divided.npy"))
    assert not any(made[member.index] for member in group)


def ndcg(scores, relevant):
    """nDCG@10 with one relevant document."""
    rank = int((scores > scores[relevant]).sum()) + 1
    return 1 / np.log2(1 + rank) if rank <= 10 else 0.0


@pytest.mark.parametrize("samples", [(), (1, 2, 4)])
def test_how_a_teacher_uses_its_passages_is_what_is_best_on_dev(samples):
    """Of a query's weights and of numbers of passages; the more tell more of what is relevant."""
    drawn, queries = np.random.default_rng(0), {f"q{i}": f"query {i}" for i in range(8)}
    texts = [[f"passage {i} of {query}" for i in range(4)] for query in queries]
    own, passages = Encoder(Processes()).encode([*queries.values()], "query"), []
    for several in texts:
        passages.append(Encoder(Processes()).encode(several, "document"))
    vectors = unit(drawn.normal(size=(60, 8)))
    # What is relevant is near the mean of all passages, and so much beside it.
    vectors[:8] = unit(np.stack(passages).mean(axis=1) + 0.15 * drawn.normal(size=(8, 8)))
    vectors = vectors.astype(np.float32)
    expected, best = None, -1.0
    for count in samples or SETTINGS.samples:
        for weight in SETTINGS.query_weights:
            mixed = [weight * q + (1 - weight) * p[:count].mean(axis=0)
                     for q, p in zip(own, passages, strict=True)]  # fmt: skip
            found = np.mean([ndcg(vectors @ query, row) for row, query in enumerate(mixed)])
            if round(found, 6) > best:
                expected, best = Choice(weight, count), round(found, 6)
    ids = [f"d{i}" for i in range(60)]
    search = dataclasses.replace(read_config(base.get_config()).search, backend="exact")
    retriever = Searched(Processes(), corpus=Corpus(ids, vectors, search))
    qrels = {"dev": {query: {f"d{row}": 1} for row, query in enumerate(queries)}}
    collection = Collection("", dict.fromkeys(ids, ""), queries, qrels)
    dev, said = Expansions(STRATEGIES["q2d"], [[several] for several in texts]), []
    assert best_use(retriever, collection, dev, SETTINGS, samples, said.append) == expected
    assert said == [f"expandr: {expected} (dev nDCG@10 {best:.4f})"]
    assert (expected.samples > 1) == bool(samples)


def test_what_teachers_find_first_is_found_block_by_block():
    rng = np.random.default_rng(0)
    documents, targets = rng.normal(size=(50, 8)), rng.normal(size=(TAUGHT_AT_ONCE + 3, 8))
    index, counts = build_index(documents.astype(np.float32), "exact"), []
    found = found_by_teacher(index, targets.astype(np.float32), 5, counts.append)
    expected = np.argsort(-targets.astype(np.float32) @ documents.astype(np.float32).T)[:, :5]
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, expected)
    assert counts == [TAUGHT_AT_ONCE, 3]


@pytest.mark.parametrize("kl_weight", [0.0, 0.5])
def test_students_are_compared_with_vectors_and_what_these_find(tmp_path, kl_weight):
    rng, depth = np.random.default_rng(0), 3
    documents = rng.normal(size=(20, 8)).astype(np.float32)
    targets = rng.normal(size=(6, 8)).astype(np.float32)
    for name, vectors in {"documents": documents, "targets": targets}.items():
        np.save(tmp_path / f"{name}.npy", vectors)
    settings = dataclasses.replace(DISTILL, kl_weight=kl_weight, depth=depth)
    ours = types.SimpleNamespace(
        corpus=types.SimpleNamespace(index=build_index(documents, "exact")), processes=Processes(),
        reporter=Reporter(Console(file=io.StringIO())), path=tmp_path / "documents.npy",
    )  # fmt: skip
    asked = settings, ours, tmp_path / "targets.npy", Checksums(tmp_path, print), "found.npy"
    indices, rows = np.array([4, 0, 5, 2]), np.array([1, 3])
    expected = {"targets": targets[[0, 2]]}
    if kl_weight:
        found = np.argsort(-targets @ documents.T)[[0, 2], :depth]
        expected["documents"] = documents[found.reshape(-1)]
    for _ in range(2):
        made = compared_with_teacher(*asked)(indices, rows)
        assert made.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(made[name], array)
        ours.corpus.index = None  # What was found is kept.


def test_an_array_is_made_once_and_again_when_it_is_damaged(tmp_path):
    made = []

    def make():
        made.append(len(made))
        return np.arange(4) + 10 * len(made)

    path = Checksums(tmp_path, print).array("work/x.npy", make)
    assert path == tmp_path / "work" / "x.npy"
    assert Checksums(tmp_path, print).array("work/x.npy", make) == path
    assert made == [0]
    path.write_bytes(path.read_bytes()[:-1])
    Checksums(tmp_path, print).array("work/x.npy", make)
    np.testing.assert_array_equal(np.load(path, allow_pickle=False), np.arange(4) + 20)


def test_generated_queries_have_rows_by_their_documents():
    written = {
        ("d1", 0): "What is a norm?", ("d1", 1): "", ("d2", 0): "1. what is a norm",
        ("d2", 1): "Write a question on it",
    }  # fmt: skip
    rows = generated_rows(written, "d2q", [], [], "Write a question on a document")
    assert [[*row.values()] for row in rows] == [
        ["d2q/d1/0", "d1", "What is a norm?", ""],
        ["d2q/d1/1", "d1", "", EMPTY],
        ["d2q/d2/0", "d2", "what is a norm", REPEATED],
        ["d2q/d2/1", "d2", "Write a question on it", COPIED],
    ]
    assert [*rows[0]] == ["query_id", "document_id", "query", "left_out"]


def test_judged_queries_have_a_key_of_texts_and_judgements():
    queries = JudgedQueries({"a": "query"}, [["d1", "d2"]])
    assert queries.key == JudgedQueries({"a": "query"}, [("d1", "d2")]).key
    assert queries.key != JudgedQueries({"a": "query"}, [["d2", "d1"]]).key
    assert queries.key != JudgedQueries({"a": "another"}, [["d1", "d2"]]).key
