"""The service and its API around models that do as they are told: queues, deadlines, refusals."""

import asyncio
import json
import threading
import time
import types

import numpy as np
import pytest

from expandr_jax.errors import UserError
from expandr_jax.ranking.gate import Gate
from expandr_jax.ranking.gate_features import PlainSearch, features_before
from expandr_jax.search import Bm25Index
from expandr_jax.serving import guard
from expandr_jax.serving.cache import Expansion
from expandr_jax.serving.documents import Hit, View
from expandr_jax.serving.gate import QueryGate
from expandr_jax.serving.guard import MOST_BODY, Access
from expandr_jax.serving.pair import Answered
from expandr_jax.serving.prometheus import ServiceMetrics
from expandr_jax.serving.service import Limits, Refused, Service
from expandr_jax.serving.snapshots import Base

pytest.importorskip("fastapi", reason="the extra serve is not installed")
from expandr_jax.serving.app import make_app


class Models:
    """A pair, documents and expansions in one, which wait while `held` is set."""

    distilled = gate = None
    at_once = 4
    writes = 0

    def __init__(self):
        self.goes_on, self.calls, self.fails = threading.Event(), [], False
        self.goes_on.set()

    def search(self, asked):
        self.calls.append([one.query for one in asked])
        assert self.goes_on.wait(10)
        if self.fails:
            raise RuntimeError("a secret question")
        return [
            Answered([Hit("id", 0.5, one.query)], 0.0, 0.0, 0.1, one.gated and "hard" in one.query)
            for one in asked
        ]

    def find(self, query):
        return Expansion(("kept",), np.zeros((1, 2)), True) if query == "kept" else None

    def make(self, queries):
        self.calls.append(list(queries))
        assert self.goes_on.wait(10)
        return [Expansion((f"about {query}",), np.zeros((1, 2))) for query in queries]

    def put(self, documents):
        raise OSError(28, "No space left on device")

    def __len__(self):
        return 1

    def close(self):
        pass


@pytest.fixture
def models():
    return Models()


@pytest.fixture
def service(models):
    service = Service(ServiceMetrics(), Limits(searches=2, expansions=2, writes=1))
    service.begin(models, models)
    service.begin_expanding(models)
    yield service
    models.goes_on.set()
    service.close()


async def until(condition):
    """Waits for something that another thread is to do."""
    limit = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < limit
        await asyncio.sleep(0.002)


async def call(app, method, path, *parts: bytes, waits=None, **headers):
    """Status, headers and answer of a request to an ASGI application; `waits` holds its end up."""
    names = {"host": "localhost", "content-type": "application/json", **headers}
    received = [{"type": "http.request", "body": p, "more_body": True} for p in parts]
    received.append({"type": "http.request", "body": b"", "more_body": False})
    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        if waits and len(received) == 1:
            await waits.wait()
        return received.pop(0)

    scope = {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(),
        "query_string": b"", "scheme": "http", "http_version": "1.1", "root_path": "",
        "headers": [(k.encode(), v.encode()) for k, v in names.items()],
    }  # fmt: skip
    await app(scope, receive, send)
    start, *bodies = sent
    content = json.loads(b"".join(message["body"] for message in bodies))
    return start["status"], dict(start["headers"]), content


def test_what_is_more_than_may_wait_is_refused_and_may_come_again(service, models):
    app = make_app(service, Access())

    async def run():
        models.goes_on.clear()
        body = b'{"query": "a"}'
        waiting = [asyncio.create_task(call(app, "POST", "/search", body))]
        await until(lambda: models.calls)
        waiting += [asyncio.create_task(call(app, "POST", "/search", body)) for _ in range(2)]
        await until(lambda: len(service._searches) == 2)
        refused = await call(app, "POST", "/search", body)
        models.goes_on.set()
        return refused, await asyncio.gather(*waiting), await call(app, "POST", "/search", body)

    (status, headers, answer), others, again = asyncio.run(run())
    assert (status, answer["error"]["reason"]) == (429, "busy")
    assert int(headers[b"retry-after"]) >= 1
    assert [one[0] for one in (*others, again)] == [200] * 4


