"""A bucket on this machine: what gcsfs and tensorstore use of Google Cloud Storage's JSON API.

An object is there whole or not at all, and there is neither renaming nor appending.
"""

import base64
import contextlib
import dataclasses
import http.server
import itertools
import json
import socketserver
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator

import google_crc32c

NAME = "bucket"


@dataclasses.dataclass
class Stored:
    """An object: what it holds and which writing of it this is."""

    content: bytes
    generation: int


class FakeBucket:
    """The bucket that `serve` serves.

    Attributes:
        objects: Name -> content.
        environment: What has clients talk to it instead of Google.
        fail: (method, object's name) -> an HTTP status to answer with; None: as it should be.
        requests: (method, object's name) of every request, in order.
    """

    def __init__(self) -> None:
        self.objects: dict[str, Stored] = {}
        self.environment: dict[str, str] = {}
        self.fail: Callable[[str, str], int | None] = lambda method, name: None
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.Lock()
        self.uploads: dict[str, tuple[str, bytearray]] = {}
        self.numbers = itertools.count()  # Numbers of uploads.
        self._generations = itertools.count(1)

    def __getitem__(self, name: str) -> bytes:
        return self.objects[name].content

    def names(self, prefix: str = "") -> list[str]:
        """Names of the objects that begin with a prefix."""
        with self.lock:
            return sorted(name for name in self.objects if name.startswith(prefix))

    def put(self, name: str, content: bytes, wanted: str | None = None) -> dict | None:
        """Writes an object; what the API says of it, or None: not `wanted`, a number, is there."""
        with self.lock:
            there = self.objects.get(name)
            if wanted is not None and int(wanted) != (there.generation if there else 0):
                return None
            stored = Stored(bytes(content), next(self._generations))
            self.objects[name] = stored
        return self.describe(name, stored)

    def describe(self, name: str, stored: Stored) -> dict:
        """What the API says of an object."""
        crc = google_crc32c.value(stored.content).to_bytes(4, "big")
        moment = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        return {
            "kind": "storage#object", "id": f"{NAME}/{name}/{stored.generation}", "name": name,
            "bucket": NAME, "generation": str(stored.generation), "metageneration": "1",
            "contentType": "application/octet-stream", "size": str(len(stored.content)),
            "crc32c": base64.b64encode(crc).decode(), "etag": str(stored.generation),
            "timeCreated": moment, "updated": moment, "storageClass": "STANDARD",
        }  # fmt: skip


class _Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: object) -> None:
        """A client that was killed is no news."""


@contextlib.contextmanager
def serve() -> Iterator[FakeBucket]:
    """Yields an empty bucket that is served until the block ends."""
    bucket = FakeBucket()
    handler = type("Handler", (_Handler,), {"bucket": bucket})
    with _Server(("127.0.0.1", 0), handler) as server:
        url = f"http://127.0.0.1:{server.server_address[1]}"
        bucket.environment = {
            "STORAGE_EMULATOR_HOST": url,
            "FSSPEC_GS_TOKEN": "anon",
            "GOOGLE_CLOUD_PROJECT": "none",
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        }
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield bucket
        server.shutdown()


