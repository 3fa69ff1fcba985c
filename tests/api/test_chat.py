"""Chat completions in OpenAI's words: the answer, the errors, the stream, and what becomes of a job whose client has gone."""

import json
import threading
import time
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

HELLO = {"model": "default", "messages": [{"role": "user", "content": "Hello"}]}
TOOL_CALL = {"id": "call_1", "type": "function", "function": {"name": "close", "arguments": '{"ticket": 7}'}}


@pytest.fixture
def answering(stage):
    """Each job is answered as soon as it is published."""
    stage.on_publish = lambda _lane, _delivery, job_ids: stage.succeed(str(job_ids[0]))
    return stage


@pytest.fixture
def quick(monkeypatch):
    """A stream begins after ten milliseconds of waiting."""
    monkeypatch.setattr("api.chat.BEAT_S", 0.01)


def ask(stage, headers=None, **fields):
    return stage.client.post("/v1/chat/completions", json={**HELLO, **fields}, headers=headers)


def chunks(text):
    """The data of each event; a comment is None."""
    found = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        said = block.removeprefix("data: ")
        found.append(None if block.startswith(":") else said if said == "[DONE]" else json.loads(said))
    return found


def end(stage, state, error=None):
    """Every job ends so as soon as it is published."""

    def ended(_lane, _delivery, job_ids):
        sql = "UPDATE jobs SET state = :state, finished_at = now(), error = CAST(:error AS jsonb) WHERE id = :id"
        stage.sql(sql, state=state, error=json.dumps(error), id=job_ids[0])

    stage.on_publish = ended


def test_an_answer_is_a_chat_completion_with_what_it_cost_in_headers(answering):
    response = ask(answering, temperature=0.5)
    ((job_id, chain, lane),) = answering.sql("SELECT id, chain, lane FROM jobs")
    body = response.json()
    assert response.status_code == 200
    assert abs(body.pop("created") - time.time()) < 60
    assert body == {
        "id": f"chatcmpl-{job_id.hex}",
        "object": "chat.completion",
        "model": "m-a",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello!", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 5,
            "total_tokens": 8,
            "prompt_tokens_details": {"cached_tokens": None},
            "completion_tokens_details": {"reasoning_tokens": None},
        },
        "backstop": {"provider": "a", "degraded": None, "cost_usd": "0.000123"},
    }
    said = {name: value for name, value in response.headers.items() if name.startswith("x-backstop")}
    assert said == {"x-backstop-job-id": str(job_id), "x-backstop-provider": "a", "x-backstop-cost-usd": "0.000123"}
    assert (chain, lane) == ("default", "interactive")
    ((request,),) = answering.sql("SELECT request FROM job_requests")
    assert request == {"messages": HELLO["messages"], "parameters": {"temperature": 0.5}}


def test_a_degraded_answer_says_so(answering):
    published = answering.on_publish

    def degraded(*message):
        published(*message)
        answering.sql("""UPDATE results SET answer = answer || '{"degraded": "smaller"}'""")

    answering.on_publish = degraded
    response = ask(answering)
    assert response.headers["x-backstop-degraded"] == "smaller"
    assert response.json()["backstop"]["degraded"] == "smaller"


@pytest.mark.parametrize("model", ["default", "a", "m-a"])
def test_the_model_is_a_chain_a_provider_or_its_model(answering, model):
    assert ask(answering, model=model).status_code == 200
    assert answering.sql("SELECT chain FROM jobs") == [(model,)]


