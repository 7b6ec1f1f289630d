"""`eval.serve` on a finished run: what it answers, what it refuses, what stays over a restart."""

import concurrent.futures
import dataclasses
import json
import random
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from eval.finished import check_installed, open_finished
from eval.load import counts
from eval.serve import access_of, listen, state_of
from expandr_jax.data.beir import read_beir
from expandr_jax.errors import UserError
from expandr_jax.files.records import read_jsonl
from expandr_jax.models.pooling import l2_normalize
from expandr_jax.ranking.gate import read_gates, write_gates
from expandr_jax.ranking.gate_features import BEFORE
from expandr_jax.search import build_index
from expandr_jax.sharding import make_mesh
from expandr_jax.vectors.encoder import TextEncoder
from expandr_jax.weights.hf import load_retriever
from tests.commands import ROOT, command, finish, start
from tests.serving import Server

QUESTION = "Scale the gradient by a factor."


@pytest.fixture(scope="module")
def encoded(smoke):
    """The run's documents, and a function from texts to vectors, by the library's other half."""
    retriever, params = load_retriever(str(smoke[0] / "export" / "retriever"))
    encoder = TextEncoder(retriever, make_mesh())
    corpus = dict(read_beir(smoke[0] / "data").corpus)
    return corpus, lambda texts, kind: encoder.encode(params, texts, kind)


def check_results(results, vector, corpus, encode) -> None:
    """Compares with an index that is built anew."""
    vectors = encode(list(corpus.values()), "document")
    scores, rows = build_index(vectors, "exact").search(vector[None], len(results))
    np.testing.assert_allclose([r["score"] for r in results], scores[0], atol=2e-5)
    ids = list(corpus)
    same = [r["id"] == ids[row] for r, row in zip(results, rows[0], strict=True)]
    assert np.mean(same) > 0.8  # But for near ties.
    assert all(r["text"] == corpus[r["id"]] for r in results)


def test_plain_search_is_that_of_an_index_built_anew(service, encoded):
    corpus, encode = encoded
    answer = service.post("/search", query=QUESTION, k=20)
    assert (answer["mode"], answer["late"], answer["expansion"]) == ("plain", False, None)
    check_results(answer["results"], encode([QUESTION], "query")[0], corpus, encode)
    assert set(answer["seconds"]) == {"encode", "search", "total"}


@pytest.mark.parametrize("question", [QUESTION, "Return the learning rate of a schedule."])
def test_expanded_search_is_the_run_s_and_greedy(service, smoke, encoded, question):
    corpus, encode = encoded
    before = service.metric("expandr_compilations_total")
    first = service.post("/search", query=question, k=10, mode="expanded", timeout_ms=60_000)
    again = service.post("/search", query=question, k=10, mode="expanded")
    assert (first["expansion"]["cached"], again["expansion"]["cached"]) == (False, True)
    assert first["expansion"]["texts"] == again["expansion"]["texts"]
    assert first["results"] == again["results"]
    assert service.post("/expand", query=question)["expansion"] == again["expansion"]
    chosen = json.loads((smoke[0] / "results.json").read_text())["chosen"]["expandr"]
    weight, (text,) = chosen["query_weight"], first["expansion"]["texts"]
    query, passage = encode([question], "query")[0], encode([text], "document")[0]
    config = json.loads((smoke[0] / "config.json").read_text())["config"]
    assert config["contrastive"]["normalize"] == "both"
    query, passage = (np.asarray(l2_normalize(v)) for v in (query, passage))
    # Where the model said nothing, the query is alone.
    mixed = weight * query + (1 - weight) * passage if text else query
    mixed = np.asarray(l2_normalize(mixed))
    check_results(first["results"], mixed, corpus, encode)
    assert service.metric("expandr_compilations_total") == before


def test_what_is_asked_together_is_batched_and_answers_are_the_same(service, smoke):
    rows = read_jsonl(smoke[0] / "data" / "queries.jsonl", {"text": str})
    queries = [row["text"] for _, row in rows][:40]
    alone = [service.post("/search", query=query, k=5) for query in queries]
    before = service.metric("expandr_compilations_total")
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        together = list(pool.map(lambda query: service.post("/search", query=query, k=5), queries))
    for one, other in zip(alone, together, strict=True):
        scores = [[r["score"] for r in answer["results"]] for answer in (one, other)]
        np.testing.assert_allclose(*scores, atol=2e-6)
    assert service.metric("expandr_compilations_total") == before
    batches = service.metric('expandr_batch_size_count{step="search"}')
    assert service.metric('expandr_batch_size_sum{step="search"}') > batches