class _Handler(http.server.BaseHTTPRequestHandler):
    bucket: FakeBucket
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def do_DELETE(self) -> None:
        self._answer()

    def _answer(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        self.query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        body = self._body()
        parts = [urllib.parse.unquote(part) for part in url.path.strip("/").split("/")]
        if parts[0] in ("upload", "download"):
            parts = parts[1:]
        # storage/v1/b/BUCKET/o/NAME, and after it rewriteTo/b/BUCKET/o/NAME
        name = parts[5] if len(parts) > 5 else self.query.get("name", "")
        if parts[:3] != ["storage", "v1", "b"] or len(parts) < 4 or parts[3] != NAME:
            return self._error(404)
        upload = self.command in ("POST", "PUT") and "uploadType" in self.query
        if upload and not name:
            name = self._name_in(body)
        self.bucket.requests.append((self.command, name))
        status = self.bucket.fail(self.command, name)
        if status is not None:
            return self._error(status)
        if upload:
            return self._upload(name, body)
        if len(parts) == 4:
            return self._json({"kind": "storage#bucket", "name": NAME, "location": "US"})
        if len(parts) == 5:
            return self._list()
        stored = self.bucket.objects.get(name)
        if stored is None:
            return self._error(404)
        if "rewriteTo" in parts:
            new = parts[parts.index("rewriteTo") + 4]
            return self._json({"done": True, "resource": self.bucket.put(new, stored.content)})
        if self.command == "DELETE":
            with self.bucket.lock:
                self.bucket.objects.pop(name, None)
            return self._send(204, b"")
        if self.query.get("alt") == "media":
            return self._media(stored)
        return self._json(self.bucket.describe(name, stored))

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _name_in(self, body: bytes) -> str:
        """The name of an upload whose metadata stand in its body, or began it."""
        if self.query.get("upload_id"):
            return self.bucket.uploads[self.query["upload_id"]][0]
        start = body.index(b"{")
        return json.JSONDecoder().raw_decode(body[start:].decode("utf-8", "replace"))[0]["name"]

    def _upload(self, name: str, body: bytes) -> None:
        kind, uploads = self.query["uploadType"], self.bucket.uploads
        if kind == "media":
            return self._json(self._put(name, body))
        if kind == "multipart":
            boundary = body[: body.index(b"\n")].strip()
            content = body.split(boundary)[2]
            content = content[content.index(b"\n\n") + 2 :]
            return self._json(self._put(name, content.removesuffix(b"\n")))
        if "upload_id" not in self.query:
            number = str(next(self.bucket.numbers))
            uploads[number] = (name, bytearray())
            place = f"http://{self.headers['Host']}{self.path}&upload_id={number}"
            return self._send(200, b"{}", Location=place)
        _, held = uploads[self.query["upload_id"]]
        held += body
        total = self.headers["Content-Range"].rpartition("/")[2]
        if total == "*" or len(held) < int(total):
            return self._send(308, b"", Range=f"bytes=0-{len(held) - 1}")
        return self._json(self._put(name, held))

    def _put(self, name: str, content: bytes) -> dict | None:
        return self.bucket.put(name, content, self.query.get("ifGenerationMatch"))

    def _list(self) -> None:
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter")
        first, end = self.query.get("startOffset", ""), self.query.get("endOffset")
        items, prefixes = [], set()
        for name in self.bucket.names(prefix):
            if name < first or (end and name >= end):
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest[: rest.index(delimiter) + 1])
            else:
                items.append(name)
        with self.bucket.lock:
            there = [(n, self.bucket.objects[n]) for n in items if n in self.bucket.objects]
        described = [self.bucket.describe(name, stored) for name, stored in there]
        self._json({"kind": "storage#objects", "items": described, "prefixes": sorted(prefixes)})

    def _media(self, stored: Stored) -> None:
        content, status = stored.content, 200
        same = {"If-Match": "ifGenerationMatch", "If-None-Match": "ifGenerationNotMatch"}
        if self.query.get(same["If-None-Match"]) == str(stored.generation):
            return self._send(304, b"")
        wanted = self.query.get(same["If-Match"])
        if wanted is not None and wanted != str(stored.generation):
            return self._error(412)
        headers = {"x-goog-generation": str(stored.generation), "ETag": str(stored.generation)}
        if self.headers.get("Range"):
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            size = len(content)
            start = int(first) if first else max(0, size - int(last))
            stop = min(size, int(last) + 1) if first and last else size
            if start >= size:
                return self._error(416)
            content, status = content[start:stop], 206
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        self._send(status, content, **headers)

    def _json(self, value: dict | None) -> None:
        if value is None:
            return self._error(412)
        self._send(200, json.dumps(value).encode(), **{"Content-Type": "application/json"})

    def _error(self, status: int) -> None:
        message = {403: "has no permission", 404: "does not exist"}.get(status, "try again")
        self._send(status, json.dumps({"error": {"code": status, "message": message}}).encode())

    def _send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if status not in (204, 304):
            self.wfile.write(content)
        self.wfile.flush()