def test_a_late_passage_is_left_out_and_made_all_the_same(service, models):
    async def run():
        models.goes_on.clear()
        late = asyncio.create_task(service.search("new", 1, "expanded", 0.05))
        await until(lambda: models.calls)
        start = time.perf_counter()
        await asyncio.sleep(0.1)
        models.goes_on.set()
        answer = await late
        assert time.perf_counter() - start < 5
        return answer, await service.search("kept", 1, "expanded", 0.05)

    late, kept = asyncio.run(run())
    assert (late.mode, late.late, late.expansion) == ("plain", True, None)
    assert (kept.mode, kept.late, kept.expansion.texts) == ("expanded", False, ("kept",))
    assert models.calls[0] == ["new"]
    assert models.calls.count(["new"]) == 2  # Its passage, and its search.


def test_passages_that_are_asked_for_together_are_written_together(service, models):
    async def run():
        models.goes_on.clear()
        tasks = [asyncio.create_task(service.expand("a", 5))]
        await until(lambda: models.calls)
        tasks += [asyncio.create_task(service.expand(query, 5)) for query in "bc"]
        await until(lambda: len(service._passages) == 2)
        with pytest.raises(Refused) as refused:
            await service.expand("d", 5)
        models.goes_on.set()
        return refused.value, await asyncio.gather(*tasks)

    refused, made = asyncio.run(run())
    assert refused.status == 429
    assert [expansion.texts[0] for expansion, _ in made] == ["about a", "about b", "about c"]
    assert models.calls == [["a"], ["b", "c"]]


def test_auto_expands_what_the_gate_says(service, models):
    async def ask(query, timeout=10):
        return await service.search(query, 1, "auto", timeout)

    with pytest.raises(Refused, match="add expandr-gated to its evaluation") as refused:
        asyncio.run(ask("easy"))
    assert refused.value.status == 409
    models.gate = types.SimpleNamespace(is_ready=True)
    easy, hard = asyncio.run(ask("easy")), asyncio.run(ask("hard"))
    assert (easy.mode, easy.expansion, hard.mode) == ("plain", None, "expanded")
    assert hard.expansion.texts == ("about hard",)
    assert models.calls == [["easy"], ["hard"], ["hard"], ["hard"]]  # Searched, written, searched.
    assert set(easy.seconds) == {"encode", "search", "gate", "total"}
    assert set(hard.seconds) == {*easy.seconds, "expand"}

    released = threading.Event()
    models.make = lambda queries: released.wait(10) and [Expansion((), np.zeros((0, 2)))]
    answer = asyncio.run(ask("another hard one", 0.01))
    released.set()
    assert (answer.mode, answer.late, answer.expansion) == ("plain", True, None)


def test_a_gate_reads_what_the_run_s_did():
    corpus = {"a": "one two", "b": "two three three", "c": "four"}
    features = tuple(features_before(PlainSearch({}, {}, [], 3)))
    zeros = (0.0,) * len(features)
    deviations, weights = (1.0,) * len(features), tuple(0.1 * i for i in range(len(features)))
    gate = Gate(features, zeros, deviations, weights, 0.0, 0.5, 0.5)
    read = []

    class Told(Gate):
        def expands(self, values):
            read.append(values)
            return super().expands(values)

    documents = types.SimpleNamespace(view=View.of(Base.of(corpus, np.zeros((3, 2), np.float32))))
    asks = QueryGate(Told(**vars(gate)), Bm25Index)
    assert not asks.is_ready
    asks.count_words(documents)
    assert asks.is_ready
    hits = [Hit("b", 0.9, ""), Hit("a", 0.25, "")]
    decided = asks.expands(["two three unknown", "none"], [hits, []])
    (scores,), (rows,) = Bm25Index(list(corpus.values())).search(["two three unknown"], 2)
    by_words = {"abc"[row]: score for row, score in zip(rows, scores, strict=True)}
    assert list(by_words) == ["b", "a"]
    told = PlainSearch({"b": 0.9, "a": 0.25}, by_words, [2, 1, 0], 3)
    assert read == [features_before(told), features_before(PlainSearch({}, {}, [0], 3))]
    assert decided == [gate.expands(values) for values in read]
    other = Gate(("taste",), (0.0,), (1.0,), (1.0,), 0.0, 0.5, 0.5)
    with pytest.raises(UserError, match="the gate reads taste, which this search does not tell"):
        QueryGate(other, Bm25Index)
    documents.view = View.of(Base.of({}, np.zeros((0, 2), np.float32)))
    asks.count_words(documents)  # As after a merge: nothing is left.
    asks.expands(["two"], [[]])
    assert read[-1] == features_before(PlainSearch({}, {}, [0], 0))


