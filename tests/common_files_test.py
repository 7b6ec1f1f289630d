"""Files that all processes of a run have in common are read by one of them to be told apart."""

import copy
import io
import shutil
import threading

import pytest
from rich.console import Console

from configs import smoke
from expandr_jax.config import read_config, with_settings
from expandr_jax.data import beir, documents
from expandr_jax.data.beir import Collection, write_beir
from expandr_jax.data.collect import prepare_data
from expandr_jax.errors import UserError
from expandr_jax.runtime.checksums import Checksums
from expandr_jax.runtime.run import Run
from tests.processes_test import COUNT, group, together  # noqa: F401 (the fixture)
from train import evaluation
from train.evaluation import evaluate_benchmarks

own = threading.local()


@pytest.fixture
def hashed(monkeypatch):
    """Which processes have read a file to hash it."""
    found = []
    for module in (beir, documents):
        original = module.hash_once

        def counted(path, original=original):
            found.append(own.index)
            return original(path)

        monkeypatch.setattr(module, "hash_once", counted)
    return found


def write(directory, name):
    corpus = {f"d{i}": f"document {name} {i}" for i in range(12)}
    queries = {f"q{i}": f"asked {name} {i}" for i in range(12)}
    ends = {"train": (0, 8), "dev": (8, 10), "test": (10, 12)}
    judged = {s: {f"q{i}": {f"d{i}": 1} for i in range(*of)} for s, of in ends.items()}
    write_beir(directory, Collection(name, corpus, queries, judged))


@pytest.mark.parametrize("common", [True, False])
def test_process_0_alone_hashes_the_run_s_data_where_all_have_one_workdir(
    group,  # noqa: F811
    tmp_path,
    hashed,
    common,
):
    write(tmp_path / "in", "x")
    settings = {"data.kind": "beir", "data.path": str(tmp_path / "in")}
    config = with_settings(read_config(smoke.get_config()), settings).data

    def prepared(member):
        own.index = member.index
        checksums = Checksums(tmp_path / "run", print)
        checksums.processes = member
        return prepare_data(config, checksums, None).collection

    together(group, prepared)
    hashed.clear()
    for member in group:
        member.files.common = common
    first, *others = together(group, prepared)
    assert {*hashed} == ({0} if common else {*range(COUNT)})
    assert all(other == first for other in others)
    assert dict(first.corpus) == {f"d{i}": f"document x {i}" for i in range(12)}


def test_process_0_alone_hashes_test_collections(group, tmp_path, hashed, monkeypatch):  # noqa: F811
    write(tmp_path / "first", "first")
    settings = with_settings(
        read_config(smoke.get_config()), {"data.tests": (str(tmp_path / "first"),)}
    )
    run = Run(tmp_path / "run", settings, Console(file=io.StringIO()))
    run.close()
    monkeypatch.setattr(evaluation, "results_table", lambda results: "")
    ranked = []

    def evaluate(run, models, data, *_, folder, chosen):
        ranked.append(dict(data.collection.corpus))
        return {"rows": []}

    monkeypatch.setattr(evaluation, "evaluate_systems", evaluate)

    def scored(member):
        own.index = member.index
        mine = copy.copy(run)
        mine.processes, mine.checksums = member, copy.copy(run.checksums)
        mine.checksums.processes = member
        try:
            evaluate_benchmarks(mine, None, {}, {}, {})
        except UserError as error:
            return str(error)

    assert together(group, scored) == [None] * COUNT
    assert {*hashed} == {0}
    assert len(ranked) == COUNT
    assert all(corpus == ranked[0] for corpus in ranked)
    # One of the machines has another version of it, of which it reads all but the documents.
    original = evaluation.find_benchmarks

    def found(paths):
        return original([str(tmp_path / "copy" / "first")] if own.index == 2 else paths)

    monkeypatch.setattr(evaluation, "find_benchmarks", found)
    for name, before, after, refused in (
        ("corpus.jsonl", "document first 3", "another", False),
        ("queries.jsonl", "asked", "taken", True),
        ("qrels/test.tsv", "\t1\n", "\t2\n", True),
    ):
        shutil.copytree(tmp_path / "first", tmp_path / "copy" / "first", dirs_exist_ok=True)
        path = tmp_path / "copy" / "first" / name
        path.write_text(path.read_text().replace(before, after, 1))
        ranked.clear()
        told = together(group, scored)
        if refused:
            message = "not the same for all processes; copy it once more"
            assert told == [
                f"{tmp_path / part / 'first'}: queries or judgements are {message}"
                for part in ("", "", "copy")
            ]
            assert not ranked
        else:
            assert told == [None] * COUNT
            assert ranked == [ranked[0]] * COUNT
