"""Requests drawn from the service's own description: none fails it, or hangs it."""

import json
import operator
import urllib.parse

import pytest

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
import hypothesis  # noqa: E402


def draw(service, examples: int, mode) -> set[tuple[str, str]]:
    """Asks each operation that has a request of the mode; returns those that were done."""
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{service.port}/openapi.json")
    settings = hypothesis.settings(
        max_examples=examples, deadline=20_000, derandomize=True, database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    done = set()
    for operation in map(operator.methodcaller("ok"), schema.get_all_operations()):
        if not mode.is_positive and operation.method.upper() != "POST":
            continue  # None can be wrong.

        @settings
        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        def ask(case):
            answer = case.call(timeout=20)
            assert answer.status_code < 500, answer.text
            if answer.status_code >= 400:
                assert set(answer.json()["error"]) == {"reason", "message"}
                return
            done.add((case.method, case.path))
            if (case.method, case.path) == ("POST", "/documents"):
                forget(service, answer.request.body)

        ask()
    assert service.ask("GET", "/health")[0] == 200
    return done


def forget(service, body: bytes) -> None:
    """Removes documents again, as they all go by ids that no run has."""
    for document in json.loads(body)["documents"]:
        name = urllib.parse.quote(document["id"], safe="")
        assert service.ask("DELETE", f"/documents/{name}")[0] == 200


POSITIVE, NEGATIVE = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
# Of documents under ids that are drawn, there are none to be had.
DONE = {("POST", f"/{name}") for name in ("search", "expand", "documents")} | {
    ("GET", f"/{name}") for name in ("health", "metrics")
}


def test_no_request_fails_the_service(service):
    assert draw(service, 12, POSITIVE) >= DONE


@pytest.mark.slow
@pytest.mark.parametrize("mode", [POSITIVE, NEGATIVE])
def test_no_request_of_many_fails_the_service(service, mode):
    done = draw(service, 200, mode)
    assert mode.is_negative or done >= DONE
