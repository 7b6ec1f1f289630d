"""The completion server's client against a small server on loopback."""

import datetime
import email.utils
import http.server
import io
import json
import threading
import time
import types

import pytest
from rich.console import Console

from configs import smoke
from expandr_jax.config import read_config
from expandr_jax.errors import UserError
from expandr_jax.expansion.sampled import sample_texts
from expandr_jax.files.records import hash_json, read_jsonl
from expandr_jax.generation import server as client
from expandr_jax.generation.requests import Request
from expandr_jax.generation.server import API_KEY_VARIABLE, ServerEngine, retry_delay
from expandr_jax.loading import load_generator_model, make_sampler
from expandr_jax.runtime.run import Run

KEY = "sk-do-not-show"


def completion(text, reason="stop", **more):
    return json.dumps({"choices": [{"text": text, "finish_reason": reason}], **more})


class Server(http.server.ThreadingHTTPServer):
    """Answers with what `script` says: (body, how often it was sent) -> (status, content)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script = lambda body, tries: (200, completion(f"text {body['prompt'][0]}"))
        self.lock = threading.Lock()
        self.bodies, self.headers, self.paths = [], [], []
        self.running = self.most = 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        text = self.rfile.read(int(self.headers["Content-Length"])).decode()
        with server.lock:
            server.bodies.append(text)
            server.headers.append(dict(self.headers))
            server.paths.append(self.path)
            tries = server.bodies.count(text)
            server.running += 1
            server.most = max(server.most, server.running)
        status, content = server.script(json.loads(text), tries)
        with server.lock:
            server.running -= 1
        try:
            self.send_response(status)
            if status == 429:
                self.send_header("Retry-After", content)
            if status == 307:
                self.send_header("Location", "/elsewhere")
            self.end_headers()
            self.wfile.write(content.encode())
        except OSError:
            pass  # The client has given up.

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def engine(server, tmp_path):
    def make(**options):
        settings = {"seed": 0, "cache": tmp_path / "cache", "first_delay": 0.01, **options}
        return ServerEngine(
            server.url,
            "m",
            encode=lambda text: [*text.encode()],
            **settings,
        )

    return make


def request(sample=0, first=7, **options):
    settings = {"temperature": 0.9, "top_p": 0.8, "max_new_tokens": 5, **options}
    return Request(f"q{first}", sample, (first, 8, 9), **settings)


def test_stop_strings_are_asked_for(server, engine):
    list(engine(stop=("\n\n",)).generate([request()]))
    assert json.loads(server.bodies[0])["stop"] == ["\n\n"]


def test_what_is_asked_and_what_is_answered(server, engine):
    server.script = lambda body, _: (200, completion("a\ud800b", "length"))
    (answer,) = engine().generate([request(3)])
    assert (answer.id, answer.sample, answer.near_ties) == ("q7", 3, 0)
    assert (answer.text, answer.finished) == ("a?b", "length")
    assert answer.tokens == tuple(b"a?b")
    body = json.loads(server.bodies[0])
    assert 0 <= body.pop("seed") < 2**31
    assert body == {
        "model": "m", "prompt": [7, 8, 9], "temperature": 0.9, "max_tokens": 5, "top_p": 0.8,
        "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "repeat_penalty": 1.0,
    }  # fmt: skip
    assert server.paths == ["/v1/completions"]
    assert "Authorization" not in server.headers[0]


def test_a_penalty_is_of_the_whole_text(server, engine):
    """llama.cpp's server looks at the last 64 tokens unless it is told otherwise."""
    penalties = {first: 1.0 + 0.1 * first for first in range(2)}
    list(engine().generate(request(first=f, repetition_penalty=p) for f, p in penalties.items()))
    found = {
        body["prompt"][0]: body.get("repeat_last_n") for body in map(json.loads, server.bodies)
    }
    assert found == {0: None, 1: -1}


def test_seeds_follow_from_seed_id_and_sample_alone(server, engine, tmp_path):
    requests = [request(sample, first) for first in (7, 6) for sample in range(3)]
    list(engine().generate(requests))
    before = sorted(server.bodies)
    assert len({json.loads(body)["seed"] for body in before}) == 6
    server.bodies.clear()
    list(engine(cache=tmp_path / "other").generate(reversed(requests)))
    assert sorted(server.bodies) == before


def test_as_many_at_once_as_allowed_and_no_more(server, engine):
    together = threading.Barrier(4)

    def script(body, _):
        together.wait(timeout=10)  # Only four at once get past it.
        return 200, completion(str(body["prompt"][0]))

    server.script = script
    answers = list(engine(concurrency=4, retries=0).generate(request(first=i) for i in range(12)))
    assert sorted(int(answer.text) for answer in answers) == list(range(12))
    assert all(answer.id == f"q{answer.text}" for answer in answers)
    assert server.most == 4


