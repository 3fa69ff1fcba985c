"""Around the routes: keys, problems, request ids, bounds, health, figures, and the results of batches."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from uuid import UUID, uuid4

import pytest
from fastapi import APIRouter
from sqlalchemy import text

from api.envelope import MAX_BODY_BYTES
from api.openai_errors import speaks_openai
from worker.job import new_id

PUBLIC = {"/livez", "/readyz", "/openapi.json", "/docs"}


def test_nothing_but_health_and_documentation_answers_without_a_key(stage):
    documented = stage.client.get("/openapi.json").json()["paths"]
    routes = {(method.upper(), path) for path, methods in documented.items() for method in methods}
    assert len(routes) >= 10
    for header in ({"Authorization": ""}, {"Authorization": "Bearer nonsense"}, {"Authorization": "Basic Og=="}):
        for method, path in routes:
            body = {"messages": [{"role": "user", "content": "Hello"}]} if method == "POST" else None
            response = stage.client.request(method, path.format_map(Anything()), headers=header, json=body)
            assert response.status_code == (200 if path in PUBLIC else 401), (method, path)
            if path not in PUBLIC:
                assert response.headers["WWW-Authenticate"].startswith("Bearer")
                envelope = "application/json" if speaks_openai(path) else "application/problem+json"
                assert response.headers["Content-Type"] == envelope
    for path in PUBLIC:
        assert stage.client.get(path, headers={"Authorization": ""}).status_code == 200


class Anything(dict):
    def __missing__(self, name):
        return "x"


def test_a_problem_has_the_members_of_rfc_9457_and_the_request_id(stage):
    response = stage.client.get("/v1/jobs/nope", headers={"X-Request-ID": "abc-1"})
    assert response.headers["Content-Type"] == "application/problem+json"
    assert response.json() == {
        "type": "about:blank",
        "title": "Not Found",
        "status": 404,
        "detail": "there is no job of that id",
        "instance": "/v1/jobs/nope",
        "request_id": "abc-1",
    }
    for path, method, status in (("/nowhere", "GET", 404), ("/v1/jobs", "DELETE", 405)):
        response = stage.client.request(method, path)
        assert (response.status_code, response.json()["status"]) == (status, status)


def test_every_response_has_a_request_id_and_a_strange_one_is_replaced(stage):
    given = [stage.client.get("/livez", headers={"X-Request-ID": sent}) for sent in ("a" * 200, "a b", 'x"y')]
    ids = [response.headers["X-Request-ID"] for response in given]
    assert len(set(ids)) == 3
    assert all(len(request_id) == 32 for request_id in ids)


def test_a_refused_prompt_is_not_sent_back(stage):
    response = stage.client.post("/v1/jobs", json={"messages": [{"role": "user", "content": {"secret": "pa55word"}}]})
    assert response.status_code == 422
    assert "pa55word" not in response.text


def test_an_unforeseen_error_is_a_500_that_tells_nothing(stage, capsys):
    app = stage.client.app
    router = APIRouter()

    @router.get("/boom")
    async def boom() -> None:
        raise RuntimeError("postgresql://user:" + "pa55" + "word")

    app.include_router(router)
    response = stage.client.get("/boom")
    assert (response.status_code, response.headers["Content-Type"]) == (500, "application/problem+json")
    assert response.json()["request_id"] == response.headers["X-Request-ID"]
    logged = "".join(capsys.readouterr())
    assert "pa55word" not in response.text + logged
    assert response.headers["X-Request-ID"] in logged


def test_a_body_of_more_than_a_mebibyte_is_refused_declared_or_not(stage):
    big = json.dumps({"messages": [{"role": "user", "content": "x" * MAX_BODY_BYTES}]}).encode()
    fits = json.dumps({"messages": [{"role": "user", "content": "x" * (MAX_BODY_BYTES - 100)}]}).encode()
    json_body = {"Content-Type": "application/json"}
    for content in (big, iter([big[:1000], big[1000:]])):
        response = stage.client.post("/v1/jobs", content=content, headers=json_body)
        assert (response.status_code, response.headers["Content-Type"]) == (413, "application/problem+json")
    assert stage.client.post("/v1/jobs", content=fits, headers=json_body).status_code == 202


def test_readiness_names_what_is_missing_and_liveness_does_not_care(stage):
    assert stage.client.get("/readyz").json() == {"status": "ok"}
    stage.sql("UPDATE alembic_version SET version_num = '0000'")
    response = stage.client.get("/readyz")
    assert response.status_code == 503
    assert "backstop db upgrade" in response.json()["reasons"][0]
    assert stage.client.get("/livez").status_code == 200


def test_without_redis_it_is_not_ready_but_jobs_are_accepted_and_waited_for(stage_without_redis):
    stage = stage_without_redis
    response = stage.client.get("/readyz")
    assert (response.status_code, response.json()["reasons"]) == (503, ["Redis does not answer"])
    job_id = stage.submit()["id"]
    threading.Timer(0.05, stage.succeed, [job_id]).start()
    assert stage.client.get(f"/v1/jobs/{job_id}", params={"wait": 30}).json()["state"] == "succeeded"
    assert stage.client.get("/v1/providers").json()["data"][0]["state"] == "closed"


def test_providers_show_their_breaker_and_this_tenants_calls(stage):
    stage.succeed(stage.submit()["id"])
    (provider,) = stage.client.get("/v1/providers").json()["data"]
    assert (provider["name"], provider["model"], provider["state"], provider["health"]) == ("a", "m-a", "closed", "healthy")
    assert (provider["in_flight"], provider["requests_left"], provider["tokens_left"], provider["rate_multiplier"]) == (0, None, None, 1.0)
    assert (provider["today"]["calls"], provider["today"]["answered"], provider["today"]["cost_usd"]) == (1, 1, "0.000123")
    (stranger,) = stage.client.get("/v1/providers", headers=stage.key("other")).json()["data"]
    assert stranger["today"]["calls"] == 0


def test_a_breaker_is_opened_closed_and_reset_for_everybody_who_asks_that_provider(stage):
    def force(action):
        return stage.client.post("/v1/providers/a/breaker", json={"action": action})

    opened = force("open")
    assert (opened.status_code, opened.json()["name"], opened.json()["state"]) == (200, "a", "forced_open")
    assert stage.client.get("/v1/providers").json()["data"][0]["state"] == "forced_open"
    assert force("close").json()["state"] == "forced_closed"
    assert force("reset").json()["state"] == "closed"
    assert stage.client.get("/v1/providers").json()["data"][0]["state"] == "closed"
    assert "body.action" in force("shut").json()["detail"]
    nobody = stage.client.post("/v1/providers/nobody/breaker", json={"action": "open"})
    assert (nobody.status_code, nobody.json()["detail"]) == (404, "there is no provider of that name; there are: a")


def test_without_redis_no_breaker_can_be_set(stage_without_redis):
    response = stage_without_redis.client.post("/v1/providers/a/breaker", json={"action": "open"})
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")


def test_costs_are_this_tenants_and_the_span_is_checked(stage):
    stage.succeed(stage.submit()["id"])
    for by in ("provider", "model", "batch", "day"):
        (row,) = stage.client.get("/v1/costs", params={"by": by, "since": "1d"}).json()["data"]
        assert (row["calls"], row["cost_usd"], row["coverage"]) == (1, "0.000123", 1)
    assert stage.client.get("/v1/costs", headers=stage.key("other")).json()["data"] == []
    assert "as in 7d" in stage.client.get("/v1/costs", params={"since": "soon"}).json()["detail"]


def a_batch(stage, rows):
    """A batch of queued jobs; their ids in the order of the file."""
    batch_id = new_id()
    stage.sql(
        "INSERT INTO batches (id, name, state, fingerprint, total) VALUES (:id, 'monday', 'open', '', :n)",
        id=batch_id,
        n=rows,
    )
    ids = [new_id() for _ in range(rows)]
    stage.sql(
        """INSERT INTO jobs (id, chain, lane, state, deadline_at, batch_id, ordinal, custom_id)
           SELECT id, 'default', 'bulk', 'queued', now() + interval '1 hour', :batch, n, 'T-' || n
           FROM unnest(CAST(:ids AS uuid[])) WITH ORDINALITY AS t(id, n)""",
        batch=batch_id,
        ids=ids,
    )
    return [str(job_id) for job_id in ids]


def test_results_of_a_batch_come_as_they_end_each_once_until_all_have(stage, monkeypatch):
    monkeypatch.setattr("api.results._PAGE", 3)
    monkeypatch.setattr("api.results._FOLLOW_S", 0.01)
    ids = a_batch(stage, 10)
    for ordinal in (1, 5, 8):
        stage.succeed(ids[ordinal - 1])
    others = [job_id for job_id in ids if ids.index(job_id) + 1 not in (1, 5, 8)]
    threading.Timer(1.0, lambda: [stage.succeed(job_id) for job_id in reversed(others)]).start()
    response = stage.client.get("/v1/batches/monday/results")
    assert response.headers["Content-Type"].startswith("application/x-ndjson")
    lines = [json.loads(line) for line in response.text.splitlines()]
    assert [line["ordinal"] for line in lines][:3] == [1, 5, 8]
    assert sorted(line["id"] for line in lines) == sorted(ids)
    assert (lines[0]["custom_id"], lines[0]["result"]["content"], lines[0]["cost_usd"]) == ("T-1", "Hello!", "0.000123")


def test_failed_rows_stand_in_the_results_with_their_reason(stage):
    (job_id,) = a_batch(stage, 1)
    error = json.dumps({"code": "unusable_row", "message": "row 1 has 2 fields, expected 3", "providers": []})
    sql = "UPDATE jobs SET state = 'failed', finished_at = now(), error = CAST(:error AS jsonb) WHERE id = :id"
    stage.sql(sql, id=UUID(job_id), error=error)
    (line,) = stage.client.get("/v1/batches/monday/results").text.splitlines()
    assert json.loads(line)["error"]["code"] == "unusable_row"
    assert json.loads(line)["result"] is None


def test_another_tenants_batch_does_not_exist(stage):
    a_batch(stage, 1)
    stranger = stage.key("other")
    for name in ("monday", str(uuid4()), "%00"):
        assert stage.client.get(f"/v1/batches/{name}/results", headers=stranger).status_code == 404
    assert stage.client.get("/v1/jobs", params={"batch": "monday"}, headers=stranger).status_code == 404
    assert len(stage.client.get("/v1/jobs", params={"batch": "monday"}).json()["data"]) == 1


def test_postgres_that_takes_no_writes_is_a_503_as_well(stage):
    name = stage.sql("SELECT current_database() AS name")[0].name
    stage.sql(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
    stage.client.portal.call(stage.client.app.state.parts.db.dispose)
    try:
        response = stage.client.post("/v1/jobs", json={"messages": [{"role": "user", "content": "hello"}]})
    finally:
        stage.sql(f'ALTER DATABASE "{name}" RESET default_transaction_read_only')
        stage.client.portal.call(stage.client.app.state.parts.db.dispose)
    assert (response.status_code, response.headers["Retry-After"]) == (503, "1")


def test_postgres_being_away_is_a_503_that_says_when_to_come_back(stage):
    stage.client.portal.call(stage.client.app.state.parts.db.dispose)
    stage.sql("UPDATE pg_database SET datallowconn = false WHERE datname = current_database()")
    try:
        response = stage.client.get("/v1/jobs")
    finally:
        stage.sql("UPDATE pg_database SET datallowconn = true WHERE datname = current_database()")
    assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
    assert response.headers["Content-Type"] == "application/problem+json"


@contextmanager
def locked(stage, table):
    """Nobody reads the table meanwhile."""
    with stage.ledger.connect() as connection, connection.begin():
        connection.execute(text(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE"))
        yield


@contextmanager
def held_up(stage, table, path, engine):
    """Requests for `path` have every connection of the engine, and wait for the table."""
    pool = getattr(stage.client.app.state.parts, engine).pool
    with ThreadPoolExecutor(12) as threads:
        with locked(stage, table):
            waiting = [threads.submit(stage.client.get, path) for _ in range(12)]
            while pool.checkedout() < pool.size():
                time.sleep(0.01)
            yield
        assert {one.result().status_code for one in waiting} == {200}


@pytest.mark.parametrize("path", ["/v1/costs", "/v1/jobs", "/v1/providers"])
def test_figures_and_lists_that_take_long_hold_up_nothing_else(stage, path):
    with held_up(stage, "provider_calls", path, "reports"):
        assert stage.client.get("/v1/files").status_code == 200


def test_however_busy_the_connections_are_a_key_is_known_or_refused(stage):
    with held_up(stage, "files", "/v1/files", "db"):
        assert stage.client.get("/v1/models").status_code == 200
        assert stage.client.get("/v1/models", headers={"Authorization": "Bearer backstop_sk_x"}).status_code == 401


@pytest.mark.parametrize(
    ("table", "path", "limit"),
    [
        ("jobs", "/v1/jobs", "worker.reads.READ_S"),
        ("jobs", "/v1/jobs/0193e5c8-f0a6-7c9a-8d0f-6a1b2c3d4e5f?wait=1", "worker.reads.READ_S"),
        ("api_keys", "/v1/models", "worker.database.STATEMENT_S"),
        ("files", "/v1/files", "worker.database.STATEMENT_S"),
    ],
)
def test_a_silent_postgres_is_a_503_in_the_end(stage, monkeypatch, table, path, limit):
    monkeypatch.setattr(limit, 0.2)
    with locked(stage, table):
        response = stage.client.get(path)
    assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
