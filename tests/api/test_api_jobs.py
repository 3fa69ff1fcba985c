"""Jobs over the REST API: submit, wait, list, cancel, calls; and that nothing a client sends is a 500."""

import asyncio
import json
import threading
from uuid import UUID, uuid4

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis import Redis
from stage import play
from starlette.testclient import TestClient

from api.app import create_app
from worker import keys
from worker.dispatch import queue_name
from worker.job import Lane
from worker.settings import Settings

HELLO = {"messages": [{"role": "user", "content": "Hello"}]}


def test_an_accepted_job_is_in_the_ledger_and_on_its_way(stage):
    response = stage.client.post("/v1/jobs", json={**HELLO, "temperature": 0.5, "metadata": {"ticket": "T-1"}})
    job = response.json()
    assert response.status_code == 202
    assert response.headers["Location"] == f"/v1/jobs/{job['id']}"
    assert response.headers["Retry-After"] == "1"
    assert (job["state"], job["result"], job["error"], job["calls"]) == ("queued", None, None, 0)
    assert (job["finished_at"], job["metadata"], job["lane"]) == (None, {"ticket": "T-1"}, "interactive")
    assert job["created_at"].endswith("Z")
    ((request,),) = stage.sql("SELECT request FROM job_requests WHERE job_id = :id", id=UUID(job["id"]))
    assert request == {**HELLO, "parameters": {"temperature": 0.5}}
    assert [list(ids) for _, _, ids in stage.published] == [[UUID(job["id"])]]


def test_a_finished_job_has_exactly_the_documented_shape(stage):
    job_id = stage.submit()["id"]
    stage.succeed(job_id)
    job = stage.client.get(f"/v1/jobs/{job_id}").json()
    assert job["result"] == {
        "content": "Hello!",
        "finish_reason": "stop",
        "provider": "a",
        "model": "m-a",
        "usage": {"input_tokens": 3, "output_tokens": 5, "cached_tokens": None, "reasoning_tokens": None},
        "degraded": None,
    }
    assert (job["state"], job["cost_usd"], job["calls"], job["error"]) == ("succeeded", "0.000123", 1, None)
    assert job["finished_at"]


def test_waiting_ends_with_the_job(stage):
    job_id = stage.submit()["id"]
    threading.Timer(0.05, stage.succeed, [job_id]).start()
    response = stage.client.get(f"/v1/jobs/{job_id}", params={"wait": 30})
    assert response.json()["state"] == "succeeded"


def test_waiting_for_an_unfinished_job_gives_it_as_it_stands(stage):
    job_id = stage.submit()["id"]
    response = stage.client.get(f"/v1/jobs/{job_id}", params={"wait": 0.01})
    assert (response.status_code, response.json()["state"]) == (200, "queued")
    assert response.headers["Retry-After"] == "1"


def test_nobody_waits_longer_than_the_bound_however_much_is_asked_for(stage, monkeypatch):
    monkeypatch.setattr("api.jobs.MAX_WAIT_S", 0.01)  # else the test's own time is over first
    path = f"/v1/jobs/{stage.submit()['id']}"
    assert stage.client.get(path, params={"wait": 3600}).json()["state"] == "queued"
    assert stage.client.post("/v1/jobs", params={"wait": 1e300}, json=HELLO).status_code == 202


@pytest.mark.parametrize("asked", [{"params": {"wait": 20}}, {"headers": {"Prefer": "foo, wait=20"}}])
def test_a_submit_that_waits_is_200_with_the_answer(stage, asked):
    stage.on_publish = lambda _lane, _delivery, job_ids: stage.succeed(str(job_ids[0]))
    response = stage.client.post("/v1/jobs", json=HELLO, **asked)
    assert (response.status_code, response.json()["result"]["content"]) == (200, "Hello!")
    assert response.headers.get("Preference-Applied") == (None if "params" in asked else "wait=20")


def test_a_submit_that_does_not_wait_is_202_at_once(stage):
    stage.on_publish = lambda _lane, _delivery, job_ids: stage.succeed(str(job_ids[0]))
    for prefer in ("respond-async, wait=20", "wait=0", "wait=soon", "return=minimal", ";;,", ""):
        assert stage.client.post("/v1/jobs", json=HELLO, headers={"Prefer": prefer}).status_code == 202
    outdone = stage.client.post("/v1/jobs?wait=20", json=HELLO, headers={"Prefer": "respond-async"})
    assert (outdone.status_code, outdone.headers["Preference-Applied"]) == (202, "respond-async")


