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
import logging
import traceback
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.exceptions import HTTPException

MOST_BODY = 16 << 20  # Bytes.
MOST_BODIES = 16 * MOST_BODY  # Bytes of all requests that are being answered.
OPEN = ("/health",)  # Paths that want no token.
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_BODIES = ("POST", "PUT", "PATCH")
_POLICY = 1008  # WebSockets are closed with this code: the service has none.

Scope, Receive, Send = Mapping[str, Any], Callable[[], Awaitable[Any]], Callable[..., Awaitable]

logger = logging.getLogger(__name__)


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
        self._app, self._access, self._held = app, access, 0  # Bytes of bodies.

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": _POLICY})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if (refused := self._refused(scope)) is not None:
            await _refuse(send, *refused)
            return
        got = 0

        async def receive_some() -> Any:
            """Receives a bounded body, whatever its length is said to be."""
            nonlocal got
            message = await receive()
            size = len(message.get("body", b""))
            got, self._held = got + size, self._held + size
            if got > MOST_BODY:
                raise HTTPException(413, "the body is too large")
            if self._held > MOST_BODIES:
                raise HTTPException(429, "too many bodies are being read", {"Retry-After": "1"})
            return message

        try:
            await self._app(scope, receive_some, send)
        except Exception as error:  # It was answered. A server would log what it says, too.
            logger.error("a request failed: %s", where_from(error))
        finally:
            self._held -= got

    def _refused(self, scope: Scope) -> tuple[int, str, str] | None:
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        query = scope.get("query_string", b"")
        return self._access.refuses(scope["method"], scope["path"], headers, query)


def where_from(error: Exception) -> str:
    """An error's kind and where it came from, without its message, which may have a text."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
    return " < ".join([type(error).__name__, *reversed(places)])


def error_body(reason: str, message: str) -> bytes:
    """What every refusal says."""
    return json.dumps({"error": {"reason": reason, "message": message}}).encode()


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
