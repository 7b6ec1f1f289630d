"""Downloads from a server on this machine: whole, right, once, and nothing unless asked for."""

import contextlib
import hashlib
import http.server
import threading

import pytest
from rich.console import Console

from configs import beir
from eval.beir import evaluate_beir
from expandr_jax.config import read_config
from expandr_jax.data.beir import Collection, write_beir
from expandr_jax.data.download import download
from expandr_jax.errors import UserError
from expandr_jax.runtime.run import Run
from tests.beir_test import pack
from tests.commands import data_of

DATA = bytes(range(256)) * 20_000
SHA256 = hashlib.sha256(DATA).hexdigest()


class Server:
    """Serves one body, and counts how often it is asked."""

    def __init__(self):
        server = self
        self.body, self.length, self.status, self.asked = DATA, None, 200, 0

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                server.asked += 1
                self.send_response(server.status)
                length = len(server.body) if server.length is None else server.length
                if length:
                    self.send_header("Content-Length", str(length))
                self.end_headers()
                self.wfile.write(server.body)

            def log_message(self, *_):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/some/data.zip"

    def stop(self):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    yield server
    server.stop()


class Counts:
    """A reporter of nothing, which keeps what it would show."""

    def __init__(self):
        self.seen = []

    @contextlib.contextmanager
    def progress(self, task, total):
        yield lambda count: self.seen.append((count, total))


def test_it_comes_once(server, tmp_path):
    counts = Counts()
    path = download(server.url, SHA256.upper(), tmp_path, counts)
    assert path.name == "data.zip"
    assert path.read_bytes() == DATA
    assert sum(count for count, _ in counts.seen) == len(DATA)
    assert {total for _, total in counts.seen} == {len(DATA)}
    assert download(server.url, SHA256, tmp_path) == path
    assert server.asked == 1
    path.write_bytes(b"altered")
    assert download(server.url, SHA256, tmp_path).read_bytes() == DATA
    assert server.asked == 2
    server.length = 0  # It need not say how much there is.
    assert download(server.url, SHA256, tmp_path / "other").read_bytes() == DATA


def test_what_is_not_it_is_refused(server, tmp_path):
    server.body = DATA[:-1] + b"x"
    with pytest.raises(UserError, match=f"sha256 is .*, expected {SHA256}; not kept"):
        download(server.url, SHA256, tmp_path)
    server.body, server.length = DATA[:1000], len(DATA)
    with pytest.raises(UserError, match=r"cannot download it to .* 1,000 of 5,120,000 bytes"):
        download(server.url, SHA256, tmp_path)
    server.status = 404
    with pytest.raises(UserError, match="the server says 404"):
        download(server.url, SHA256, tmp_path)
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]
    for url, sha256 in (
        ("ftp://127.0.0.1/x.zip", SHA256), ("http://127.0.0.1/", SHA256), (server.url, ""),
        ("file:///etc/passwd", SHA256), (server.url, "f" * 63),
    ):  # fmt: skip
        with pytest.raises(UserError, match="expected"):
            download(url, sha256, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot download it to .*Not a directory"):
        download(server.url, SHA256, tmp_path / "file")
    server.stop()
    with pytest.raises(UserError, match="refused"):
        download(server.url, SHA256, tmp_path)
    server.__init__()  # Something to stop at the end.


def test_a_run_on_a_url_is_the_run_on_its_file(server, tmp_path):
    ids = [f"q{i}" for i in range(200)]
    collection = Collection(
        "tiny",
        {f"d{i}": f"text {i}" for i in range(200)},
        {query: f"query {query}" for query in ids},
        {
            split: {query: {f"d{query[1:]}": 1} for query in part}
            for split, part in (("train", ids[:180]), ("test", ids[180:]))
        },
    )
    write_beir(tmp_path / "tiny", collection)
    server.body = pack(tmp_path / "tiny", tmp_path / "tiny.zip").read_bytes()

    def prepare(name, path="", url="", sha256="", md5=""):
        config = beir.get_config(path)
        config.data.update(url=url, sha256=sha256, md5=md5, cache=str(tmp_path / "cache"))
        run = Run(tmp_path / name, read_config(config), Console(quiet=True))
        try:
            return data_of(run)
        finally:
            run.close()

    sha256 = hashlib.sha256(server.body).hexdigest()
    assert prepare("a", url=server.url, sha256=sha256) == prepare("b", str(tmp_path / "tiny.zip"))
    assert server.asked == 1
    with pytest.raises(UserError, match="expected one of them"):
        prepare("c", str(tmp_path / "tiny"), server.url, sha256)
    with pytest.raises(UserError, match=r"data\.path is missing"):
        prepare("d")
    with pytest.raises(UserError, match="neither sha256 nor md5; expected one of them"):
        prepare("e", url=server.url)
    assert server.asked == 1
    md5 = hashlib.md5(server.body).hexdigest()
    assert prepare("f", url=server.url, md5=md5) == prepare("g", str(tmp_path / "tiny.zip"))
    assert server.asked == 2  # It lies under its other name.
    config = beir.get_config()
    config.data.update(url=server.url, md5=md5, cache=str(tmp_path / "cache"))
    config.evaluation.update(query_weights=(0.5,), samples=(1,))
    made = evaluate_beir(config, tmp_path / "out", [], ["bm25"], "", Console(quiet=True))
    assert made["tiny"]["queries"] == 20
    assert server.asked == 2


def test_either_hash_or_both_say_what_it_is_to_be(server, tmp_path):
    md5, other = hashlib.md5(DATA).hexdigest(), "0" * 32
    path = download(server.url, "", tmp_path, md5=md5.upper())
    assert path.read_bytes() == DATA
    assert download(server.url, "", tmp_path, md5=md5) == path
    assert server.asked == 1
    assert download(server.url, SHA256, tmp_path, md5=md5).read_bytes() == DATA
    path.write_bytes(b"altered")
    assert download(server.url, "", tmp_path, md5=md5).read_bytes() == DATA
    assert server.asked == 3
    for sha256 in ("", SHA256):
        with pytest.raises(UserError, match=f"md5 is {md5}, expected {other}; not kept"):
            download(server.url, sha256, tmp_path, md5=other)
    for wrong in ("f" * 31, "g" * 32, SHA256):
        with pytest.raises(UserError, match=r"md5 .* expected 32 hex digits"):
            download(server.url, "", tmp_path, md5=wrong)