def test_a_preference_says_that_it_was_heard_and_respond_async_outdoes_a_wait(stage):
    job = stage.submit()
    stage.succeed(job["id"])
    for prefer, applied in (("wait=5", "wait=5"), ("wait=999", "wait=60"), ("respond-async, wait=5", "respond-async"), ("wait=x", None)):
        submitted = stage.client.post("/v1/jobs?wait=0.01", json=HELLO, headers={"Prefer": "respond-async" if applied else prefer})
        assert submitted.status_code == 202
        got = stage.client.get(f"/v1/jobs/{job['id']}", headers={"Prefer": prefer})
        assert (got.status_code, got.headers.get("Preference-Applied")) == (200, applied)


def test_waiting_by_preference_ends_with_the_job(stage):
    job_id = stage.submit()["id"]
    threading.Timer(0.05, stage.succeed, [job_id]).start()
    assert stage.client.get(f"/v1/jobs/{job_id}", headers={"Prefer": "wait=30"}).json()["state"] == "succeeded"


def test_three_hundred_long_polls_hold_no_connection_to_postgres(stage):
    job_id = stage.submit()["id"]
    app, parts = stage.client.app, stage.client.app.state.parts

    async def story():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://api", headers=stage.client.headers) as client:
            polls = [asyncio.create_task(client.get(f"/v1/jobs/{job_id}?wait=60", timeout=90)) for _ in range(300)]
            async with asyncio.timeout(60):
                while len(parts.endings._waits[UUID(job_id)]) < 300 or parts.db.pool.checkedout():  # noqa: ASYNC110 - in other tasks
                    await asyncio.sleep(0.01)
            await asyncio.to_thread(stage.succeed, job_id)
            return [(answer.status_code, answer.json()["state"]) for answer in await asyncio.gather(*polls)]

    assert stage.client.portal.call(story) == [(200, "succeeded")] * 300


def test_a_submit_is_accepted_although_it_cannot_be_published(stage):
    def redis_is_down(*_):
        raise ConnectionError

    stage.on_publish = redis_is_down
    assert stage.submit()["state"] == "queued"


def test_the_same_key_gives_the_same_job_and_another_request_under_it_is_refused(stage):
    key = {"Idempotency-Key": "order-7"}
    first = stage.client.post("/v1/jobs", json=HELLO, headers=key)
    again = stage.client.post("/v1/jobs", json=HELLO, headers=key)
    other = stage.client.post("/v1/jobs", json={**HELLO, "temperature": 1}, headers=key)
    elsewhere = stage.client.post("/v1/jobs", json=HELLO, headers={**key, **stage.key("other")})
    assert (first.status_code, again.status_code, other.status_code) == (202, 202, 422)
    assert again.json()["id"] == first.json()["id"] != elsewhere.json()["id"]
    assert again.headers["Idempotent-Replayed"] == "true"
    assert "Idempotent-Replayed" not in first.headers
    assert other.headers["Content-Type"] == "application/problem+json"
    assert len(stage.published) == 2


def test_one_key_used_many_times_at_once_makes_exactly_one_job(stage):
    app = stage.client.app

    async def story():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://api", headers=stage.client.headers) as client:
            posts = [client.post("/v1/jobs", json=HELLO, headers={"Idempotency-Key": "k"}) for _ in range(20)]
            return await asyncio.gather(*posts)

    answers = stage.client.portal.call(story)
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert sum("Idempotent-Replayed" not in answer.headers for answer in answers) == 1
    assert stage.sql("SELECT count(*) FROM jobs") == [(1,)]


def test_a_replay_that_waits_is_200_with_the_answer_of_the_first(stage):
    key = {"Idempotency-Key": "order-8"}
    first = stage.client.post("/v1/jobs", json=HELLO, headers=key).json()["id"]
    stage.succeed(first)
    again = stage.client.post("/v1/jobs?wait=20", json=HELLO, headers=key)
    assert (again.status_code, again.json()["id"], again.json()["state"]) == (200, first, "succeeded")
    assert again.headers["Idempotent-Replayed"] == "true"


