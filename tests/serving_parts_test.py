"""Parts of the service, without models: who may ask, the queue, the cache, exact search."""

import base64
import dataclasses
import itertools
import threading
import time
import types

import numpy as np
import pytest

from configs import base
from expandr_jax.config import read_config
from expandr_jax.errors import UserError
from expandr_jax.expansion.expand import Expander
from expandr_jax.expansion.strategies import STRATEGIES
from expandr_jax.search import build_index
from expandr_jax.serving.batching import Batcher, Busy
from expandr_jax.serving.cache import Cache, Expansion
from expandr_jax.serving.expansions import ServedExpansions
from expandr_jax.serving.flat import ROWS_AT_ONCE, search_flat
from expandr_jax.serving.guard import MOST_BODY, Access
from expandr_jax.serving.queries import START_TOKENS, _rows, split

JSON = {"host": "localhost:8000", "content-type": "application/json"}
BASIC = base64.b64encode(b"anyone:secret").decode()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, None),
        ({"host": "127.0.0.1"}, None),
        ({"host": "[::1]:8000"}, None),
        ({"host": "evil.example"}, 403),
        ({"host": "localhost.evil.example:8000"}, 403),
        ({"host": ""}, 403),
        ({"origin": "http://localhost:8000"}, None),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://localhost:9000"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-origin"}, None),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-type": ""}, 415),
        ({"content-type": "application/json; charset=utf-8"}, None),
        ({"content-length": str(MOST_BODY)}, None),
        ({"content-length": str(MOST_BODY + 1)}, 413),
        ({"content-length": "9" * 5000}, 413),
    ],
)
def test_a_page_elsewhere_cannot_post_to_a_loopback_service(headers, status):
    refused = Access().refuses("POST", "/search", JSON | headers)
    assert (refused and refused[0]) == status


@pytest.mark.parametrize(
    ("authorization", "path", "status"),
    [
        ("", "/search", 401),
        ("", "/health", None),
        ("", "/health/", 401),
        ("Bearer secret", "/search", None),
        ("bearer secret", "/search", None),
        ("Bearer secre", "/search", 401),
        ("Bearer sécret", "/search", 401),
        ("secret", "/search", 401),
        (f"Basic {BASIC}", "/", None),
        ("Basic ####", "/", 401),
        (f"Basic {base64.b64encode(b'secret').decode()}", "/", 401),
    ],
)
def test_the_token_is_wanted_for_all_but_health(authorization, path, status):
    access = Access(("box",), "secret")
    refused = access.refuses("GET", path, {"host": "box", "authorization": authorization})
    assert (refused and refused[0]) == status


def test_requests_that_come_together_are_worked_off_together():
    began, goes_on, calls = threading.Event(), threading.Event(), []

    def work(items):
        calls.append(list(items))
        began.set()
        assert goes_on.wait(5)
        if "bad" in items:
            raise ValueError("bad")
        return [item.upper() for item in items]

    batcher = Batcher(work, 3, 4, "test")
    first = batcher.submit("a")
    assert began.wait(5)
    others = [batcher.submit(item) for item in "bcd"]
    assert others[1].cancel()
    others.append(batcher.submit("bad"))
    with pytest.raises(Busy):
        batcher.submit("e")
    goes_on.set()
    assert (first.result(5), others[0].result(5)) == ("A", "B")
    with pytest.raises(ValueError, match="bad"):
        others[3].result(5)
    batcher.close()
    assert calls == [["a"], ["b", "d"], ["bad"]] or calls == [["a"], ["b"], ["d", "bad"]]
    with pytest.raises(Busy):
        batcher.submit("f")


def expansion(text: str) -> Expansion:
    return Expansion((text, ""), np.array([[1.5, -2.0], [0.25, 0.0]], np.float32))


def test_expansions_are_kept_for_a_time(tmp_path):
    clock = [1000.0]
    cache = Cache(tmp_path / "c", 10**6, 50.0, lambda: clock[0])
    cache.put("k", "query", expansion("text ✓"))
    assert cache.get("other") is None
    cache.close()
    cache = Cache(tmp_path / "c", 10**6, 50.0, lambda: clock[0])  # It outlasts the service.
    found = cache.get("k")
    assert (found.texts, found.cached) == (("text ✓", ""), True)
    np.testing.assert_array_equal(found.vectors, expansion("").vectors)
    clock[0] += 51
    assert cache.get("k") is None
    assert (tmp_path / "c").stat().st_mode & 0o077 == 0


def test_what_is_too_old_does_not_stay_in_the_file(tmp_path):
    clock = [1000.0]

    def opened():
        return Cache(tmp_path / "c", 3000, 50.0, lambda: clock[0])

    cache = opened()
    cache.put("old", "a query", expansion("x" * 1000))
    clock[0] += 3601  # It looks for them once an hour of use.
    assert cache.get("another") is None
    assert len(cache) == 0
    cache.put("old", "a query", expansion("x" * 1000))
    cache.close()
    cache = opened()
    assert len(cache) == 1
    cache.close()
    clock[0] += 51
    cache = opened()
    assert len(cache) == 0
    for name in ("one", "two"):  # There is room for both, since those are counted no more.
        cache.put(name, "a query", expansion("x" * 1000))
    assert len(cache) == 2


