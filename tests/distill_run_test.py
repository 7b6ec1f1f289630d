"""`train.distill` on a finished run: what it adds, what stays, and that a kill changes nothing."""

import json
import pathlib
import shutil
import signal
import time

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Router

from configs import smoke as smoke_config
from expandr_jax import metrics
from expandr_jax.config import read_config, with_settings
from expandr_jax.data.beir import Collection, write_beir
from expandr_jax.data.generated import drawn_documents
from expandr_jax.expansion.prompts import strip_lead_in
from expandr_jax.files.records import Journal, hash_file, write_jsonl
from expandr_jax.planning.hosts import host_rows
from expandr_jax.planning.synthetic import Counts
from expandr_jax.runtime.chips import GIB
from tests.adding_test import contents
from tests.commands import command, error_of, finish, start, start_processes, step_metrics
from tests.eight_devices import machine
from tests.processes_trainers_test import same_results, same_steps
from tests.serving import Server

SETTINGS = {
    "epochs": 2.0, "documents": 24, "batch_size": 8, "learning_rate": 1e-3, "kl_weight": 0.5,
    "depth": 4, "save_every": 2, "samples": (2, 3),
}  # fmt: skip
FILES = ("results.json", "runs", "evaluation", "distilled")
TOWER = "export/query-encoder"


def queries_of(workdir: pathlib.Path) -> dict[str, str]:
    """Document id -> a query, of the documents that are drawn; the first one has none."""
    texts = {row["_id"]: row["text"] for row in rows(workdir / "data" / "corpus.jsonl")}
    seed = json.loads((workdir / "config.json").read_text())["seed"]
    first, *others = drawn_documents(texts, SETTINGS["documents"], seed)
    asked = {i: f"how is {i} used after {' '.join(texts[i].split()[-3:])}?" for i in others}
    return {first: "", **asked}


def write_queries(workdir: pathlib.Path) -> None:
    """What a run finds sampled then: the tiny generator writes no query of three words."""
    journal = Journal(workdir / "work" / "generated-queries.jsonl")
    journal.append(
        {"query_id": document, "sample": 0, "text": f"Questions:\n1. {query}\n2. Or?",
         "tokens": 9, "finished": "length", "near_ties": 0}
        for document, query in queries_of(workdir).items()
    )  # fmt: skip
    journal.finish()


def distill(workdir, **settings):
    chosen = {**SETTINGS, **settings}
    overrides = [f"--config.distill.{name}={value}" for name, value in chosen.items()]
    return command("train.distill", f"--workdir={workdir}", *overrides)