def test_an_unknown_model_is_a_404_that_lists_those_there_are(stage):
    response = ask(stage, model="defualt")
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert "did you mean 'default'?" in error["message"]
    assert stage.sql("SELECT FROM jobs") == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"temperatur": 1}, "temperatur"),
        ({"temperature": 3}, "temperature"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "nobody", "content": "b"}]}, "messages[1].role"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema.schema"),
        ({"stream": True, "stream_options": {"include_use": True}}, "stream_options.include_use"),
        ({"metadata": {"a": "\x00"}}, "metadata.a"),
        ({"model": ""}, "model"),
    ],
)
def test_what_cannot_be_used_is_a_400_naming_it_and_no_job(stage, fields, param):
    response = ask(stage, **fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert stage.sql("SELECT FROM jobs") == []


def test_metadata_is_kept_with_the_job_and_sent_to_nobody(answering):
    assert ask(answering, metadata={"ticket": "T-1"}).status_code == 200
    assert answering.sql("SELECT metadata FROM jobs") == [({"ticket": "T-1"},)]
    assert answering.sql("SELECT request -> 'parameters' FROM job_requests") == [({},)]


@pytest.mark.parametrize(
    ("state", "error", "status", "code"),
    [
        ("failed", {"code": "invalid_request"}, 400, "invalid_request"),
        ("failed", {"code": "unsupported"}, 400, "unsupported"),
        ("failed", {"code": "content_policy"}, 400, "content_filter"),
        ("failed", {"code": "context_too_long"}, 400, "context_length_exceeded"),
        ("failed", {"code": "all_providers_failed"}, 503, "all_providers_failed"),
        ("failed", {"code": "billing_unknown"}, 503, "billing_unknown"),
        ("failed", {"code": "unreadable_request"}, 500, "unreadable_request"),
        ("failed", None, 503, "failed"),
        ("expired", {"code": "deadline"}, 504, "deadline_exceeded"),
        ("cancelled", None, 409, "job_cancelled"),
        ("cancelled", {"code": "all_providers_failed"}, 409, "job_cancelled"),
    ],
)
def test_a_job_that_ends_without_an_answer_is_an_error_nobody_should_retry(stage, state, error, status, code):
    end(stage, state, error and {"message": "what happened", "providers": [], **error})
    response = ask(stage)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert response.headers["x-should-retry"] == "false"
    assert response.headers["x-backstop-job-id"] == str(stage.sql("SELECT id FROM jobs")[0].id)
    assert ("what happened" in response.json()["error"]["message"]) == (error is not None)


def test_an_error_says_why_each_provider_gave_no_answer(stage):
    providers = [{"provider": "a", "reason": "server_error", "http_status": 500}, {"provider": "b", "reason": "breaker_open"}]
    end(stage, "failed", {"code": "all_providers_failed", "message": "all providers failed", "providers": providers})
    assert ask(stage).json()["error"]["message"] == "all providers failed (a: server_error 500, b: breaker_open)"


def test_the_job_has_as_long_as_the_client_waits_and_is_cancelled_after_that(stage):
    response = ask(stage, {"x-stainless-read-timeout": "0.2"})
    assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert response.headers["x-should-retry"] == "false"
    ((state, deadline_s),) = stage.sql("SELECT state, deadline_s FROM jobs")
    assert (state, pytest.approx(deadline_s)) == ("cancelled", 0.18)


@pytest.mark.parametrize(
    ("headers", "deadline_s"),
    [
        ({}, 599),
        ({"x-stainless-read-timeout": "20.0"}, 19),
        ({"x-stainless-timeout": "5"}, 4.5),
        ({"x-stainless-read-timeout": "86400"}, 599),
        *(({"x-stainless-read-timeout": odd}, 599) for odd in ("nan", "inf", "-1", "0", "soon", "", "1e999")),
    ],
)
def test_the_deadline_follows_the_clients_patience(answering, headers, deadline_s):
    assert ask(answering, headers).status_code == 200
    assert answering.sql("SELECT deadline_s FROM jobs")[0].deadline_s == pytest.approx(deadline_s)


def test_the_same_key_joins_the_earlier_job_and_it_is_paid_once(stage):
    key = {"Idempotency-Key": "order-7", "x-stainless-read-timeout": "0.1"}
    first = ask(stage, key)
    assert (first.status_code, first.json()["error"]["code"]) == (504, "still_running")
    assert "x-should-retry" not in first.headers
    stage.succeed(first.headers["x-backstop-job-id"])
    assert ask(stage, key).json()["choices"][0]["message"]["content"] == "Hello!"
    assert len(stage.published) == 1
    other = ask(stage, key, temperature=1)
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_key_reused")
    assert other.headers["x-should-retry"] == "false"
    assert ask(stage, {"Idempotency-Key": "a b"}).json()["error"]["param"] == "idempotency-key"


def test_a_full_queue_is_a_429_that_says_when_to_come_back(stage, monkeypatch):
    monkeypatch.setattr(stage.client.app.state.parts.admission, "_max_queued", 0)
    response = ask(stage)
    assert (response.status_code, response.headers["Retry-After"]) == (429, "5")
    assert response.json()["error"]["type"] == "rate_limit_error"
    assert "x-should-retry" not in response.headers
    assert stage.sql("SELECT FROM jobs") == []


def test_a_stream_is_the_whole_answer_then_its_end(answering):
    response = ask(answering, stream=True)
    assert response.headers["Content-Type"].startswith("text/event-stream")
    assert response.headers["x-backstop-provider"] == "a"
    said, finish, done = chunks(response.text)
    assert done == "[DONE]"
    for chunk in (said, finish):
        assert (chunk["object"], chunk["model"], "usage" in chunk) == ("chat.completion.chunk", "m-a", False)
        assert chunk["id"] == f"chatcmpl-{UUID(response.headers['x-backstop-job-id']).hex}"
    assert said["choices"][0]["delta"] == {"role": "assistant", "content": "Hello!", "refusal": None}
    assert (said["choices"][0]["finish_reason"], finish["choices"][0]["finish_reason"]) == (None, "stop")
    assert finish["choices"][0]["delta"] == {}


def test_a_stream_counts_tokens_at_its_end_when_asked_to(answering):
    *before, usage, _ = chunks(ask(answering, stream=True, stream_options={"include_usage": True}).text)
    assert [chunk["usage"] for chunk in before] == [None, None]
    assert (usage["choices"], usage["usage"]["total_tokens"]) == ([], 8)


def test_tool_calls_are_numbered_in_a_stream(answering):
    published = answering.on_publish

    def called(*message):
        published(*message)
        calls = json.dumps({"content": None, "tool_calls": [TOOL_CALL, TOOL_CALL], "finish_reason": "tool_calls"})
        answering.sql("UPDATE results SET answer = answer || CAST(:calls AS jsonb)", calls=calls)

    answering.on_publish = called
    said, finish, _ = chunks(ask(answering, stream=True).text)
    assert said["choices"][0]["delta"]["tool_calls"] == [{"index": 0, **TOOL_CALL}, {"index": 1, **TOOL_CALL}]
    assert finish["choices"][0]["finish_reason"] == "tool_calls"
    assert ask(answering).json()["choices"][0]["message"]["tool_calls"] == [TOOL_CALL, TOOL_CALL]


def test_an_error_before_a_stream_begins_is_an_error_with_its_status(stage):
    end(stage, "failed", {"code": "content_policy", "message": "no", "providers": []})
    response = ask(stage, stream=True)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "content_filter")