def test_those_used_least_recently_make_room(tmp_path):
    clock = [0.0]
    cache = Cache(tmp_path / "c", 20_000, 10**9, lambda: clock[0])
    for number in range(40):
        clock[0] += 4000
        cache.put(f"k{number}", "query", expansion("x" * 1000))
        assert cache.get("k0") is not None  # Used again and again.
    assert 10 < len(cache) < 20
    assert cache.get("k39") is not None
    assert cache.get("k1") is None
    cache.put("large", "query", expansion("x" * 30_000))
    assert cache.get("large") is None


def served(cache, asked: list, samples=1, content="content", strategy="q2d", most=100, **changed):
    """Expansions by a generator that says what it is asked; `changed` are settings of it."""
    config = read_config(base.get_config())
    settings = {name: value for name, value in changed.items() if name in vars(config.expansion)}
    own = {name: value for name, value in changed.items() if name in vars(config.generator)}
    generator = types.SimpleNamespace(
        identity=changed.get("identity", "module"), today=changed.get("today", "2026-11-28")
    )
    sampler = types.SimpleNamespace(
        settings=dataclasses.replace(config.generator, **own), generator=generator,
        weights_hash=changed.get("weights", "hash"), seed=changed.get("seed", 0), fits=bool,
    )  # fmt: skip

    def texts(requests):
        asked.extend(request.id for request in requests)
        return {(request.id, request.sample): f"about {request.id}" for request in requests}

    slots = types.SimpleNamespace(sampler=sampler, slots=4, texts=texts)
    expansion = dataclasses.replace(config.expansion, **settings)
    expander = Expander(STRATEGIES[strategy], sampler, expansion, most, None, {})
    encode = lambda passages: np.full((len(passages), 2), 0.5, np.float32)  # noqa: E731
    return ServedExpansions(expander, slots, samples, encode, content, cache)


def test_what_was_kept_meanwhile_is_not_written_again(tmp_path):
    """As where a query is asked again while its passage is being written."""
    asked = []
    expansions = served(Cache(tmp_path / "c", 10**6, 50.0), asked)
    first, same = expansions.make(["a", "a"])
    assert first is same
    again, other = expansions.make(["a", "b"])
    assert expansions.make(["b"])[0].cached
    assert asked == ["a", "b"]
    assert (again.cached, again.texts, other.cached) == (True, first.texts, False)
    served(None, asked).make(["a"])
    assert asked == ["a", "b", "a"]  # Without a cache.


def test_a_kept_expansion_is_found_by_all_that_it_depends_on(tmp_path):
    cache = Cache(tmp_path / "c", 10**6, 50.0)
    served(cache, []).make(["a"])
    assert served(cache, []).find("a").cached
    assert served(cache, []).find("b") is None
    changes = {
        "samples": 2, "content": "other", "strategy": "query2doc", "most": 99, "temperature": 0.5,
        "top_p": 0.5, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1, "max_new_tokens": 9,
        "template": "{query}", "identity": "other", "today": "2026-11-29", "weights": "other",
        "seed": 1, "prompt_buckets": (32,), "stop": ("x",),
    }  # fmt: skip
    for name, value in changes.items():
        assert served(cache, [], **{name: value}).find("a") is None, name


def test_a_file_that_is_no_cache_is_told(tmp_path):
    (tmp_path / "c").write_text("no database, and longer than its header" * 99)
    with pytest.raises(UserError, match="cannot be used"):
        Cache(tmp_path / "c", 1, 1)


@pytest.mark.parametrize(("rows", "k"), [(7, 3), (7, 9), (ROWS_AT_ONCE + 5, 4)])
def test_exact_search_finds_what_the_index_does(rows, k):
    drawn = np.random.default_rng(0)
    vectors = drawn.integers(-2, 3, (rows, 4)).astype(np.float32)  # Many ties.
    queries = drawn.integers(-2, 3, (3, 4)).astype(np.float32)
    scores, places = build_index(vectors, "exact").search(queries, k)
    found = search_flat(vectors, queries, k)
    for one, (of_one, row) in enumerate(found):
        np.testing.assert_array_equal(of_one, scores[one])
        np.testing.assert_array_equal(row, places[one])
    dead = np.ones(rows, bool)
    dead[[1, 5]] = False
    assert all(sorted(row) == [1, 5] for _, row in search_flat(vectors, queries, k, dead))


def test_batches_have_the_least_to_compute():
    drawn = np.random.default_rng(0)

    def cost(lengths, parts):
        return sum(
            START_TOKENS + length * next(r for r in _rows(length) if r >= end - start)
            for start, end in parts
            for length in [lengths[end - 1]]
        )

    def every(count):
        """All ways to cut so many texts."""
        for cuts in itertools.product([False, True], repeat=count - 1):
            ends = [i + 1 for i, cut in enumerate(cuts) if cut] + [count]
            yield list(zip([0, *ends[:-1]], ends, strict=True))

    for count in (1, 2, 5, 9):
        lengths = sorted(drawn.choice([16, 24, 32, 48, 96], count).tolist())
        most = [_rows(length)[-1] for length in lengths]
        fitting = [parts for parts in every(count) if all(e - s <= most[e - 1] for s, e in parts)]
        assert cost(lengths, split(lengths)) == min(cost(lengths, parts) for parts in fitting)
    assert len(split([16] * 20)) == 2


def test_a_single_request_waits_for_nobody():
    batcher = Batcher(list, 16, 16, "test")
    start = time.perf_counter()
    assert batcher.submit(1).result(5) == 1
    assert time.perf_counter() - start < 0.5
    batcher.close()