def test_documents_come_and_go(service, encoded):
    corpus, encode = encoded
    text = "Fits a sinusoid to samples."
    new = {"id": "some/new:one", "title": "Fits", "text": "a sinusoid to samples."}
    replaced = {"id": next(iter(corpus)), "text": "Another text."}
    before = service.metric("expandr_compilations_total")
    answer = service.post("/documents", documents=[new, replaced])
    assert answer == {"added": 1, "replaced": 1}
    assert service.metric("expandr_compilations_total") == before
    now = {name: corpus[name] for name in corpus if name != replaced["id"]}
    now |= {new["id"]: text, replaced["id"]: "Another text."}
    found = service.post("/search", query=text, k=20)["results"]
    check_results(found, encode([text], "query")[0], now, encode)
    assert service.ask("GET", "/documents/some/new%3Aone")[1] == {"id": new["id"], "text": text}
    assert service.ask("DELETE", f"/documents/{new['id']}")[1] == {"removed": True}
    assert [service.ask(m, f"/documents/{new['id']}")[0] for m in ("GET", "DELETE")] == [404, 404]
    service.post("/documents", documents=[{"id": replaced["id"], "text": corpus[replaced["id"]]}])
    names = list(corpus)[:3]
    limited = service.post("/search", query=text, k=9, filter={"ids": [*names, "absent"]})
    assert sorted(r["id"] for r in limited["results"]) == sorted(names)


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/search", {"query": ""}, 422),
        ("POST", "/search", {"query": " \n"}, 422),
        ("POST", "/search", {"query": "x" * 2001}, 422),
        ("POST", "/search", {"query": "x", "k": 0}, 422),
        ("POST", "/search", {"query": "x", "k": "3"}, 422),
        ("POST", "/search", {"query": "x", "k": 10**40}, 422),
        ("POST", "/search", {"query": "x", "mode": "best"}, 422),
        ("POST", "/search", {"query": "x", "kk": 1}, 422),
        ("POST", "/search", {"query": ["x"]}, 422),
        ("POST", "/search", b'{"query": "\\ud800"}', 422),
        ("POST", "/search", b'{"query": "x", "k": NaN}', 422),
        ("POST", "/search", b"[" * 100_000, 400),
        ("POST", "/search", b"\xff\xfe", 422),
        ("POST", "/search", b"", 422),
        ("POST", "/search", {"query": "x", "mode": "auto"}, 409),
        ("POST", "/search", {"query": "x", "mode": "distilled"}, 409),
        ("POST", "/documents", {"documents": []}, 422),
        ("POST", "/documents", {"documents": [{"id": "a b", "text": "x"}]}, 422),
        ("POST", "/documents", {"documents": [{"id": "a", "text": "x"}] * 2}, 422),
        ("POST", "/documents", {"documents": [{"id": "a", "text": "x" * 100_001}]}, 422),
        ("GET", "/documents/..%2f..%2fetc%2fpasswd", None, 404),
        ("GET", "/documents/", None, 422),
        ("GET", "/docs", None, 404),
        ("PUT", "/search", {"query": "x"}, 405),
    ],
)  # fmt: skip
def test_a_bad_request_gets_a_reason(service, method, path, body, status):
    found, answer, _ = service.ask(method, path, body)
    assert found == status, answer
    assert set(answer) == {"error"}
    assert set(answer["error"]) == {"reason", "message"}


def test_a_late_passage_leaves_the_plain_result(service):
    query = f"A question of its own {random.random()}"
    answer = service.post("/search", query=query, mode="expanded", timeout_ms=1)
    assert (answer["mode"], answer["late"], answer["expansion"]) == ("plain", True, None)
    assert answer["results"] == service.post("/search", query=query)["results"]
    # It was written all the same, and is there now or soon.
    answer = service.post("/search", query=query, mode="expanded", timeout_ms=60_000)
    assert answer["expansion"]["texts"]


def test_the_page_s_client_adds_a_document_and_finds_it(service):
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "serve.md").read_text(), re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line.strip()]) == 10
    code = code.replace("127.0.0.1:8000", f"127.0.0.1:{service.port}")
    found = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, timeout=60)
    assert found.returncode == 0, found.stderr
    assert len(found.stdout.splitlines()) == 10
    assert service.ask("DELETE", "/documents/mine")[1] == {"removed": True}


def test_pages_elsewhere_are_not_answered(service):
    for headers in (
        {"Host": "evil.example"},
        {"Origin": "http://evil.example"},
        {"Content_Type": "text/plain"},
    ):
        status, answer, _ = service.ask("POST", "/search", {"query": "x"}, **headers)
        assert status in (403, 415), answer


def test_a_second_server_on_one_state_is_refused(service, smoke, tmp_path_factory):
    state = next(a for a in service.process.args if a.startswith("--state="))
    process = command("eval.serve", f"--workdir={smoke[0]}", state, "--port=0")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2, output
    assert "another server has this state" in output


