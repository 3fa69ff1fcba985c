"""Keys as a client meets them: what comes first, what a key may do, how often."""

import logging
from contextlib import suppress
from unittest.mock import Mock
from uuid import uuid4

import pytest
from sqlalchemy.exc import OperationalError
from structlog.testing import capture_logs

from api import auth
from api.envelope import BrokenOff, Envelope
from worker import keys

SCOPES = {
    "submit": [("POST", "/v1/jobs"), ("POST", "/v1/jobs/x/cancel"), ("POST", "/v1/files"), ("POST", "/v1/chat/completions")],
    "read": [("GET", "/v1/jobs"), ("GET", "/v1/jobs/x"), ("GET", "/v1/batches/x/results"), ("GET", "/v1/costs"), ("GET", "/v1/models")],
    "operate": [("GET", "/v1/webhooks"), ("POST", "/v1/webhooks"), ("POST", "/v1/providers/a/breaker"), ("DELETE", "/v1/webhooks/x")],
}
HELLO = {"model": "default", "messages": [{"role": "user", "content": "Hello"}], "url": "https://example.com/told"}
MALFORMED = b'{"messages": [' + b"\xff"


def routes(stage):
    documented = stage.client.get("/openapi.json").json()["paths"]
    return [(method.upper(), path) for path, methods in documented.items() if path.startswith("/v1/") for method in methods]


class Anything(dict):
    def __missing__(self, name):
        return "x"


@pytest.mark.parametrize("content_type", ["application/json", "multipart/form-data; boundary=b", "text/plain", "\x01"])
def test_a_body_that_cannot_be_used_is_not_looked_at_before_the_key(stage, content_type):
    for authorization in ("", "Bearer nonsense", "Bearer", "Basic Og==", f"Bearer {keys.MARK}{'x' * 43}", "Bearer \x00\xe9"):
        headers = {"Authorization": authorization.encode("latin-1"), "Content-Type": content_type}
        for method, path in routes(stage):
            url = path.format_map(Anything()) + "?limit=many&wait=long&cursor=x"
            response = stage.client.request(method, url, headers=headers, content=MALFORMED)
            assert response.status_code == 401, (method, path)
            assert response.headers["WWW-Authenticate"].startswith("Bearer")


def test_without_a_key_the_body_is_not_even_read(stage):
    read = []

    async def refused():
        messages = []

        async def receive():
            read.append("asked for")
            return {"type": "http.request", "body": b"{", "more_body": True}

        async def send(message):
            messages.append(message)

        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http", "path": "/v1/jobs",
            "raw_path": b"/v1/jobs", "query_string": b"", "root_path": "", "headers": [(b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
        }  # fmt: skip
        await stage.client.app(scope, receive, send)
        return messages

    started = stage.client.portal.call(refused)[0]
    assert (started["status"], read) == (401, [])


def test_without_a_key_what_is_there_looks_like_what_is_not(stage):
    job_id = stage.submit()["id"]
    answers = []
    for path in (f"/v1/jobs/{job_id}", f"/v1/jobs/{uuid4()}", "/v1/nothing/of/that/kind", "/v1"):
        response = stage.client.get(path, headers={"Authorization": ""})
        answers.append((response.status_code, response.json()["detail"], response.headers["WWW-Authenticate"]))
    assert set(answers) == {(401, "send your API key as `Authorization: Bearer KEY`", "Bearer")}


def test_a_key_may_do_what_its_scopes_say_and_nothing_else(stage):
    own = {scope: stage.key(scopes=[keys.Scope(scope)]) for scope in SCOPES}
    for needed, paths in SCOPES.items():
        for method, path in paths:
            for scope, headers in own.items():
                response = stage.client.request(method, path, headers=headers, json=HELLO if method == "POST" else None)
                assert response.status_code != 401
                assert (response.status_code == 403) == (scope != needed), (method, path, scope)
                if scope != needed:
                    assert response.headers["WWW-Authenticate"] == f'Bearer error="insufficient_scope", scope="{needed}"'
                    assert f"may not {needed}" in response.text


def test_a_key_without_the_scope_does_not_learn_whether_a_job_is_there(stage):
    job_id, other = stage.submit()["id"], stage.key(scopes=[keys.Scope.SUBMIT])
    answers = [stage.client.get(f"/v1/jobs/{one}", headers=other) for one in (job_id, uuid4())]
    assert [response.status_code for response in answers] == [403, 403]
    assert answers[0].json()["detail"] == answers[1].json()["detail"]


def test_a_revoked_key_is_refused_from_the_next_request_on(stage):
    headers = stage.key(tenant="acme")
    assert stage.client.get("/v1/jobs", headers=headers).status_code == 200
    stage.sql("UPDATE api_keys SET revoked_at = now() WHERE tenant = 'acme'")
    response = stage.client.get("/v1/jobs", headers=headers)
    assert (response.status_code, response.headers["WWW-Authenticate"]) == (401, 'Bearer error="invalid_token"')


def streamed(stage, headers, meanwhile):
    """What a client with these headers gets of a stream in whose middle something happens."""
    sent = []
    scope = {
        "type": "http", "method": "GET", "path": "/v1/streamed", "query_string": b"", "app": stage.client.app,
        "headers": [(b"authorization", headers["Authorization"].encode())],
    }  # fmt: skip

    async def route(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"before", "more_body": True})
        meanwhile()
        await send({"type": "http.response.body", "body": b"after", "more_body": True})

    async def send(message):
        sent.append(message.get("body"))

    async def served():
        with suppress(BrokenOff):
            await Envelope(auth.Doorkeeper(route))(scope, None, send)

    with capture_logs() as logged:
        stage.client.portal.call(served)
    return sent[1:], [entry["event"] for entry in logged]


