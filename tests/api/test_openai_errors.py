"""Errors of the OpenAI routes: always {"error": {"message", "type", "param", "code"}}, never of the native ones."""

import pytest
from fastapi import APIRouter

from api.openai_errors import OpenAIError, speaks_openai

CHAT = {"model": "default", "messages": [{"role": "user", "content": "Hello"}]}


def error(response):
    """The error of a response that is one in OpenAI's envelope and nothing else."""
    assert response.headers["Content-Type"] == "application/json"
    assert response.headers["X-Request-ID"]
    body = response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str)
    assert body["error"]["message"]
    return body["error"]


@pytest.mark.parametrize(
    ("path", "openai"),
    [
        ("/v1/chat/completions", True), ("/v1/chat/nonsense", True), ("/v1/models", True), ("/v1/models/a/b", True),
        ("/v1/files", True), ("/v1/files/file-1/content", True), ("/v1/batches", True), ("/v1/batches/", True),
        ("/v1/batches/batch_1", True), ("/v1/batches/batch_1/cancel", True), ("/v1/models/a\nb", True),
        ("/v1/batches/monday/results", False), ("/v1/batches/monday/events", False), ("/v1/jobs", False), ("/v1/jobs/files", False),
        ("/v1/embeddings", True), ("/v1/filesystem", False), ("/livez", False), ("/v1/providers", False),
        ("/v1/webhooks", False), ("/", False),
    ],
)  # fmt: skip
def test_the_path_decides_how_an_error_leaves(path, openai):
    assert speaks_openai(path) is openai


@pytest.mark.parametrize("path", ["/models", "/chat/completions", "/files/file-1", "/batches"])
def test_a_base_url_without_v1_is_told_so(stage, path):
    response = stage.client.post(path)
    assert (response.status_code, response.json()["error"]["message"].split(": ")[1]) == (404, "the base URL has to end with /v1")


def test_without_a_key_that_works_it_is_a_401(stage):
    for header in ("", "Bearer nonsense", "Basic Og=="):
        response = stage.client.get("/v1/models", headers={"Authorization": header})
        assert response.status_code == 401
        assert response.headers["WWW-Authenticate"].startswith("Bearer")
        assert (error(response)["type"], error(response)["code"]) == ("authentication_error", "invalid_api_key")


def test_a_key_that_may_not_is_a_403(stage):
    stage.sql("UPDATE api_keys SET scopes = '{read}'")
    response = stage.client.post("/v1/chat/completions", json=CHAT)
    assert (response.status_code, error(response)["type"]) == (403, "permission_error")
    assert "submit" in error(response)["message"]


def test_an_unknown_path_and_a_wrong_method_are_in_the_envelope_too(stage):
    for method, path, status in (
        ("POST", "/v1/chat/nonsense", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("PUT", "/v1/models", 405),
    ):
        response = stage.client.request(method, path)
        assert (response.status_code, error(response)["type"]) == (status, "invalid_request_error")
    assert response.headers["Allow"]


@pytest.mark.parametrize(
    ("sent", "param"),
    [
        ({"json": {**CHAT, "messages": []}}, "messages"),
        ({"json": {"messages": CHAT["messages"]}}, "model"),
        ({"json": {**CHAT, "stream": "yes"}}, "stream"),
        ({"json": {**CHAT, "stream": True, "stream_options": {"include_usage": 1}}}, "stream_options.include_usage"),
        ({"json": []}, None),
        ({"content": b"{", "headers": {"Content-Type": "application/json"}}, None),
        ({"content": b"[" * 100_000, "headers": {"Content-Type": "application/json"}}, None),
        ({"content": b'{"n": 1e999}', "headers": {"Content-Type": "application/json"}}, "model"),
        ({"content": b"\xff", "headers": {"Content-Type": "application/json"}}, None),
        ({}, None),
    ],
)
def test_what_cannot_be_read_is_a_400_that_names_the_field(stage, sent, param):
    response = stage.client.post("/v1/chat/completions", **sent)
    assert response.status_code == 400
    assert (error(response)["type"], error(response)["param"]) == ("invalid_request_error", param)


def test_a_body_that_is_too_large_is_a_413(stage):
    response = stage.client.post("/v1/chat/completions", json={**CHAT, "user": "x" * 1024 * 1024})
    assert (response.status_code, error(response)["type"]) == (413, "invalid_request_error")


def test_an_unforeseen_error_is_a_500_that_tells_nothing(stage, capsys):
    router = APIRouter()

    @router.get("/v1/files/boom/boom")
    async def boom() -> None:
        raise RuntimeError("pa55" + "word")

    stage.client.app.include_router(router)
    response = stage.client.get("/v1/files/boom/boom")
    assert (response.status_code, error(response)["type"]) == (500, "server_error")
    assert "pa55word" not in response.text + "".join(capsys.readouterr())


def test_postgres_being_away_is_a_503_that_says_when_to_come_back(stage):
    stage.client.portal.call(stage.client.app.state.parts.db.dispose)
    stage.sql("UPDATE pg_database SET datallowconn = false WHERE datname = current_database()")
    try:
        response = stage.client.get("/v1/models")
    finally:
        stage.sql("UPDATE pg_database SET datallowconn = true WHERE datname = current_database()")
    assert (response.status_code, response.headers["Retry-After"], error(response)["type"]) == (503, "1", "server_error")


def test_what_a_route_raises_arrives_whole_even_half_a_surrogate_pair(stage):
    router = APIRouter()

    @router.get("/v1/files/raised/{status}")
    async def raised(status: int) -> None:
        raise OpenAIError(status, "bad \ud800", code="file_deleted", param="input_file_id", headers={"x-should-retry": "false"})

    stage.client.app.include_router(router)
    kinds = {400: "invalid_request_error", 409: "invalid_request_error", 429: "rate_limit_error", 503: "server_error"}
    for status, kind in kinds.items():
        response = stage.client.get(f"/v1/files/raised/{status}")
        assert (response.status_code, response.headers["x-should-retry"]) == (status, "false")
        assert error(response) == {"message": "bad \ud800", "type": kind, "param": "input_file_id", "code": "file_deleted"}


def test_native_routes_keep_their_problems(stage):
    for path in ("/v1/jobs/x", "/v1/batches/x/results", "/nowhere"):
        assert stage.client.get(path).headers["Content-Type"] == "application/problem+json"


def test_openapi_documents_the_envelope(stage):
    paths = stage.client.get("/openapi.json").json()["paths"]
    responses = paths["/v1/chat/completions"]["post"]["responses"]
    for status in ("400", "401", "404", "503"):
        assert responses[status]["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorEnvelope")