def test_a_full_disk_and_a_failure_are_told_without_the_question(service, models, caplog):
    app = make_app(service, Access())
    document = b'{"documents": [{"id": "a", "text": "x"}]}'
    status, _, answer = asyncio.run(call(app, "POST", "/documents", document))
    assert (status, answer["error"]["reason"]) == (507, "disk")
    models.fails = True
    status, _, answer = asyncio.run(call(app, "POST", "/search", b'{"query": "a secret question"}'))
    assert (status, answer["error"]["reason"]) == (500, "failed")
    assert "secret" not in json.dumps(answer) + caplog.text
    assert "a request failed: RuntimeError" in caplog.text
    assert "service_test.py" in caplog.text  # Where it came from.


def test_a_websocket_is_refused(service):
    """Without an answer the server would have it fail, and log that."""
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "websocket", "path": "/search", "headers": []}
    asyncio.run(make_app(service, Access())(scope, None, send))
    assert [message["type"] for message in sent] == ["websocket.close"]


def test_nothing_is_answered_before_it_is_there():
    service = Service(ServiceMetrics())
    app = make_app(service, Access())
    status, headers, answer = asyncio.run(call(app, "POST", "/search", b'{"query": "x"}'))
    assert (status, answer["error"]["reason"]) == (503, "loading")
    assert headers[b"retry-after"]
    assert asyncio.run(call(app, "GET", "/health"))[0] == 503
    service.close()


def test_a_body_without_a_length_is_bounded(service):
    app = make_app(service, Access())
    parts = [b" " * (1 << 20)] * (MOST_BODY // (1 << 20) + 1)
    status, _, answer = asyncio.run(call(app, "POST", "/search", *parts))
    assert (status, answer["error"]["reason"]) == (413, "size")


def test_all_bodies_that_are_read_at_once_are_bounded(service, monkeypatch):
    monkeypatch.setattr(guard, "MOST_BODIES", 30)
    app = make_app(service, Access())

    async def run():
        goes_on = asyncio.Event()
        body = b'{"query": "of bytes"}'
        slow = asyncio.create_task(call(app, "POST", "/search", body, waits=goes_on))
        await until(lambda: app._held)
        refused = await call(app, "POST", "/search", body)
        goes_on.set()
        return refused, await slow, await call(app, "POST", "/search", body)

    (status, headers, answer), slow, again = asyncio.run(run())
    assert (status, answer["error"]["reason"]) == (429, "busy")
    assert int(headers[b"retry-after"]) >= 1
    assert (slow[0], again[0], app._held) == (200, 200, 0)


def test_the_token_is_wanted_before_anything_is_read(service):
    app = make_app(service, Access(("localhost",), "secret"))
    body = b'{"query": "x"}'
    assert asyncio.run(call(app, "POST", "/search", body))[0] == 401
    headers = {"authorization": "Bearer secret"}
    assert asyncio.run(call(app, "POST", "/search", body, **headers))[0] == 200
    assert asyncio.run(call(app, "GET", "/health"))[0] == 200
    assert asyncio.run(call(app, "GET", "/openapi.json"))[0] == 401