def test_a_stream_that_waits_begins_with_comments(stage, quick):
    stage.on_publish = lambda _lane, _delivery, job_ids: threading.Timer(0.3, stage.succeed, [str(job_ids[0])]).start()
    response = ask(stage, stream=True)
    *waiting, said, _, done = chunks(response.text)
    assert len(waiting) > 1
    assert set(waiting) == {None}
    assert (said["choices"][0]["delta"]["content"], done) == ("Hello!", "[DONE]")
    assert response.headers["x-backstop-job-id"]


def test_a_stream_that_begins_begins_with_a_comment(stage, monkeypatch):
    async def one(_):
        yield

    monkeypatch.setattr("api.chat._beats", one)
    stage.on_publish = lambda _lane, _delivery, job_ids: stage.succeed(str(job_ids[0]))
    waiting, said, *_ = chunks(ask(stage, stream=True).text)
    assert (waiting, said["choices"][0]["delta"]["content"]) == (None, "Hello!")


def test_an_error_after_a_stream_began_is_its_last_event(stage, quick):
    response = ask(stage, {"x-stainless-read-timeout": "0.2"}, stream=True)
    assert response.status_code == 200
    assert chunks(response.text)[-1]["error"]["code"] == "deadline_exceeded"
    assert stage.sql("SELECT state FROM jobs") == [("cancelled",)]


_WORDS = st.text(max_size=8)
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _WORDS | st.just("\x00\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_WORDS, inner, max_size=3),
    max_leaves=8,
)
_FIELDS = ["messages", "stream", "stream_options", "metadata", "temperature", "tools", "response_format", "n", "stop", "x"]


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fields=st.dictionaries(st.sampled_from(_FIELDS), _VALUES, max_size=4), model=st.just("default") | _VALUES)
def test_nothing_that_is_sent_is_a_500(answering, fields, model):
    content = json.dumps({**HELLO, **fields, "model": model})
    response = answering.client.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code in (200, 400, 404), response.text


def test_another_tenant_cannot_join_a_job_by_its_key(answering):
    key = {"Idempotency-Key": str(uuid4())}
    ask(answering, key)
    assert ask(answering, {**key, **answering.key("other")}).status_code == 200
    assert len(answering.sql("SELECT DISTINCT tenant FROM jobs")) == 2
