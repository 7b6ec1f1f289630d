"""Kept texts: what makes a request another one, and what a kill leaves behind."""

import dataclasses
import json
import types

import pytest
from rich.console import Console

from configs import smoke
from expandr_jax.config import read_config, with_settings
from expandr_jax.errors import UserError
from expandr_jax.expansion import cache as texts
from expandr_jax.expansion.cache import kept_texts
from expandr_jax.files.records import hash_json
from expandr_jax.generation.requests import Request
from expandr_jax.runtime.run import Run

REQUESTS = [
    Request(f"q{i}", sample, f"about {i}?", 1.0, 0.9, 8) for i in (1, 2) for sample in (0, 1)
]


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "run", read_config(smoke.get_config()), Console(quiet=True))
    yield run
    run.close()


@pytest.fixture
def asked(monkeypatch):
    """What was asked of the generator, call by call; its texts say what they answer."""
    calls = []

    def sample_texts(sampler, adapter, requests, *, path, purpose, strip):
        assert adapter is None
        assert not strip
        calls.append([(request.id, request.sample) for request in requests])
        return {
            (r.id, r.sample): f"Here is a passage: {sampler.weights_hash} {purpose} {r.prompt}"
            for r in requests
        }

    monkeypatch.setattr(texts, "sample_texts", sample_texts)
    return calls


def get(run, cache, requests, model="m", name="q2d", identity="i"):
    sampler = types.SimpleNamespace(
        weights_hash=model,
        generator=types.SimpleNamespace(identity=identity),
        seed=run.config.seed,
        settings=run.config.generator,
        reporter=run.reporter,
    )
    return kept_texts(cache, sampler, name, requests, run.phase("texts"))


def test_a_request_is_answered_once(run, asked, tmp_path):
    first = get(run, tmp_path / "cache", REQUESTS[:3])
    assert first["q1", 1] == "m q2d about 1?"  # Without its lead-in.
    assert get(run, tmp_path / "cache", REQUESTS[:2]) == {k: first[k] for k in [*first][:2]}
    assert get(run, tmp_path / "cache", REQUESTS) == {**first, ("q2", 1): "m q2d about 2?"}
    assert asked == [[("q1", 0), ("q1", 1), ("q2", 0)], [("q2", 1)]]


@pytest.mark.parametrize(
    "change",
    [
        {"id": "q3"}, {"sample": 7}, {"prompt": "other"}, {"temperature": 0.5}, {"top_p": 1.0},
        {"max_new_tokens": 9}, {"top_k": 3}, {"min_p": 0.1}, {"repetition_penalty": 1.2},
    ],
)  # fmt: skip
def test_what_makes_a_request_another(run, asked, tmp_path, change):
    get(run, tmp_path / "cache", REQUESTS)
    other = dataclasses.replace(REQUESTS[0], **change)
    get(run, tmp_path / "cache", [other, *REQUESTS[1:]])
    assert asked[1:] == [[(other.id, other.sample)]]


def test_texts_that_were_kept_before_there_were_more_filters_still_serve(run, asked, tmp_path):
    get(run, tmp_path / "cache", REQUESTS[:1])
    (path,) = (tmp_path / "cache").glob("*.jsonl")
    (row,) = map(json.loads, path.read_text().splitlines())
    assert hash_json(["about 1?", 1.0, 0.9, 8]).startswith(row["prompt"])


def test_another_model_strategy_or_seed_has_its_own(run, asked, tmp_path):
    cache = tmp_path / "cache"
    get(run, cache, REQUESTS)
    assert get(run, cache, REQUESTS, model="n")["q1", 0] == "n q2d about 1?"
    get(run, cache, REQUESTS, name="q2e")
    run.config = with_settings(run.config, {"seed": 5})
    get(run, cache, REQUESTS)
    assert len(asked) == 4
    assert len([*cache.glob("*.jsonl")]) == 4


def test_whatever_else_a_text_depends_on_has_its_own(run, asked, tmp_path):
    """One set of weights with other options, template or types; the longest prompt; a server."""
    cache, url = tmp_path / "cache", "http://127.0.0.1:1/v1"
    get(run, cache, REQUESTS)
    get(run, cache, REQUESTS, identity="j")
    for settings in (
        {"generator.prompt_buckets": (32, 64)},
        {"generator.server.url": url, "generator.server.model": "m"},
        {"generator.server.url": url, "generator.server.model": "n"},
    ):
        own = run.config
        run.config = with_settings(own, settings)
        get(run, cache, REQUESTS)
        get(run, cache, REQUESTS)
        run.config = own
    assert len(asked) == len([*cache.glob("*.jsonl")]) == 5


def test_after_a_kill_the_same_requests_go_on_from_their_journal(run, tmp_path, monkeypatch):
    paths = []

    def killed(sampler, adapter, requests, *, path, purpose, strip):
        paths.append(path)
        path.write_text("finished so far")
        raise KeyboardInterrupt

    monkeypatch.setattr(texts, "sample_texts", killed)
    for requests in (REQUESTS, REQUESTS, REQUESTS[:2]):
        with pytest.raises(KeyboardInterrupt):
            get(run, tmp_path / "cache", requests)
    assert paths[0] == paths[1] != paths[2]
    monkeypatch.setattr(
        texts, "sample_texts", lambda *_, **__: {(r.id, r.sample): "x" for r in REQUESTS}
    )
    get(run, tmp_path / "cache", REQUESTS)
    assert not paths[0].exists()


def test_damage_and_places_that_cannot_be_written_are_one_line(run, asked, tmp_path):
    get(run, tmp_path / "cache", REQUESTS)
    (path,) = (tmp_path / "cache").glob("*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {*rows[0]} == {"query_id", "sample", "prompt", "text"}
    path.write_text(path.read_text() + '{"query_id": 1}\n')
    with pytest.raises(UserError, match=rf'{path.name}:5: field "query_id" is an integer'):
        get(run, tmp_path / "cache", REQUESTS)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: texts cannot be kept there"):
        get(run, tmp_path / "file", REQUESTS)