@pytest.mark.parametrize(
    "failures",
    [
        [(429, "slow down"), (500, "oops")],
        [(200, completion("half", end)) for end in ("abort", "error", "content_filter", None, 1)],
        [(200, "{not JSON"), (200, "[]"), (200, '{"choices": []}'), (200, '{"choices": [{}]}')],
    ],
    ids=["status", "ends", "content"],
)
def test_a_failure_that_may_pass_is_tried_again(server, engine, failures):
    good = (200, completion("fine"))
    server.script = lambda _, tries: failures[tries - 1] if tries <= len(failures) else good
    assert [answer.text for answer in engine().generate([request()])] == ["fine"]
    assert len(server.bodies) == len(failures) + 1


def test_a_server_that_asks_for_a_pause_gets_it(server, engine):
    soon = email.utils.format_datetime(
        datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=2), usegmt=True
    )
    for wish, seconds in ((soon, 0.5), (" 1", 1.0), ("soon", 0.0), ("-1", 0.0)):
        server.script = lambda _, tries, wish=wish: (
            (429, wish) if tries == 1 else (200, completion("fine"))
        )
        server.bodies.clear()
        start = time.monotonic()
        prompt = request(first=len(wish))
        assert [a.text for a in engine(concurrency=1).generate([prompt])] == ["fine"]
        assert time.monotonic() - start >= seconds


@pytest.mark.parametrize(
    ("status", "complaint"),
    [
        (400, "This model's maximum context length is 16 tokens. However, you requested 20"),
        (400, "the request exceeds the available context size, try to increase it"),
        (422, "`inputs` tokens + `max_new_tokens` must be <= 16. Given: 20 `inputs` tokens and 5"),
        (422, "`inputs` must have less than 16 tokens. Given: 20"),
        (400, "The input (20 tokens) is longer than the model's context length (16 tokens)."),
        (413, "no"),
        (200, json.dumps({"error": {"message": "The prompt is too long for 16 tokens"}})),
        (200, json.dumps({"object": "error", "message": "maximum context length is 16 tokens"})),
        (200, completion("of half a prompt", usage={"prompt_tokens": 2})),
    ],
)
def test_a_prompt_that_is_too_long_for_the_server_fails_alone(server, engine, status, complaint):
    def script(body, _):
        return (status, complaint) if body["prompt"][0] == 1 else (200, completion("fine"))

    server.script = script
    requests = [request(first=1), request(first=2)]
    for _ in range(2):
        found = {
            answer.id: (answer.text, answer.finished) for answer in engine().generate(requests)
        }
        assert found == {"q1": ("", "refused"), "q2": ("fine", "eos")}
    assert len(server.bodies) == 3  # A restart asks again: it may be another server.


@pytest.mark.parametrize(
    "complaint", ["max_tokens is too large: 5000", "Invalid value for logprobs: too large"]
)
def test_a_setting_that_the_server_refuses_ends_the_stage(server, engine, complaint):
    server.script = lambda *_: (400, complaint)
    with pytest.raises(UserError, match=r"refused a request with HTTP status 400"):
        list(engine().generate([request()]))


CACHED = {"prompt_tokens": 1, "prompt_tokens_details": {"cached_tokens": 2}}


@pytest.mark.parametrize("usage", [{"prompt_tokens": 3}, CACHED, {"prompt_tokens": 0}, None])
def test_a_prompt_that_was_read_whole(server, engine, usage):
    server.script = lambda *_: (200, completion("fine", usage=usage))
    (answer,) = engine().generate([request()])
    assert (answer.text, answer.finished) == ("fine", "eos")


def test_a_server_that_adds_tokens_to_a_prompt_ends_the_stage(server, engine):
    server.script = lambda *_: (200, completion("another", usage={"prompt_tokens": 4}))
    with pytest.raises(UserError, match="read a prompt of 3 tokens as 4: it adds some of its own"):
        list(engine().generate([request()]))


def test_a_time_out_is_tried_again(server, engine):
    over = threading.Event()

    def script(_, tries):
        if tries == 1:
            over.wait(10)
        return 200, completion("in time")

    server.script = script
    assert [a.text for a in engine(timeout=2.0).generate([request()])] == ["in time"]
    over.set()
    assert len(server.bodies) == 2


def test_it_waits_longer_before_each_further_try(server, engine, monkeypatch):
    waits = []

    class Event(threading.Event):
        def wait(self, timeout=None):
            waits.append(timeout)
            return super().wait(0)

    monkeypatch.setattr(client, "threading", types.SimpleNamespace(Event=Event))
    server.script = lambda *_: (503, "busy")
    with pytest.raises(UserError):
        list(engine(retries=3, first_delay=2.0).generate([request()]))
    key = hash_json(json.loads(server.bodies[0]))
    assert waits == [0.0, *(retry_delay(0, key, attempt, 2.0) for attempt in (1, 2, 3))]
    assert waits[1] < waits[3]