def test_jobs_are_found_by_lane_chain_error_code_time_and_custom_id(stage):
    ids = [stage.submit(lane="bulk")["id"], *(stage.submit()["id"] for _ in range(4))]
    changes = ("state = state", "chain = 'a'", 'error = \'{"code": "parked"}\'', "created_at = now() - interval '3 h'", "custom_id = 'T'")
    for job_id, change in zip(ids, changes, strict=True):
        stage.sql(f"UPDATE jobs SET {change} WHERE id = :id", id=UUID(job_id))

    def found(**wanted):
        return [job["id"] for job in stage.client.get("/v1/jobs", params=wanted).json()["data"]]

    assert found(lane="bulk") == [ids[0]]
    assert found(chain="a") == [ids[1]]
    assert found(code="parked") == [ids[2]]
    assert found(since="1h") == [ids[4], ids[2], ids[1], ids[0]]
    assert found(custom_id="T") == [ids[4]]
    assert found(lane="bulk", custom_id="T") == []
    assert found() == ids[::-1]


UNKNOWN_FILTERS = [
    *({"cursor": "x"}, {"cursor": ""}, {"limit": 0}, {"limit": 101}, {"limit": "many"}, {"state": "done"}, {"lane": "fast"}),
    *({"since": "soon"}, {"since": "1"}, {"chain": "\x00"}, {"code": "\x00"}, {"custom_id": "x" * 600}),
]


@pytest.mark.parametrize("wanted", UNKNOWN_FILTERS, ids=str)
def test_a_filter_that_cannot_be_used_is_a_422_naming_it(stage, wanted):
    response = stage.client.get("/v1/jobs", params=wanted)
    assert (response.status_code, response.headers["Content-Type"]) == (422, "application/problem+json")
    assert next(iter(wanted)) in response.json()["detail"]


def test_an_answer_that_cannot_be_read_is_that_jobs_error_and_hides_no_other_job(stage):
    good, bad = (stage.submit()["id"] for _ in range(2))
    stage.succeed(good)
    stage.succeed(bad)
    stage.sql("UPDATE results SET answer = CAST('{}' AS jsonb) WHERE job_id = :id", id=UUID(bad))
    single = stage.client.get(f"/v1/jobs/{bad}").json()
    assert (single["state"], single["result"], single["error"]["code"]) == ("succeeded", None, "unreadable_answer")
    page = stage.client.get("/v1/jobs").json()["data"]
    assert [(job["id"], job["result"] is None) for job in page] == [(bad, True), (good, False)]


@pytest.mark.parametrize("state", ["failed", "cancelled", "expired"])
def test_a_job_that_ended_without_an_answer_is_queued_again(stage, state):
    job_id = stage.submit()["id"]
    stage.sql("UPDATE jobs SET state = :state, finished_at = now() WHERE id = :id", state=state, id=UUID(job_id))
    response = stage.client.post(f"/v1/jobs/{job_id}/requeue")
    assert (response.status_code, response.json()["state"], response.json()["finished_at"]) == (202, "queued", None)
    assert response.headers["Location"] == f"/v1/jobs/{job_id}"


def test_a_job_that_cannot_be_queued_again_is_a_409(stage):
    queued, answered, unusable = (stage.submit()["id"] for _ in range(3))
    stage.succeed(answered)
    stage.sql("UPDATE jobs SET state = 'failed', finished_at = now() WHERE id = :id", id=UUID(unusable))
    stage.sql("UPDATE job_requests SET request = NULL WHERE job_id = :id", id=UUID(unusable))
    for job_id, state in ((queued, "queued"), (answered, "succeeded"), (unusable, "failed")):
        response = stage.client.post(f"/v1/jobs/{job_id}/requeue")
        assert (response.status_code, response.headers["Content-Type"]) == (409, "application/problem+json")
        assert state in response.json()["detail"]
        assert stage.client.get(f"/v1/jobs/{job_id}").json()["state"] == state


def test_a_full_queue_takes_no_interactive_job_of_that_tenant_until_it_is_shorter(stage, monkeypatch):
    admission = stage.client.app.state.parts.admission
    monkeypatch.setattr(admission, "_max_queued", 3)
    monkeypatch.setattr("api.admission.LOOK_S", 3600)
    first = [stage.submit()["id"] for _ in range(3)]
    full = stage.client.post("/v1/jobs", json=HELLO)
    assert (full.status_code, full.headers["Content-Type"]) == (429, "application/problem+json")
    assert int(full.headers["Retry-After"]) >= 1
    assert stage.submit(lane="bulk")["state"] == "queued"
    assert stage.client.post("/v1/jobs", json=HELLO, headers=stage.key("other")).status_code == 202
    stage.sql("UPDATE jobs SET dispatched_at = NULL WHERE id = :id", id=UUID(first[0]))
    monkeypatch.setattr("api.admission.LOOK_S", 0)
    assert stage.client.post("/v1/jobs", json=HELLO).status_code == 429
    stage.succeed(first[1])
    assert stage.submit()["state"] == "queued"
    assert stage.client.post("/v1/jobs", json=HELLO).status_code == 429