def hashes(workdir: pathlib.Path) -> dict[str, str]:
    """The sha256 of every file that a run has."""
    paths = (path for path in workdir.rglob("*") if path.is_file())
    return {path.relative_to(workdir).as_posix(): hash_file(path) for path in paths}


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def rows(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def distilled(smoke, tmp_path_factory):
    """A copy of the smoke run with a query tower and its control: (workdir, what it printed)."""
    workdir = tmp_path_factory.mktemp("distilled") / "run"
    shutil.copytree(smoke[0], workdir)
    write_queries(workdir)
    return workdir, finish(distill(workdir, control=True))


@pytest.mark.slow
def test_it_adds_to_the_run_and_changes_nothing_of_it(smoke, distilled):
    workdir, printed = distilled
    before, after = hashes(smoke[0]), hashes(workdir)
    changed = {name for name in before if after.get(name) != before[name]}
    told = ("results.json", "config.json", "metrics.jsonl", "timings.json", "report.html",
            "work/seals.json")  # fmt: skip
    assert {name for name in changed if not name.startswith("tensorboard/")} <= {*told}
    added = ["expandr-distilled", "expandr-distilled-control"]
    old, new = (json.loads((w / "results.json").read_text()) for w in (smoke[0], workdir))
    assert new["rows"][: len(old["rows"])] == old["rows"]
    assert [row["system"] for row in new["rows"][len(old["rows"]) :]] == added
    assert new["chosen"] == old["chosen"]
    compared = {(test["system"], test["baseline"]) for test in new["significance"]}
    assert compared >= {("expandr", added[0]), (added[0], "expandr-plain"), tuple(added)}
    steps, earlier = step_metrics(workdir), step_metrics(smoke[0])
    assert steps[: len(earlier)] == earlier
    phases = {row["phase"] for row in steps[len(earlier) :]}
    assert phases == {"distill", "distill-control"}
    assert {"loss", "cosine", "kl", "grad_norm"} < steps[len(earlier)].keys()
    generated = rows(workdir / "distilled" / "queries.jsonl")
    assert len(generated) == 24
    taken = {row["document_id"]: row["query"] for row in generated if not row["left_out"]}
    assert taken == {document: q for document, q in queries_of(workdir).items() if q}
    kept = len(taken)
    assert kept == 23
    assert f"{kept} queries written for 24 documents" in printed
    assert f"{kept + 40} queries, 40 of them with judgements" in printed
    steps = [row["step"] for row in steps if row["phase"] == "distill"]
    assert steps == [*range(2 * ((kept + 40) // 8))]
    printed = finish(distill(workdir, control=True))
    assert "all is done: no model is loaded" in printed


@pytest.mark.slow
def test_its_files_are_as_large_as_planned(distilled):
    workdir, _ = distilled
    chosen = {f"distill.{name}": value for name, value in SETTINGS.items()}
    config = with_settings(
        read_config(smoke_config.get_config()), {**chosen, "distill.control": True}
    )
    documents = len(rows(workdir / "data" / "corpus.jsonl"))
    counts = Counts(documents, 32, 8, 8, 16)
    planned = {r.stage: r.bytes_disk for r in host_rows(config, counts, machine(), 8 * GIB)}
    own = workdir / "work" / "round-0"
    written = json.loads((own / "distilled-choice.json").read_text())["samples"]

    def size(*paths: pathlib.Path) -> int:
        files = [file for path in paths for file in [path, *path.rglob("*")] if file.is_file()]
        assert files
        return sum(file.stat().st_size for file in files)

    # All but the query that is none, and the file's header.
    targets = own / "distilled-targets.npy"
    assert size(targets) == pytest.approx(planned["the teacher's vectors"] * 63 / 64, rel=0.02)
    texts = [own / "distilled-expansions.jsonl", own / "distilled-dev-expansions.jsonl"]
    assert 0.3 < size(*texts) / planned["expansions to distill"] * (3 / written) < 1
    towers = [*(workdir / "checkpoints").glob("distill*"), own / "distilled-found.npy"]
    assert len(towers) == 3
    assert 0.6 < size(*towers) / planned["distillation, 2 towers"] < 1.05


@pytest.mark.slow
def test_the_exported_pair_ranks_as_the_row_does(smoke, distilled):
    """sentence-transformers' vectors of queries over the run's own vectors of documents."""
    workdir, _ = distilled
    texts = {row["_id"]: row["text"] for row in rows(workdir / "data" / "queries.jsonl")}
    corpus = rows(workdir / "data" / "corpus.jsonl")
    vectors = np.load(workdir / "work" / "vectors" / "expandr.npy")
    tower = SentenceTransformer(str(workdir / TOWER), device="cpu")
    documents = SentenceTransformer(str(workdir / "export" / "retriever"), device="cpu")
    run = metrics.read_trec(workdir / "runs" / "expandr-distilled.trec")
    queries = tower.encode_query([texts[query] for query in run])
    plain = documents.encode_query([texts[query] for query in run])
    assert (plain * queries).sum(axis=1).max() < 0.99999  # It has learned something.
    place = {row["_id"]: i for i, row in enumerate(corpus)}
    for query, found in zip(queries, run.values(), strict=True):
        scores = vectors @ query
        expected = [scores[place[document]] for document in found]
        np.testing.assert_allclose([*found.values()], expected, atol=1e-5)
        assert min(expected) >= np.sort(scores)[-len(found)] - 1e-5
    # As one model.
    router = Router.for_query_document(query_modules=[*tower], document_modules=[*documents])
    pair = SentenceTransformer(modules=[router], device="cpu")
    some = [texts[query] for query in list(run)[:3]]
    np.testing.assert_allclose(pair.encode_query(some), queries[:3], atol=1e-6)
    passages = [row["text"] for row in corpus[:3]]
    np.testing.assert_allclose(
        pair.encode_document(passages), documents.encode_document(passages), atol=1e-6
    )
    readme = (workdir / TOWER / "README.md").read_text()
    assert "for_query_document" in readme


@pytest.mark.slow
def test_its_teacher_is_the_mean_of_as_many_passages_as_dev_chose(distilled):
    """The vectors that it learns are those of sentence-transformers, averaged by numpy."""
    workdir, printed = distilled
    place = workdir / "work" / "round-0"
    choice = json.loads((place / "distilled-choice.json").read_text())
    assert choice["samples"] in SETTINGS["samples"]
    told = f"query weight {choice['query_weight']}, samples {choice['samples']} "
    assert f"teacher of expandr-distilled: expandr: {told}" in " ".join(printed.split())
    texts = {row["_id"]: row["text"] for row in rows(workdir / "data" / "queries.jsonl")}
    texts |= {row["query_id"]: row["query"] for row in rows(workdir / "distilled/queries.jsonl")}
    written = {}
    for row in rows(place / "distilled-expansions.jsonl"):
        if "query_id" in row:
            written.setdefault(row["query_id"], []).append(row)
    model = SentenceTransformer(str(workdir / "export" / "retriever"), device="cpu")
    expected, weight = [], choice["query_weight"]
    for query, several in written.items():
        assert [row["sample"] for row in several] == [*range(choice["samples"])]
        own = unit(model.encode_query(texts[query]))
        if read := [text for row in several if (text := strip_lead_in(row["text"]).strip())]:
            passages = unit(model.encode_document(read))
            own = unit(weight * own + (1 - weight) * passages.mean(axis=0))
        expected.append(own)
    targets = np.load(place / "distilled-targets.npy")
    assert len(targets) == len(expected)
    # Those of a journal stand in the order of ids, targets in that of the data.
    nearest = (np.stack(expected) @ targets.T).argmax(axis=1)
    assert len({*nearest}) > 0.9 * len(targets)
    np.testing.assert_allclose(targets[nearest], expected, atol=1e-5)
    # Evaluation has two passages of a dev query; the first of three are the same.
    dev = {(row["query_id"], row["sample"]): row["text"] for row in
           rows(place / "distilled-dev-expansions.jsonl") if "query_id" in row}  # fmt: skip
    shared = [row for row in rows(workdir / "evaluation" / "expansions.jsonl")
              if row["system"] == "expandr" and row["split"] == "dev"]  # fmt: skip
    assert len(shared) * 3 == len(dev) * 2
    for row in shared:
        text = dev[row["query_id"], row["sample"]]
        assert strip_lead_in(text).strip() == row["expansion"]


@pytest.mark.slow
def test_the_service_s_mode_is_the_row(distilled, tmp_path):
    workdir, _ = distilled
    texts = {row["_id"]: row["text"] for row in rows(workdir / "data" / "queries.jsonl")}
    run = metrics.read_trec(workdir / "runs" / "expandr-distilled.trec")
    server, differ = Server(workdir, tmp_path, "--noexpand"), 0
    for query, found in run.items():
        answers = [
            server.post("/search", query=texts[query], k=10, mode=mode)["results"]
            for mode in ("distilled", "plain")
        ]
        scores = [result["score"] for result in answers[0]]
        np.testing.assert_allclose(scores, [*found.values()][:10], atol=1e-5)
        differ += [r["score"] for r in answers[1]] != scores
    assert differ > 0.9 * len(run)
    server.stop()


@pytest.mark.slow
def test_a_further_collection_is_searched_by_the_documents_vectors_that_the_retriever_has(
    distilled, tmp_path
):
    workdir = tmp_path / "run"
    shutil.copytree(distilled[0], workdir)
    corpus = {f"d{i}": f"a text of number {i} and {i * i}" for i in range(30)}
    queries = {f"q{i}": f"which text has {i}" for i in range(6)}
    qrels = {"test": {f"q{i}": {f"d{i}": 1} for i in range(6)}}
    write_beir(tmp_path / "set", Collection("set", corpus, queries, qrels))
    fused = "interpolation:bm25:expandr-distilled"
    overrides = [f"--config.distill.{name}={value}" for name, value in SETTINGS.items()]
    overrides += [
        "--config.distill.control=True",
        f"--config.data.tests=('{tmp_path / 'set'}',)",
        f"--config.evaluation.systems={(*smoke_config.get_config().evaluation.systems, fused)}",
    ]
    finish(start(workdir, *overrides))
    results = json.loads((workdir / "results.json").read_text())
    assert fused in [row["system"] for row in results["rows"]]
    made = {path.name for path in (workdir / "work" / "vectors" / "set").glob("*.npy")}
    assert made == {"zero-shot.npy", "fine-tuned.npy", "expandr.npy"}
    tower, retriever = (
        SentenceTransformer(str(workdir / "export" / name), device="cpu")
        for name in ("query-encoder", "retriever")
    )
    vectors = retriever.encode_document([*corpus.values()])
    run = metrics.read_trec(workdir / "tests" / "set" / "runs" / "expandr-distilled.trec")
    for query, found in run.items():
        scores = dict(zip(corpus, vectors @ tower.encode_query(queries[query]), strict=True))
        np.testing.assert_allclose([*found.values()], [scores[d] for d in found], atol=1e-5)


@pytest.mark.slow
def test_killed_it_comes_to_the_same_bits(smoke, distilled, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(smoke[0], workdir)
    write_queries(workdir)
    under_way = workdir / "checkpoints" / "distilled-0"
    process = distill(workdir, control=True)
    limit = time.monotonic() + 120
    while not any(under_way.glob("[0-9]*")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < limit
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    finish(distill(workdir, control=True))
    assert contents(workdir, *FILES, TOWER) == contents(distilled[0], *FILES, TOWER)
    assert step_metrics(workdir) == step_metrics(distilled[0])


@pytest.mark.slow
def test_two_processes_distil_as_one_does(smoke, distilled, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(smoke[0], workdir)
    write_queries(workdir)
    overrides = [f"--config.distill.{name}={value}" for name, value in SETTINGS.items()]
    for process in start_processes(workdir, 2, *overrides, "--config.distill.control=True"):
        finish(process)
    same_steps(workdir, distilled[0])
    same_results(workdir, distilled[0])
    name = "work/round-0/distilled-targets.npy"
    np.testing.assert_allclose(*(np.load(w / name) for w in (workdir, distilled[0])), atol=1e-6)
    assert not list(workdir.glob("work/**/*process-*"))


@pytest.mark.slow
def test_a_run_keeps_the_queries_that_an_earlier_version_took(distilled, tmp_path):
    """Its passages, vectors and towers are of these."""
    workdir = tmp_path / "run"
    shutil.copytree(distilled[0], workdir)
    path = workdir / "distilled" / "queries.jsonl"
    first, *others = rows(path)
    assert first["left_out"]  # Which an earlier version did not.
    write_jsonl(path, [first | {"left_out": ""}, *others])
    taken = path.read_bytes()
    for kept in (workdir / "checkpoints").glob("distilled*"):
        shutil.rmtree(kept)
    for journal in (workdir / "work" / "round-0").glob("distilled-*"):
        journal.unlink()
    (workdir / "results.json").unlink()
    finish(distill(workdir, control=True))
    assert path.read_bytes() == taken


@pytest.mark.slow
def test_a_run_keeps_the_towers_that_it_has(distilled):
    process = distill(distilled[0], control=True, epochs=3.0)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "distill.epochs was 2.0, now 3.0" in error_of(output)
