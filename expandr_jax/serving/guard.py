"""Access control in front of the API: tokens, hosts and origins, and sizes of bodies.

A web page that somebody opens can send requests to a service on the same machine. None is answered
that comes under a foreign name (Host), from a foreign page (Origin), or as a form would send it
(anything but application/json).
"""

import base64
import binascii
import dataclasses
import hmac
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.exceptions import HTTPException

MOST_BODY = 16 << 20  # Bytes.
OPEN = ("/health",)  # Paths that want no token.
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_BODIES = ("POST", "PUT", "PATCH")

Scope, Receive, Send = Mapping[str, Any], Callable[[], Awaitable[Any]], Callable[..., Awaitable]


@dataclasses.dataclass(frozen=True)
class Access:
    """The rules of access.

    Attributes:
        hosts: Names that the service is called by, without a port; (): any.
        token: What everybody must know; "": nothing.
    """

    hosts: tuple[str, ...] = _LOOPBACK
    token: str = ""

    def refuses(
        self, method: str, path: str, headers: Mapping[str, str], query: bytes = b""
    ) -> tuple[int, str, str] | None:
        """Status, reason and message for a request that is not answered; None: it is."""
        host = headers.get("host", "")
        if self.hosts and _name(host) not in self.hosts:
            return 403, "host", "the service has no such name: see --names"
        origin = headers.get("origin")
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            return 403, "origin", "requests of other pages are not answered"
        followed = method == "GET" and path == "/" and not query  # A link to the page.
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not followed:
            return 403, "origin", "requests of other pages are not answered"
        if self.token and path not in OPEN and not self._knows(headers.get("authorization", "")):
            return 401, "token", "expected the header Authorization: Bearer TOKEN"
        if method in _BODIES and not _is_json(headers.get("content-type", "")):
            return 415, "type", "expected the header Content-Type: application/json"
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > MOST_BODY:
            return 413, "size", f"expected a body of at most {MOST_BODY} bytes"
        return None

    def _knows(self, authorization: str) -> bool:
        """Whether a header has the token; browsers send it as a password."""
        kind, _, given = authorization.partition(" ")
        if kind.lower() == "basic":
            try:
                given = base64.b64decode(given, validate=True).decode().partition(":")[2]
            except (binascii.Error, ValueError):
                return False
        elif kind.lower() == "bearer":
            given = given.encode("latin-1").decode(errors="replace")
        else:
            return False
        return hmac.compare_digest(given.strip().encode(), self.token.encode())


class Guard:
    """An ASGI application around another one, which refuses by `Access`."""

    def __init__(self, app: Callable, access: Access):
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        if (refused := self._refused(scope)) is not None:
            await _refuse(send, *refused)
            return
        await self._app(scope, _bounded(receive), send)

    def _refused(self, scope: Scope) -> tuple[int, str, str] | None:
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        query = scope.get("query_string", b"")
        return self._access.refuses(scope["method"], scope["path"], headers, query)


def error_body(reason: str, message: str) -> bytes:
    """What every refusal says."""
    return json.dumps({"error": {"reason": reason, "message": message}}).encode()


def _bounded(receive: Receive) -> Receive:
    """Receives a body of at most `MOST_BODY` bytes, whatever its length is said to be."""
    got = 0

    async def receive_some() -> Any:
        nonlocal got
        message = await receive()
        got += len(message.get("body", b""))
        if got > MOST_BODY:
            raise HTTPException(413, "the body is too large")
        return message

    return receive_some


async def _refuse(send: Send, status: int, reason: str, message: str) -> None:
    body = error_body(reason, message)
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),  # The body of the request is not read.
    ]
    if status == 401:
        headers.append((b"www-authenticate", b'Basic realm="expandr", charset="UTF-8"'))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _name(host: str) -> str:
    """A host without its port."""
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdecimal() else host).lower()


def _is_json(kind: str) -> bool:
    return kind.partition(";")[0].strip().lower() == "application/json"
