"""The API below a prefix: what a proxy does, and an application it is mounted in."""

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient

HELLO = {"messages": [{"role": "user", "content": "Hello"}]}


def behind_a_proxy(app):
    return TestClient(app, root_path="/chat/backstop", raise_server_exceptions=False)


def mounted(app):
    return TestClient(Starlette(routes=[Mount("/chat/backstop", app=app)]), raise_server_exceptions=False)


@pytest.mark.parametrize("below", [behind_a_proxy, mounted])
def test_below_a_prefix_the_api_is_guarded_bounded_and_answers_as_ever(stage, below):
    client = below(stage.client.app)
    assert client.get("/chat/backstop/v1/jobs").status_code == 401
    assert client.post("/chat/backstop/v1/chat/completions", json={}).json()["error"]["type"] == "authentication_error"
    assert client.get("/chat/backstop/livez").status_code == 200
    client.headers.update(stage.client.headers)

    accepted = client.post("/chat/backstop/v1/jobs", json=HELLO)
    assert accepted.status_code == 202
    assert accepted.headers["location"] == f"/chat/backstop/v1/jobs/{accepted.json()['id']}"
    assert client.get(accepted.headers["location"]).json()["id"] == accepted.json()["id"]
    assert client.post("/chat/backstop/v1/jobs", json=HELLO | {"metadata": {"a": "x" * 1_100_000}}).status_code == 413
    assert client.get("/chat/backstop/v1/files/nobody").json()["error"]["type"] == "invalid_request_error"
    assert client.delete("/chat/backstop/v1/jobs").headers["allow"] == "GET, POST"
    file = client.post("/chat/backstop/v1/files", data={"purpose": "batch"}, files={"file": ("a.jsonl", b"x" * 1_200_000)})
    assert file.status_code == 200, "of a file more is taken than of any other body"

    client.post("/chat/backstop/v1/jobs", json=HELLO)
    page = client.get("/chat/backstop/v1/jobs?limit=1")
    assert client.get(page.links["next"]["url"]).json()["data"][0]["id"] == accepted.json()["id"]


def test_a_path_that_only_begins_like_the_prefix_is_none_of_it(stage):
    client = TestClient(stage.client.app, root_path="/v", raise_server_exceptions=False)
    assert client.get("/v1/jobs").status_code == 401
    assert client.get("/v/v1/jobs").status_code == 401