@pytest.mark.slow
def test_auto_does_what_the_run_s_gate_said_of_each_query(smoke, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(smoke[0], run)
    systems = json.loads((run / "config.json").read_text())["config"]["evaluation"]["systems"]
    finish(start(run, f"--config.evaluation.systems={(*systems, BEFORE)}"))
    said = {
        row["query_id"]: row["probability"]
        for _, row in read_jsonl(run / "evaluation" / "gated.jsonl", {"probability": float})
    }
    between = float(np.median(list(said.values())))
    assert 0 < sum(chance >= between for chance in said.values()) < len(said)
    path = run / "evaluation" / "gates.json"
    gate = dataclasses.replace(read_gates(path)[BEFORE], threshold=between)
    write_gates(path, {BEFORE: gate})
    texts = read_beir(run / "data").queries
    server = Server(run, tmp_path / "state")
    server.wait_for("are compiled")
    assert server.ask("GET", "/health")[1]["ready"]["auto"]
    for query, chance in said.items():
        if abs(chance - between) < 1e-5:  # Scores in runs/ are rounded.
            continue
        answer = server.post("/search", query=texts[query], mode="auto", timeout_ms=60_000)
        assert answer["mode"] == ("expanded" if chance >= between else "plain")
        same = server.post("/search", query=texts[query], mode=answer["mode"])
        assert [r["id"] for r in answer["results"]] == [r["id"] for r in same["results"]]
        assert "gate" in answer["seconds"]
    server.stop()


@pytest.mark.slow
def test_the_run_is_not_touched_and_writes_outlast_a_kill(smoke, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in smoke[0].rglob("*") if p.name != "serve"}
    server = Server(smoke[0], tmp_path, "--noexpand")
    server.post("/documents", documents=[{"id": "kept", "text": "A text that is kept."}])
    server.process.send_signal(signal.SIGKILL)
    server.process.wait()
    server = Server(smoke[0], tmp_path, "--noexpand")
    assert server.ask("GET", "/documents/kept")[1]["text"] == "A text that is kept."
    assert server.post("/search", query="A text that is kept.", k=1)["results"][0]["id"] == "kept"
    status, answer, _ = server.ask("POST", "/search", {"query": "x", "mode": "expanded"})
    assert (status, answer["error"]["reason"]) == (409, "no-generator")
    server.stop()
    assert before == {p: p.stat().st_mtime_ns for p in smoke[0].rglob("*") if p.name != "serve"}


@pytest.mark.parametrize(
    ("host", "token", "names", "message"),
    [
        ("0.0.0.0", "", [], "set EXPANDR_SERVE_TOKEN"),
        ("0.0.0.0", "secret", [], "add --names=NAME"),
        ("0.0.0.0", "secret", ["Box"], None),
        ("127.0.0.1", "", ["Box"], None),
        ("127.0.0.1", " sécret of a file\n", ["Box"], None),
    ],
)
def test_a_service_for_others_wants_a_token_and_a_name(monkeypatch, host, token, names, message):
    monkeypatch.setenv("EXPANDR_SERVE_TOKEN", token)
    if message:
        with pytest.raises(UserError, match=message):
            access_of(host, names)
    else:
        access = access_of(host, names)
        assert access.token == token.strip()
        sent = f"Bearer {token.strip()}".encode().decode("latin-1")  # As headers are read.
        headers = {"host": "box", "authorization": sent}
        assert access.refuses("GET", "/", headers) is None
        without = access.refuses("GET", "/", headers | {"authorization": "Bearer"})
        assert bool(without) == bool(token)
        assert "box" in access.hosts
        assert ("localhost" in access.hosts) == (host == "127.0.0.1")


def test_a_package_that_is_missing_is_named():
    check_installed("serve", "fastapi", "uvicorn")
    message = r"no_such_package is not installed: pip install 'expandr-jax\[serve\]'"
    with pytest.raises(UserError, match=message):
        check_installed("serve", "fastapi", "no_such_package")


@pytest.mark.parametrize(
    "chosen",
    [{}, [], None, {"query_weight": "much", "samples": 1}, {"query_weight": 0.5, "samples": 0},
     {"query_weight": 0.5, "samples": 1, "combine": "best"}, {"query_weight": None, "samples": 1}],
)  # fmt: skip
def test_a_damaged_choice_is_told(smoke, tmp_path, chosen):
    (tmp_path / "export" / "generator").mkdir(parents=True)
    shutil.copy(smoke[0] / "config.json", tmp_path)
    (tmp_path / "results.json").write_text(json.dumps({"chosen": {"expandr": chosen}}))
    with pytest.raises(UserError, match="what dev chose for expandr is damaged"):
        open_finished(tmp_path)


def test_what_is_no_state_of_a_service_is_refused(tmp_path):
    for workdir, state in (("gs://bucket/run", None), ("run", "gs://bucket/state")):
        with pytest.raises(UserError, match="add --state=DIR, a directory of this machine"):
            state_of(workdir, state)
    with pytest.raises(UserError, match="is the run, which is only read"):
        state_of(str(tmp_path), f"{tmp_path}/../{tmp_path.name}")
    assert state_of(str(tmp_path), None) == tmp_path / "serve"
    assert state_of("gs://bucket/run", str(tmp_path)) == tmp_path


@pytest.mark.parametrize("clients", [[], ["a"], ["0"], ["-1"], ["1", ""], ["9" * 5000]])
def test_numbers_of_clients_that_are_none(clients):
    with pytest.raises(UserError, match="expected numbers from 1 to"):
        counts(clients)


def test_a_port_that_is_taken_gets_one_line(service):
    with pytest.raises(UserError, match="choose another"):
        listen("127.0.0.1", service.port)