def test_too_many_failures_end_in_one_line(server, engine):
    server.script = lambda *_: (503, "model is\nloading")
    with pytest.raises(UserError) as caught:
        list(engine(retries=2).generate([request()]))
    assert len(server.bodies) == 3
    message = str(caught.value)
    assert "request 'q7', sample 0, after 3 tries" in message
    assert "503: model is loading" in message


def test_what_came_back_before_a_failure_is_kept(server, engine, tmp_path):
    def script(body, _):
        if body["prompt"][0] == 1:
            deadline = time.monotonic() + 10
            while not (tmp_path / "cache.part").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            return 400, "no such model"
        return 200, completion("fine")

    server.script = script
    requests = [request(first=1), request(first=2)]
    with pytest.raises(UserError, match="refused a request with HTTP status 400: no such model"):
        list(engine(concurrency=2).generate(requests))
    server.script = lambda *_: (500, "not again")
    answers = engine(retries=0).generate([request(first=2)])
    assert [answer.text for answer in answers] == ["fine"]


def test_a_restart_asks_for_nothing_twice(server, engine):
    requests = [request(first=i) for i in range(5)]
    first = {answer.id: answer.text for answer in engine().generate(requests)}
    server.script = lambda *_: (500, "not again")
    again = {answer.id: answer.text for answer in engine(retries=0).generate(requests)}
    assert again == first
    assert len(server.bodies) == 5
    with pytest.raises(UserError):  # Other draws are another request.
        list(engine(retries=0, seed=1).generate(requests))


def test_the_key_is_sent_and_shown_nowhere(server, engine, monkeypatch, tmp_path):
    monkeypatch.setenv(API_KEY_VARIABLE, KEY)
    list(engine().generate([request()]))
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    for status in (401, 500):
        server.script = lambda *_, status=status: (status, f"wrong key {KEY}")
        with pytest.raises(UserError) as caught:
            list(engine(retries=0).generate([request(1)]))
        assert "wrong key ***" in str(caught.value)
    assert all(KEY not in path.read_text() for path in tmp_path.iterdir())


def test_a_redirect_does_not_take_the_key_away(server, engine, monkeypatch):
    monkeypatch.setenv(API_KEY_VARIABLE, KEY)
    server.script = lambda *_: (307, "")
    with pytest.raises(UserError, match="307"):
        list(engine().generate([request()]))
    assert server.paths == ["/v1/completions"]


@pytest.mark.parametrize(
    "url", ["localhost:8000", "file:///etc/v1", "http://", "http://[", f"http://x:{KEY}@h"]
)
def test_a_url_that_cannot_be_used(url, tmp_path):
    with pytest.raises(UserError) as caught:
        ServerEngine(url, "m", encode=list, seed=0, cache=tmp_path / "cache")
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("wrong", [{"concurrency": 0}, {"retries": -1}, {"timeout": 0.0}])
def test_numbers_that_cannot_be_used(wrong):
    config = smoke.get_config()
    config.generator.server.update(wrong)
    with pytest.raises(UserError, match=next(iter(wrong))):
        read_config(config)


def test_a_key_that_no_header_can_hold(monkeypatch, engine):
    monkeypatch.setenv(API_KEY_VARIABLE, f"{KEY}\n{KEY}")
    with pytest.raises(UserError) as caught:
        engine()
    assert KEY not in str(caught.value)


def test_delays_double_with_a_fixed_jitter():
    delays = [retry_delay(0, "key", attempt, 1.0) for attempt in range(1, 10)]
    assert delays == [retry_delay(0, "key", attempt, 1.0) for attempt in range(1, 10)]
    for attempt, delay in enumerate(delays):
        assert min(2**attempt, 60) / 2 <= delay <= min(2**attempt, 60)
    assert len({retry_delay(0, key, 1, 1.0) for key in "abcdef"}) == 6


def test_a_run_samples_the_base_on_the_server(server, tmp_path):
    config = smoke.get_config()
    config.generator.server.url = server.url
    config = read_config(config)
    models = load_generator_model(config)
    generator = models.generator
    server.script = lambda body, _: (
        200,
        completion(f"Here is a passage: {generator.tokenizer.decode(body['prompt'][-4:])}"),
    )
    run = Run(tmp_path / "run", config, Console(file=io.StringIO()))
    requests = [Request(f"q{i}", 0, f"query {i}", 1.0, 0.9, 8) for i in range(40)]
    path = tmp_path / "run" / "texts.jsonl"
    sampler = make_sampler(models, config, run.processes, run.reporter, run.path("work"))
    texts = sample_texts(sampler, None, requests, path=path, purpose="test")
    assert len(texts) == 40
    assert all("passage" not in text for text in texts.values())
    assert [row["query_id"] for _, row in read_jsonl(path, {})] == sorted(
        f"q{i}" for i in range(40)
    )
    sent = generator.tokenizer.decode(json.loads(server.bodies[0])["prompt"])
    assert sent.startswith("<|im_start|>user\n")
    with pytest.raises(UserError, match="trained adapter"):
        sample_texts(sampler, {}, requests, path=tmp_path / "other.jsonl", purpose="test")