def test_a_stream_breaks_off_when_its_key_is_revoked(stage, monkeypatch):
    monkeypatch.setattr(auth, "CHECK_S", 0)
    headers = stage.key(tenant="acme")

    def revoked():
        stage.sql("UPDATE api_keys SET revoked_at = now() WHERE tenant = 'acme'")

    assert streamed(stage, headers, revoked) == ([b"before"], ["stream_broken_off"])
    assert streamed(stage, stage.key(tenant="acme"), lambda: None) == ([b"before", b"after"], [])


def test_a_stream_goes_on_while_postgres_is_away(stage, monkeypatch):
    monkeypatch.setattr(auth, "CHECK_S", 0)
    headers, callers = stage.key(), stage.client.app.state.parts.callers
    gone = Mock(side_effect=OperationalError(None, None, ConnectionError()))
    assert streamed(stage, headers, lambda: monkeypatch.setattr(callers, "_send", gone)) == ([b"before", b"after"], [])
    gone.assert_called_once()


def test_the_servers_log_adds_nothing_to_what_was_broken_off():
    def record(error):
        return logging.LogRecord("uvicorn.error", logging.ERROR, "", 0, "failed", None, (type(error), error, None) if error else None)

    logger = logging.getLogger("uvicorn.error")
    assert not logger.filter(record(BrokenOff()))
    assert logger.filter(record(ValueError()))
    assert logger.filter(record(None))


def test_a_scope_that_this_version_does_not_know_allows_nothing_and_breaks_nothing(stage):
    headers = stage.key(tenant="acme")
    stage.sql("UPDATE api_keys SET scopes = '{read,fly,\"\"}' WHERE tenant = 'acme'")
    assert stage.client.get("/v1/jobs", headers=headers).status_code == 200
    assert stage.client.post("/v1/jobs", headers=headers, json=HELLO).status_code == 403
    stage.sql("UPDATE api_keys SET scopes = '{}' WHERE tenant = 'acme'")
    assert stage.client.get("/v1/jobs", headers=headers).status_code == 403


def test_the_scheme_is_read_in_any_case(stage):
    secret = stage.key()["Authorization"].removeprefix("Bearer ")
    assert stage.client.get("/v1/jobs", headers={"Authorization": f"bEARER   {secret} "}).status_code == 200


def test_a_key_that_works_counts_for_nothing_under_another_scheme(stage):
    secret = stage.key()["Authorization"].removeprefix("Bearer ")
    for authorization in (f"Basic {secret}", f"Token {secret}", secret):
        response = stage.client.get("/v1/jobs", headers={"Authorization": authorization})
        assert (response.status_code, response.headers["WWW-Authenticate"]) == (401, "Bearer")


@pytest.mark.parametrize("method", ["OPTIONS", "HEAD", "PUT", "PATCH", "TRACE", "BREW"])
def test_without_a_key_no_method_tells_what_there_is(stage, method):
    for path in ("/v1/jobs", "/v1/jobs/x/cancel", "/v1/files", "/v1/nothing/of/that/kind", "/v1/%2e%2e/livez"):
        response = stage.client.request(method, path, headers={"Authorization": ""})
        assert (response.status_code, response.headers.get("Allow")) == (401, None), path


SPELLINGS = ["//v1/jobs", "/V1/jobs", "/./v1/jobs", "/x/../v1/jobs", "/%2fv1/jobs", "/v1%2fjobs", "/v1;x/jobs", "/%76%31/jobs", "/v1/jobs/"]


@pytest.mark.parametrize("spelled", SPELLINGS)
def test_no_spelling_of_a_path_leads_past_the_key(stage, spelled):
    job_id = stage.submit()["id"]
    response = stage.client.get(f"http://testserver{spelled}", headers={"Authorization": ""})
    assert response.status_code in (401, 404)
    assert job_id not in response.text


def test_each_route_of_a_job_needs_the_scope_of_what_it_does(stage):
    path = f"/v1/jobs/{stage.submit()['id']}"
    own = {scope: stage.key(scopes=[keys.Scope(scope)]) for scope in SCOPES}
    stage.client.post(f"{path}/cancel")  # so that its events end
    needs = {"calls": ("GET", "read"), "events": ("GET", "read"), "cancel": ("POST", "submit"), "requeue": ("POST", "submit")}
    for what, (method, needed) in needs.items():
        answers = {scope: stage.client.request(method, f"{path}/{what}", headers=headers) for scope, headers in own.items()}
        assert [scope for scope, response in answers.items() if response.status_code != 403] == [needed], what
