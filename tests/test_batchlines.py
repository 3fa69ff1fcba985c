"""What is taken as a chat request, and what is refused before anybody is asked."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.batchlines import DEEPEST, BatchLine, chat_request, parse
from worker.job import ChatRequest

HI = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"type": "string"}}}


def line(**changes):
    whole = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": HI}}
    return {**whole, **changes}


def formatted(schema):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def nested(levels):
    value = "x"
    for _ in range(levels):
        value = [value]
    return value


def test_a_whole_line_is_read():
    body = {"model": "default", "messages": HI, "temperature": 0.5, "n": 1, "stream": False, "seed": None}
    assert parse(line(body=body)) == BatchLine("a", "default", ChatRequest(HI, {"temperature": 0.5}))


def test_a_line_without_a_model_is_for_the_default_chain():
    assert parse(line()) == BatchLine("a", None, ChatRequest(HI))


def test_what_clients_add_to_every_request_is_taken_and_sent_to_nobody():
    body = {"model": "default", "messages": HI, "metadata": {"run": "7"}, "store": True, "stream_options": None, "audio": None}
    assert parse(line(body=body)) == BatchLine("a", "default", ChatRequest(HI))


def test_numbers_that_postgres_would_blow_up_are_refused():
    chat_request({"messages": [{**HI[0], "extra": [1e300] * 300 + [1e-300, 0.0, -1.5]}]})
    with pytest.raises(ValueError, match=r"^messages: .*digits"):
        chat_request({"messages": [{**HI[0], "extra": [{"a": 1e300}, -1e-300] * 200}]})
    with pytest.raises(ValueError, match=r"^messages: .*digits"):
        chat_request({"messages": HI, "logit_bias": {str(n): 1e300 for n in range(400)}})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"custom_id": None}, "custom_id:"),
        ({"custom_id": ""}, "custom_id:"),
        ({"custom_id": 7}, "custom_id:"),
        ({"method": "GET"}, "method:"),
        ({"url": "/v1/embeddings"}, "url:"),
        ({"body": None}, "body:"),
        ({"body": []}, "body:"),
        ({"body": {"messages": HI, "model": 4}}, "body.model:"),
        ({"body": {"model": "a"}}, "messages:"),
        ({"extra": 1}, "unknown key 'extra'"),
    ],
)
def test_a_line_that_cannot_be_used_says_which_field(changes, said):
    read = parse(line(**changes))
    assert read.request is None
    assert read.problem.startswith(said)
    assert read.custom_id == (None if "custom_id" in changes else "a")


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, {"role": "tool", "content": "42"}],
        [{"role": "developer", "content": ""}, *HI],
    ],
)
def test_messages_as_openai_takes_them_are_taken_as_they_are(messages):
    assert chat_request({"messages": messages}).messages == messages


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        (None, "messages:"),
        ([], "messages:"),
        ("hi", "messages:"),
        (["hi"], "messages[0]:"),
        ([*HI, {"content": "x"}], "messages[1].role:"),
        ([{"role": "robot", "content": "x"}], "messages[0].role:"),
        ([{"role": ["user"], "content": "x"}], "messages[0].role:"),
        ([{"role": "user"}], "messages[0].content:"),
        ([{"role": "assistant", "content": None}], "messages[0].content:"),
        ([{"role": "user", "content": 7}], "messages[0].content:"),
        ([{"role": "user", "content": []}], "messages[0].content:"),
        ([{"role": "user", "content": [{"text": "x"}]}], "messages[0].content:"),
        ([{"role": "user", "content": "x", "score": float("nan")}], "messages:"),
    ],
)
def test_messages_nobody_could_answer_are_refused_by_field(messages, field):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        chat_request({"messages": messages})
    assert str(caught.value).startswith(field)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("n", 2, "one answer"),
        ("n", True, "one answer"),
        ("stream", True, "cannot be streamed"),
        ("temperature", "hot", "from 0 to 2"),
        ("temperature", True, "from 0 to 2"),
        ("temperature", float("nan"), "from 0 to 2"),
        ("top_p", float("inf"), "from 0 to 1"),
        ("max_tokens", 0, "whole number"),
        ("max_tokens", 1.5, "whole number"),
        ("max_token", 5, "did you mean 'max_tokens'?"),
        ("functions", [], "unknown parameter"),
        ("model", "default", "as `chain`"),
        ("store", "yes", "true or false"),
        ("logit_bias", {"1": float("-inf")}, "no JSON number"),
        ("response_format", {"type": "yaml"}, "json_schema"),
        ("response_format", {"type": "json_schema"}, "expected a JSON Schema"),
        ("response_format", formatted({"type": "objekt"}), "not a JSON Schema at $.type"),
        ("response_format", formatted({"$ref": "http://127.0.0.1/x"}), "$ref"),
        ("response_format", formatted({"anyOf": [{"items": {"$ref": "file:///x"}}]}), "$ref"),
    ],
)
def test_parameters_that_cannot_be_sent_are_refused_by_name(name, value, said):
    with pytest.raises(ValueError, match=f"^{name}") as caught:
        chat_request({"messages": HI, name: value})
    assert said in str(caught.value)


def test_a_schema_may_point_into_itself():
    given_format = formatted(SCHEMA)
    assert chat_request({"messages": HI, "response_format": given_format}).parameters["response_format"] == given_format


def test_what_postgres_cannot_store_is_replaced_at_any_depth():
    messages = [{"role": "user", "content": [{"type": "text", "te\x00xt": ["a\ud800b", {"c": "\x00"}]}]}]
    part = chat_request({"messages": messages, "stop": ["\x00"]})
    assert part.messages[0]["content"] == [{"type": "text", "te\ufffdxt": ["a\ufffdb", {"c": "\ufffd"}]}]
    assert part.parameters["stop"] == ["\ufffd"]


def test_nesting_ends_somewhere():
    chat_request({"messages": HI, "logit_bias": {"a": nested(DEEPEST - 1)}})
    with pytest.raises(ValueError, match="nested more than"):
        chat_request({"messages": HI, "logit_bias": {"a": nested(DEEPEST)}})
    with pytest.raises(ValueError, match="nested more than"):
        chat_request({"messages": HI, "tools": [{"a": nested(100_000)}]})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
PARAMETER = st.sampled_from(["temperature", "n", "stream", "stop", "response_format", "tools", "seed", "max_tokens", "x"])
MESSAGE = st.fixed_dictionaries({}, optional={"role": st.just("user") | JSON, "content": JSON, "tool_calls": JSON})


@given(body=JSON | st.dictionaries(PARAMETER, JSON).flatmap(
    lambda body: st.fixed_dictionaries({"messages": JSON | st.lists(MESSAGE, min_size=1, max_size=3), "model": JSON}).map(
        lambda rest: {**body, **rest}
    )
))  # fmt: skip
def test_a_line_of_any_shape_is_taken_or_refused_but_never_raises(body):
    read = parse(line(body=body))
    assert (read.request is None) != (read.problem is None)
    if read.request is not None:
        stored = json.dumps(read.request.to_json(), allow_nan=False)
        assert "\\u0000" not in stored
        assert ChatRequest.from_json(json.loads(stored)) == read.request