def test_a_job_of_then_is_given_back_also_when_the_queue_is_full(stage, monkeypatch):
    key = {"Idempotency-Key": "k"}
    first = stage.client.post("/v1/jobs", json=HELLO, headers=key)
    monkeypatch.setattr(stage.client.app.state.parts.admission, "_max_queued", 1)
    monkeypatch.setattr("api.admission.LOOK_S", 0)
    again = stage.client.post("/v1/jobs", json=HELLO, headers=key)
    assert (again.status_code, again.headers["Idempotent-Replayed"], again.json()["id"]) == (202, "true", first.json()["id"])
    assert stage.client.post("/v1/jobs", json=HELLO | {"max_tokens": 1}, headers=key).status_code == 422
    assert stage.client.post("/v1/jobs", json=HELLO, headers={"Idempotency-Key": "new"}).status_code == 429


def test_workers_are_woken_over_the_redis_of_the_settings_that_were_given(database_url, redis_url, tmp_path, monkeypatch):
    for name in ("DATABASE_URL", "REDIS_URL", "BACKSTOP_DATABASE_URL", "BACKSTOP_REDIS_URL"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "backstop.toml"
    file.write_text('[providers.a]\nbase_url = "http://127.0.0.1:1"\nmodel = "m-a"\n[chains.default]\nproviders = ["a"]\n')
    chosen = Settings(database_url=database_url, redis_url=redis_url, config=file, data=tmp_path)

    async def key(db):
        headers["Authorization"] = f"Bearer {(await keys.create(db, name='test')).secret}"

    headers: dict[str, str] = {}
    play(database_url, key)
    with TestClient(create_app(chosen)) as client, Redis.from_url(redis_url) as redis:
        assert client.post("/v1/jobs", json=HELLO, headers=headers).status_code == 202
        assert redis.llen(queue_name(Lane.INTERACTIVE)) == 1


def test_the_list_is_paged_by_cursor_and_by_link(stage):
    ids = [stage.submit()["id"] for _ in range(5)]
    first = stage.client.get("/v1/jobs", params={"limit": 3, "state": "queued"})
    body = first.json()
    assert body["has_more"] is True
    second = stage.client.get("/v1/jobs", params={"limit": 3, "cursor": body["next_cursor"]}).json()
    assert second["has_more"] is False
    assert second["next_cursor"] is None
    assert [job["id"] for job in body["data"] + second["data"]] == ids[::-1]
    link = first.headers["Link"].removesuffix('>; rel="next"').removeprefix("<")
    assert [job["id"] for job in stage.client.get(link).json()["data"]] == [job["id"] for job in second["data"]]
    assert "state=queued" in link
    assert stage.client.get("/v1/jobs", params={"state": "failed"}).json()["data"] == []


def test_a_page_that_is_just_full_is_the_last(stage):
    stage.submit()
    stage.submit()
    page = stage.client.get("/v1/jobs", params={"limit": 2})
    assert (len(page.json()["data"]), page.json()["has_more"], page.json()["next_cursor"]) == (2, False, None)
    assert "link" not in page.headers


def test_a_queued_job_is_cancelled_at_once_and_a_running_one_is_flagged(stage):
    queued, running = stage.submit()["id"], stage.submit()["id"]
    stage.sql("UPDATE jobs SET state = 'running', worker_id = :w WHERE id = :id", w=uuid4(), id=UUID(running))
    now, later = (stage.client.post(f"/v1/jobs/{job_id}/cancel") for job_id in (queued, running))
    assert (now.status_code, now.json()["state"]) == (200, "cancelled")
    assert (later.status_code, later.json()["state"]) == (202, "running")
    assert stage.sql("SELECT cancel_requested FROM jobs WHERE id = :id", id=UUID(running)) == [(True,)]
    assert stage.client.post(f"/v1/jobs/{queued}/cancel").status_code == 200


def test_a_job_that_succeeded_is_not_cancelled_any_more(stage):
    job_id = stage.submit()["id"]
    stage.succeed(job_id)
    response = stage.client.post(f"/v1/jobs/{job_id}/cancel")
    assert (response.status_code, response.json()["state"]) == (200, "succeeded")


def test_the_calls_of_a_job_say_who_was_asked_and_what_it_cost(stage):
    job_id = stage.submit()["id"]
    stage.succeed(job_id)
    (call,) = stage.client.get(f"/v1/jobs/{job_id}/calls").json()["data"]
    assert (call["provider"], call["outcome"], call["cost_usd"]) == ("a", "answered", "0.000123")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/jobs/{id}"),
        ("GET", "/v1/jobs/{id}?wait=5"),
        ("POST", "/v1/jobs/{id}/cancel"),
        ("GET", "/v1/jobs/{id}/calls"),
        ("POST", "/v1/jobs/{id}/requeue"),
        ("GET", "/v1/jobs/{id}/events"),
    ],
)
def test_another_tenants_job_does_not_exist(stage, method, path):
    job_id = stage.submit()["id"]
    stranger = stage.key("other")
    for unknown in (job_id, str(uuid4()), "nonsense", "%00"):
        response = stage.client.request(method, path.format(id=unknown), headers=stranger)
        assert response.status_code == 404
        assert response.json()["detail"] == "there is no job of that id"
    assert stage.client.get("/v1/jobs", headers=stranger).json()["data"] == []
    assert stage.client.get(f"/v1/jobs/{job_id}").json()["state"] == "queued"


