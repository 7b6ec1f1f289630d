"""The HTTP API of a service, by FastAPI."""

import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any

from fastapi import FastAPI, Path, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from expandr_jax.errors import UserError
from expandr_jax.serving import bodies, page
from expandr_jax.serving.bodies import (
    DocumentAnswer,
    DocumentsAnswer,
    DocumentsBody,
    ErrorAnswer,
    ExpandAnswer,
    ExpandBody,
    Health,
    RemovedAnswer,
    SearchAnswer,
    SearchBody,
)
from expandr_jax.serving.cache import Expansion
from expandr_jax.serving.guard import Access, Guard, error_body
from expandr_jax.serving.service import MODES, Answer, Refused, Service

DESCRIPTION = "Searches the documents of a finished run of expandr-jax; docs/serve.md tells more."
_STATUSES = (400, 401, 403, 404, 409, 413, 415, 422, 429, 503, 507)
ERRORS: dict[int | str, dict[str, Any]] = {status: {"model": ErrorAnswer} for status in _STATUSES}
Name = Annotated[str, Path(min_length=1, max_length=bodies.MOST_ID)]


def make_app(service: Service, access: Access, examples: Sequence[str] = ()) -> Guard:
    """The application, guarded; the page offers `examples` of queries."""
    app = FastAPI(
        title="expandr-jax", version="1", description=DESCRIPTION, docs_url=None, redoc_url=None,
        responses=ERRORS, redirect_slashes=False,
    )  # fmt: skip
    _count_answers(app, service)
    _answer_errors(app)
    _add_search(app, service)
    _add_documents(app, service)
    _add_health(app, service)
    _add_page(app, service, examples)
    return Guard(app, access)


def answer_json(value: Any, status: int = 200, **headers: str) -> Response:
    """A value as JSON."""
    content = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    return Response(content, status, headers, "application/json")


def _add_search(app: FastAPI, service: Service) -> None:
    @app.post("/search", response_model=SearchAnswer)
    async def search(body: SearchBody) -> Response:
        """Finds documents for a query."""
        among = None if body.filter is None else body.filter.ids
        answer = await service.search(body.query, body.k, body.mode, body.timeout_ms / 1000, among)
        return answer_json(as_json(answer))

    @app.post("/expand", response_model=ExpandAnswer)
    async def expand(body: ExpandBody) -> Response:
        """Writes passages for a query, or finds those that were written before."""
        expansion, seconds = await service.expand(body.query, body.timeout_ms / 1000)
        return answer_json(
            {
                "late": expansion is None,
                "expansion": _expanded(expansion),
                "seconds": round(seconds, 6),
            }
        )


def _add_documents(app: FastAPI, service: Service) -> None:
    @app.post("/documents", response_model=DocumentsAnswer)
    async def put(body: DocumentsBody) -> Response:
        """Adds documents, or replaces those of the same ids: all of them, or none."""
        documents = [(document.id, document.whole) for document in body.documents]
        replaced = await service.put(documents)
        return answer_json({"added": len(documents) - replaced, "replaced": replaced})

    @app.get("/documents/{name:path}", response_model=DocumentAnswer)
    async def get(name: Name) -> Response:
        """A document."""
        if (text := await service.get(name)) is None:
            raise Refused(404, "absent", "there is no document of this id")
        return answer_json({"id": name, "text": text})

    @app.delete("/documents/{name:path}", response_model=RemovedAnswer)
    async def remove(name: Name) -> Response:
        """Removes a document."""
        if not await service.remove(name):
            raise Refused(404, "absent", "there is no document of this id")
        return answer_json({"removed": True})


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/health", response_model=Health)
    async def health() -> Response:
        """Which modes answer by now; 503 before the first does."""
        ready = {mode: service.is_ready(mode) for mode in MODES}
        documents = len(service.documents) if service.documents is not None else 0
        return answer_json({"ready": ready, "documents": documents}, 200 if ready["plain"] else 503)

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Counts and times, for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


def _add_page(app: FastAPI, service: Service, examples: Sequence[str]) -> None:
    @app.get("/", include_in_schema=False)
    async def root(q: str = "") -> Response:
        status, text = await page.page(service, q, examples)
        return Response(text, status, page.HEADERS, "text/html; charset=utf-8")

    def add_file(name: str, kind: str) -> None:
        content = page.file_text(name)

        @app.get(f"/{name}", include_in_schema=False)
        async def file() -> Response:
            return Response(content, 200, page.HEADERS, kind)

    for name, kind in page.ASSETS.items():
        add_file(name, kind)


def _count_answers(app: FastAPI, service: Service) -> None:
    """Counts answers by the path of their route, which holds nothing of a request."""

    class Counted:
        def __init__(self, inner: Callable[..., Awaitable[None]]):
            self._inner = inner

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            async def sent(message: Any) -> None:
                if message["type"] == "http.response.start":
                    route = getattr(scope.get("route"), "path", "")
                    service.metrics.answers.labels(route, str(message["status"])).inc()
                await send(message)

            await self._inner(scope, receive, sent if scope["type"] == "http" else send)

    app.add_middleware(Counted)


def _answer_errors(app: FastAPI) -> None:
    """Has every error say its reason, in JSON, and nothing of the request."""

    def error(status: int, reason: str, message: str, **headers: str) -> Response:
        return Response(error_body(reason, message), status, headers, "application/json")

    @app.exception_handler(Refused)
    async def refused(_: Request, why: Refused) -> Response:
        retry = {} if why.retry is None else {"Retry-After": str(why.retry)}
        return error(why.status, why.reason, str(why), **retry)

    @app.exception_handler(UserError)
    async def wrong(_: Request, why: UserError) -> Response:
        return error(422, "invalid", str(why))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, why: RequestValidationError) -> Response:
        first = why.errors()[0]
        where = ".".join(str(part) for part in first["loc"][:6])
        return error(422, "invalid", f"{where[:200]}: {first['msg'][:300]}")

    @app.exception_handler(HTTPException)
    async def other(_: Request, why: HTTPException) -> Response:
        reason = {413: "size", 429: "busy"}.get(why.status_code, "http")
        return error(why.status_code, reason, str(why.detail)[:300], **(why.headers or {}))

    @app.exception_handler(Exception)
    async def failed(_: Request, why: Exception) -> Response:  # The guard has it logged.
        return error(500, "failed", "the service failed; its log says how")


def as_json(answer: Answer) -> dict[str, Any]:
    """A `SearchAnswer`."""
    return {
        "mode": answer.mode,
        "late": answer.late,
        "expansion": _expanded(answer.expansion),
        "results": [
            {"id": hit.id, "score": round(hit.score, 6), "text": hit.text} for hit in answer.hits
        ],
        "seconds": {step: round(value, 6) for step, value in answer.seconds.items()},
    }


def _expanded(expansion: Expansion | None) -> dict[str, Any] | None:
    if expansion is None:
        return None
    return {"texts": list(expansion.texts), "cached": expansion.cached}
