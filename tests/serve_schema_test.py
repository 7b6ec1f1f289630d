"""Requests drawn from the service's own description: none fails it, or hangs it."""

import json
import urllib.parse

import pytest

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
import hypothesis  # noqa: E402


def draw(service, examples: int) -> None:
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{service.port}/openapi.json")
    settings = hypothesis.settings(
        max_examples=examples, deadline=20_000, derandomize=True, database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    for operation in schema.get_all_operations():

        @settings
        @hypothesis.given(case=operation.ok().as_strategy())
        def ask(case):
            answer = case.call(timeout=20)
            assert answer.status_code < 500, answer.text
            if answer.status_code >= 400:
                assert set(answer.json()["error"]) == {"reason", "message"}
            elif (case.method, case.path) == ("POST", "/documents"):
                forget(service, answer.request.body)

        ask()
    assert service.ask("GET", "/health")[0] == 200


def forget(service, body: bytes) -> None:
    """Removes documents again, as they all go by ids that no run has."""
    for document in json.loads(body)["documents"]:
        name = urllib.parse.quote(document["id"], safe="")
        assert service.ask("DELETE", f"/documents/{name}")[0] == 200


def test_no_request_fails_the_service(service):
    draw(service, 12)


@pytest.mark.slow
def test_no_request_of_many_fails_the_service(service):
    draw(service, 200)