UNUSABLE = [
    ({}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"content": "hi"}]}, "role"),
    ({**HELLO, "chain": "nope"}, "nope"),
    ({**HELLO, "lane": "fast"}, "lane"),
    ({**HELLO, "deadline_s": 0}, "deadline_s"),
    ({**HELLO, "deadline_s": 1e9}, "deadline_s"),
    ({**HELLO, "metadata": {"a": "\x00"}}, "metadata"),
    ({**HELLO, "metadata": [1]}, "metadata"),
    ([], "body"),
    (None, "body"),
]


def test_a_request_that_cannot_be_used_is_a_422_naming_the_field(stage):
    for body, named in UNUSABLE:
        response = stage.client.post("/v1/jobs", json=body)
        assert response.status_code == 422, response.text
        assert named in response.json()["detail"]
    assert stage.sql("SELECT count(*) FROM jobs") == [(0,)]


MALFORMED = [
    b"",
    b"{",
    b"nul",
    b"\xff\xfe",
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"messages": [{"role": "user", "content": "\\u0000"}]}',
    b'{"messages": [{"role": "user", "content": "x"}], "\\ud800": 1}',
    b'{"messages": [{"role": "user", "content": "x"}], "metadata": {"\\ud800": 1}}',
    b'{"messages": [{"role": "user", "content": "x"}], "metadata": {"a": NaN}}',
    b'{"messages": [{"role": "user", "content": "x"}], "metadata": {"a": 1e999}}',
    b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
    b'{"messages": [{"role": "user", "content": "x"}], "deadline_s": NaN}',
    b'{"messages": [{"role": "user", "content": "x"}], "metadata": ' + b'{"a":' * 60 + b"1" + b"}" * 61,
    b'{"messages": [{"role": "user", "content": ' + b"[" * 900 + b"]" * 900 + b"}]}",
    b"[" * 100_000,
    b'{"messages": ' + b"9" * 5_000 + b"}",
]


def test_malformed_bodies_are_never_a_500(stage):
    for raw in MALFORMED:
        response = stage.client.post("/v1/jobs", content=raw, headers={"Content-Type": "application/json"})
        assert response.status_code in (202, 400, 422), (raw[:80], response.text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(["messages", "chain", "lane", "deadline_s", "metadata", "n", "stream", "model", "response_format"])


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(body=st.dictionaries(NAMES, JSON, max_size=5), usable=st.booleans())
def test_no_body_is_ever_a_500(stage, body, usable):
    raw = json.dumps({**body, **(HELLO if usable else {})}).encode()
    response = stage.client.post("/v1/jobs", content=raw, headers={"Content-Type": "application/json"})
    assert response.status_code in (202, 422), response.text


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    values=st.dictionaries(st.sampled_from(["cursor", "limit", "state", "batch", "wait", "by", "since"]), st.text(), max_size=4),
    path=st.sampled_from(["/v1/jobs", "/v1/costs", "/v1/jobs/x"]),
)
def test_no_query_is_ever_a_500(stage, values, path):
    assert stage.client.get(path, params=values).status_code in (200, 404, 422)
