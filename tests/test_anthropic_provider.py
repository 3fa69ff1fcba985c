"""The Anthropic Messages dialect: what requests become and what bodies mean (pure), and what happens on the wire."""

import asyncio
import json
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vendor import vendor

from worker.config import ProviderConfig
from worker.cost import Usage
from worker.errors import UsageError
from worker.job import ChatRequest
from worker.providers.anthropic import AnthropicMessages
from worker.providers.anthropic_answers import read_reply, usage_of
from worker.providers.anthropic_request import Unsupported, translated
from worker.providers.anthropic_schema import closed
from worker.providers.http import client
from worker.signals import POLICIES, Next, Signal

HELLO = [{"role": "user", "content": "Hello"}]
TEXT = {"type": "text", "text": "Hello"}


def body(*messages, **parameters):
    return translated(ChatRequest(list(messages) or HELLO, parameters), "claude")


def user(content):
    return {"role": "user", "content": content}


def turn(role, *blocks):
    return {"role": role, "content": list(blocks)}


def text(said):
    return {"type": "text", "text": said}


def function(name="look", **more):
    return {"type": "function", "function": {"name": name, **more}}


def call(arguments='{"at": "VPN"}', id="call_1"):
    return {"id": id, "type": "function", "function": {"name": "look", "arguments": arguments}}


def test_a_plain_request_becomes_one_turn_with_a_limit():
    assert body() == {"model": "claude", "max_tokens": 4096, "messages": [turn("user", TEXT)]}


USE = {"type": "tool_use", "id": "call_1", "name": "look", "input": {"at": "VPN"}}
TURNS = [
    ([user("a"), {"role": "assistant", "content": "b"}, user("c")],
     [turn("user", text("a")), turn("assistant", text("b")), turn("user", text("c"))]),
    ([user("a"), user([text("b"), text("c")])], [turn("user", text("a"), text("b"), text("c"))]),
    ([user([text("see"), {"type": "image_url", "image_url": {"url": "data:image/PNG;base64,aGk=", "detail": "low"}}])],
     [turn("user", text("see"), {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}})]),
    ([user([{"type": "image_url", "image_url": {"url": "https://x.example/a.png"}}])],
     [turn("user", {"type": "image", "source": {"type": "url", "url": "https://x.example/a.png"}})]),
    ([user("a"), {"role": "assistant", "content": None, "tool_calls": [call()]}], [turn("user", text("a")), turn("assistant", USE)]),
    ([user("a"), {"role": "assistant", "content": "hm", "tool_calls": [call()]}],
     [turn("user", text("a")), turn("assistant", text("hm"), USE)]),
    ([user("a"), {"role": "assistant", "tool_calls": [call(""), call(id="functions.look:1")]},
      {"role": "tool", "tool_call_id": "call_1", "content": "up"},
      {"role": "tool", "tool_call_id": "functions.look:1", "content": [text("down")]},
      user("and?")],
     [turn("user", text("a")), turn("assistant", {**USE, "input": {}}, {**USE, "id": "functions_look_1"}),
      turn("user", {"type": "tool_result", "tool_use_id": "call_1", "content": [text("up")]},
           {"type": "tool_result", "tool_use_id": "functions_look_1", "content": [text("down")]}, text("and?"))]),
    ([user("a"), {"role": "assistant", "content": ""}, {"role": "assistant", "content": None}, user("b")],
     [turn("user", text("a"), text("b"))]),
    ([user([text("a"), text(" ")])], [turn("user", text("a"))]),
    ([user("a"), {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}],
     [turn("user", text("a")), turn("assistant", text("no"))]),
    ([{"role": "user", "content": "a", "name": "Ann"}], [turn("user", text("a"))]),
]  # fmt: skip


@pytest.mark.parametrize(("messages", "turns"), TURNS)
def test_messages_become_alternating_turns_of_blocks(messages, turns):
    assert body(*messages)["messages"] == turns


def test_system_and_developer_messages_become_the_system_prompt_wherever_they_stand():
    asked = body({"role": "system", "content": "A"}, user("x"), {"role": "developer", "content": [text("B"), text("C")]})
    assert (asked["system"], asked["messages"]) == ("A\n\nB\n\nC", [turn("user", text("x"))])


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 1}}, "required": ["n"]}
CLOSED = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
TOOL = {"name": "look", "description": "d", "input_schema": SCHEMA}
TOOLS = [function(description="d", parameters=SCHEMA, strict=True)]


@pytest.mark.parametrize(
    ("parameters", "sent"),
    [
        ({"max_tokens": 7}, {"max_tokens": 7}),
        ({"max_completion_tokens": 8, "max_tokens": 7}, {"max_tokens": 8}),
        ({"max_tokens": None}, {"max_tokens": 4096}),
        ({"temperature": 0.2}, {"temperature": 0.2}),
        ({"temperature": 1.7}, {"temperature": 1}),
        ({"temperature": 0.2, "top_p": 0.5}, {"temperature": 0.2}),
        ({"top_p": 0.5}, {"top_p": 0.5}),
        ({"stop": "END"}, {"stop_sequences": ["END"]}),
        ({"stop": ["A", "B"]}, {"stop_sequences": ["A", "B"]}),
        ({"stop": []}, {}),
        ({"user": "u-1"}, {"metadata": {"user_id": "u-1"}}),
        ({"safety_identifier": "s", "user": "u-1"}, {"metadata": {"user_id": "s"}}),
        ({"top_k": 5, "thinking": {"type": "disabled"}}, {"top_k": 5, "thinking": {"type": "disabled"}}),
        ({"tools": TOOLS}, {"tools": [TOOL], "tool_choice": {"type": "auto"}}),
        ({"tools": [function()]}, {"tools": [{"name": "look", "input_schema": {"type": "object", "properties": {}}}],
                                   "tool_choice": {"type": "auto"}}),
        ({"tools": TOOLS, "tool_choice": "required"}, {"tools": [TOOL], "tool_choice": {"type": "any"}}),
        ({"tools": TOOLS, "tool_choice": "none", "parallel_tool_calls": False}, {"tools": [TOOL], "tool_choice": {"type": "none"}}),
        ({"tools": TOOLS, "tool_choice": function()}, {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "look"}}),
        ({"tools": TOOLS, "parallel_tool_calls": False},
         {"tools": [TOOL], "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}),
        ({"tools": [], "tool_choice": "auto"}, {}),
        ({"response_format": {"type": "text"}}, {}),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}},
         {"output_config": {"format": {"type": "json_schema", "schema": CLOSED}}}),
        ({"response_format": {"type": "json_object"}}, {"system": "Answer with one JSON object and nothing else."}),
        ({"seed": 1, "frequency_penalty": 0.5, "reasoning_effort": "low", "metadata": {"a": "b"}, "store": True}, {}),
        ({"n": 1, "logprobs": False, "top_logprobs": 0, "logit_bias": {}, "modalities": ["text"], "audio": None}, {}),
        ({"model": "evil", "messages": [], "stream": True, "stream_options": {}}, {}),
    ],
)  # fmt: skip
def test_parameters_are_said_in_the_words_of_the_api_and_hints_are_dropped(parameters, sent):
    assert body(**parameters) == {"max_tokens": 4096, **sent, "model": "claude", "messages": [turn("user", TEXT)]}


@pytest.mark.parametrize(
    ("messages", "parameters", "what"),
    [
        (HELLO, {"n": 2}, "n"),
        (HELLO, {"logprobs": True}, "logprobs"),
        (HELLO, {"logit_bias": {"50256": -100}}, "logit_bias"),
        (HELLO, {"modalities": ["text", "audio"]}, "modalities"),
        (HELLO, {"functions": [{"name": "f"}]}, "functions"),
        (HELLO, {"web_search_options": {}}, "web_search_options"),
        (HELLO, {"repetition_penalty": 1.1}, "repetition_penalty"),
        (HELLO, {"A sentence, of the prompt": 1}, "parameter"),
        (HELLO, {"stop": "\n"}, "stop"),
        (HELLO, {"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools"),
        (HELLO, {"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        (HELLO, {"response_format": {"type": "grammar"}}, "response_format"),
        (HELLO, {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}}, "response_format"),
        ([{"role": "function", "name": "f", "content": "x"}], {}, "role"),
        ([user([{"type": "input_audio", "input_audio": {}}])], {}, "content.input_audio"),
        ([user([{"type": "image_url", "image_url": {"url": "http://x.example/a.png"}}])], {}, "content.image_url"),
        ([user([{"type": "image_url", "image_url": {"url": "data:image/png,raw"}}])], {}, "content.image_url"),
        ([user(7)], {}, "content"),
        ([user([{"type": "my secret"}])], {}, "content"),
        ([user("a"), {"role": "assistant", "tool_calls": [call("{cut")]}], {}, "tool_calls"),
        ([user("a"), {"role": "assistant", "tool_calls": [call("[1]")]}], {}, "tool_calls"),
        ([{"role": "system", "content": "only"}], {}, "no_messages"),
    ],
)
def test_what_the_api_has_no_words_for_is_unsupported_and_named(messages, parameters, what):
    with pytest.raises(Unsupported) as caught:
        translated(ChatRequest(messages, parameters), "claude")
    assert caught.value.what == what


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "string", "minLength": 3, "pattern": "a+", "format": "email"}, {"type": "string", "format": "email"}),
        ({"type": "string", "format": "iri"}, {"type": "string"}),
        ({"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": 3},
         {"type": "array", "items": {"type": "number"}, "minItems": 1}),
        ({"type": "array", "items": SCHEMA, "minItems": 2}, {"type": "array", "items": CLOSED}),
        ({"oneOf": [SCHEMA, {"type": "null"}]}, {"anyOf": [CLOSED, {"type": "null"}]}),
        ({"type": ["object", "null"], "properties": {"a": SCHEMA}, "additionalProperties": True},
         {"type": ["object", "null"], "properties": {"a": CLOSED}, "additionalProperties": False}),
        ({"$defs": {"x": SCHEMA}, "$ref": "#/$defs/x"}, {"$defs": {"x": CLOSED}, "$ref": "#/$defs/x"}),
        ({"type": "object", "properties": {}, "additionalProperties": False},
         {"type": "object", "properties": {}, "additionalProperties": False}),
        ({"enum": ["a"], "$schema": "https://json-schema.org/draft/2020-12/schema", "examples": ["a"]}, {"enum": ["a"]}),
        ({"type": "object"}, None),
        ({"type": "object", "properties": {}}, None),
        ({"type": "object", "properties": {"a": {}}, "additionalProperties": {"type": "string"}}, None),
        ({"type": "object", "properties": {"a": True}}, None),
        ({"allOf": [SCHEMA, SCHEMA]}, None),
        ({**SCHEMA, "anyOf": [SCHEMA]}, None),
        ({"not": {"type": "null"}}, None),
        ({"type": "array", "prefixItems": [{"type": "string"}]}, None),
        ({"$ref": "https://x.example/schema"}, None),
        ({"anyOf": 5}, None),
    ],
)  # fmt: skip
def test_a_schema_is_closed_and_loses_its_bounds_or_cannot_be_said(schema, said):
    assert closed(schema) == said


def test_a_schema_nested_without_end_cannot_be_said():
    schema = {"type": "null"}
    for _ in range(1000):
        schema = {"anyOf": [schema]}
    assert closed(schema) is None


# Answers


def read(status, content, headers=None):
    raw = content if isinstance(content, bytes) else (content if isinstance(content, str) else json.dumps(content)).encode()
    return read_reply(status, headers or {}, raw, provider="p", model="m", now=0)


def message(*blocks, stop="end_turn", **extra):
    usage = {"input_tokens": 11, "output_tokens": 4}
    about = {"id": "msg_1", "type": "message", "role": "assistant", "model": "claude-1", "stop_sequence": None}
    return {**about, "content": list(blocks), "stop_reason": stop, "usage": usage, **extra}


def refused(kind, said="", **more):
    return {"type": "error", "error": {"type": kind, "message": said, **more}, "request_id": "req_1"}


def test_an_answer_is_read_with_its_usage_and_the_model_that_gave_it():
    reply = read(200, message({"type": "thinking", "thinking": "hm", "signature": "x"}, text("All "), text("good.")))
    assert (reply.signal, reply.http_status) == (Signal.ANSWERED, 200)
    assert (reply.answer.content, reply.answer.finish_reason, reply.answer.tool_calls) == ("All good.", "stop", None)
    assert (reply.answer.provider, reply.answer.model) == ("p", "claude-1")
    assert reply.usage == reply.answer.usage == Usage(11, 4)


@pytest.mark.parametrize(
    ("stop", "finish"),
    [("end_turn", "stop"), ("stop_sequence", "stop"), ("max_tokens", "length"), ("model_context_window_exceeded", "length"),
     ("tool_use", "tool_calls"), ("compaction", "compaction"), (None, "stop"), (7, "stop")],
)  # fmt: skip
def test_a_stop_reason_that_is_no_fault_is_a_finish_reason(stop, finish):
    reply = read(200, message(text("Hm"), stop=stop))
    assert (reply.signal, reply.answer.finish_reason) == (Signal.ANSWERED, finish)


def test_tool_use_becomes_tool_calls():
    use = {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {"at": "Zürich"}}
    answer = read(200, message(text("I look."), use, stop="tool_use")).answer
    expected = {"id": "toolu_1", "type": "function", "function": {"name": "look", "arguments": '{"at": "Zürich"}'}}
    assert (answer.content, answer.tool_calls) == ("I look.", [expected])
    assert read(200, message(use, stop="tool_use")).answer.content is None


@pytest.mark.parametrize(
    ("content", "signal", "code"),
    [
        (message(text("Half"), stop="refusal"), Signal.CONTENT_POLICY, "refusal"),
        (message(text("Half"), stop="pause_turn"), Signal.UNFIT, "finish_pause_turn"),
        (message(stop="max_tokens"), Signal.UNFIT, "empty_length"),
        (message({"type": "thinking", "thinking": "hm"}, stop="max_tokens"), Signal.UNFIT, "empty_length"),
        (message(), Signal.MALFORMED, "empty_answer"),
        (message(text(" \n")), Signal.MALFORMED, "empty_answer"),
        (message(7, None, {"type": "text", "text": 5}), Signal.MALFORMED, "empty_answer"),
        ({"type": "message"}, Signal.MALFORMED, "no_content"),
        ({"type": "message", "content": "text"}, Signal.MALFORMED, "no_content"),
        ("[]", Signal.MALFORMED, "no_content"),
        ("7", Signal.MALFORMED, "no_content"),
        ("", Signal.MALFORMED, "not_json"),
        ("<html></html>", Signal.MALFORMED, "not_json"),
        ("[" * 100_000, Signal.MALFORMED, "not_json"),
    ],
)
def test_a_200_without_an_answer_says_why(content, signal, code):
    reply = read(200, content)
    assert (reply.signal, reply.error_code, reply.answer) == (signal, code, None)


def test_what_was_used_is_kept_where_there_is_no_answer():
    assert read(200, message(stop="refusal")).usage == Usage(11, 4)


TOO_LONG = "input length and `max_tokens` exceed context limit: 188240 + 21333 > 200000, decrease input length or `max_tokens`"
REFUSALS = [
    (400, refused("invalid_request_error", "messages.0.content: Field required"), "invalid_request", "invalid_request_error"),
    (400, refused("invalid_request_error", "Your credit balance is too low to access the Anthropic API."), "quota_exhausted",
     "invalid_request_error"),
    (400, refused("invalid_request_error", "You have reached your specified API usage limits. You will regain access on 2026-08-01"),
     "quota_exhausted", "invalid_request_error"),
    (400, refused("invalid_request_error", "You have reached your specified workspace API usage limits."), "quota_exhausted",
     "invalid_request_error"),
    (400, refused("invalid_request_error", "prompt is too long: 213462 tokens > 200000 maximum"), "context_too_long",
     "invalid_request_error"),
    (400, refused("invalid_request_error", TOO_LONG), "context_too_long", "invalid_request_error"),
    (400, refused("invalid_request_error", "Output blocked by content filtering policy"), "content_policy", "invalid_request_error"),
    (400, refused("invalid_request_error", "max_tokens: 9000 > 4096, which is the maximum allowed number of output tokens for claude-3"),
     Signal.UNSUPPORTED, "invalid_request_error"),
    (400, refused("invalid_request_error", "output_config.format.schema: too complex"), Signal.UNSUPPORTED, "invalid_request_error"),
    (400, refused("invalid_request_error", "This model does not support prefill."), Signal.UNSUPPORTED, "invalid_request_error"),
    (401, refused("authentication_error", "invalid x-api-key"), "unauthorized", "authentication_error"),
    (402, refused("billing_error", "Payment required"), "quota_exhausted", "billing_error"),
    (403, refused("permission_error", "Your region is not supported"), "unauthorized", "permission_error"),
    (404, refused("not_found_error", "model: claude-9"), "model_not_found", "not_found_error"),
    (409, refused("conflict_error", "modified concurrently"), "conflict", "conflict_error"),
    (413, refused("request_too_large", "Request exceeds the maximum size"), "context_too_long", "request_too_large"),
    (429, refused("rate_limit_error", "This request would exceed the rate limit of your team"), "rate_limited", "rate_limit_error"),
    (429, refused("rate_limit_error", "Monthly cap", details={"error_code": "enforced_spend_limit_reached"}), "quota_exhausted",
     "enforced_spend_limit_reached"),
    (500, refused("api_error", "Internal server error"), "server_error", "api_error"),
    (504, refused("timeout_error", "Request timeout"), "request_timeout", "timeout_error"),
    (529, refused("overloaded_error", "Overloaded"), "overloaded", "overloaded_error"),
    (200, refused("overloaded_error", "Overloaded"), "overloaded", "overloaded_error"),
    (200, refused("api_error", "Internal server error"), "server_error", "api_error"),
    (503, "<html>Service Unavailable</html>", "overloaded", None),
    (502, "", "server_error", None),
    (301, "", "model_not_found", "redirect"),
    (400, refused("a sentence, which may quote the prompt", "my secret"), "invalid_request", None),
]  # fmt: skip


@pytest.mark.parametrize(("status", "content", "signal", "code"), REFUSALS)
def test_a_refusal_means_what_anthropic_means(status, content, signal, code):
    reply = read(status, content)
    assert (reply.signal, reply.error_code, reply.http_status, reply.answer) == (signal, code, status, None)
    assert "secret" not in repr(reply)


def test_what_this_provider_cannot_serve_is_left_to_others():
    policy = POLICIES[Signal.UNSUPPORTED]
    assert policy.next is not Next.STOP
    assert policy.hopeless


@pytest.mark.parametrize(
    ("usage", "normal"),
    [
        ({"input_tokens": 10, "output_tokens": 5}, Usage(10, 5)),
        (
            {"input_tokens": 10, "output_tokens": 5, "cache_creation_input_tokens": 100, "cache_read_input_tokens": 1000},
            Usage(1110, 5, 1000),
        ),
        ({"input_tokens": 0, "output_tokens": 5, "cache_read_input_tokens": 7, "cache_creation_input_tokens": None}, Usage(7, 5, 7)),
        ({"input_tokens": 10, "output_tokens": 50, "output_tokens_details": {"thinking_tokens": 40}}, Usage(10, 50, None, 40)),
        ({"output_tokens": 5, "cache_read_input_tokens": 7}, Usage(None, 5)),
        ({"input_tokens": 2**31 - 1, "output_tokens": 5, "cache_read_input_tokens": 7}, Usage(None, 5)),
        ({"input_tokens": -1, "output_tokens": True}, Usage()),
        ({"input_tokens": "10", "output_tokens": 5.0, "output_tokens_details": 3}, Usage(10, 5)),
        ({}, Usage()),
    ],
)
def test_usage_is_normalised_so_that_the_input_includes_what_was_cached(usage, normal):
    assert usage_of(usage) == normal


NOW = 1_767_225_600  # 2026-01-01T00:00:00Z


@pytest.mark.parametrize(
    ("headers", "wait"),
    [
        ({"retry-after": "12"}, 12),
        ({"retry-after": "12", "anthropic-ratelimit-requests-remaining": "0",
          "anthropic-ratelimit-requests-reset": "2026-01-01T00:01:00Z"}, 12),
        ({"Anthropic-RateLimit-Requests-Remaining": "0", "Anthropic-RateLimit-Requests-Reset": "2026-01-01T00:01:00Z"}, 60),
        ({"anthropic-ratelimit-tokens-remaining": "0", "anthropic-ratelimit-tokens-reset": "2026-01-01T00:00:01.500Z",
          "anthropic-ratelimit-input-tokens-remaining": "0", "anthropic-ratelimit-input-tokens-reset": "2026-01-01T01:00:07+01:00",
          "anthropic-ratelimit-requests-remaining": "1", "anthropic-ratelimit-requests-reset": "2026-01-01T00:09:00Z"}, 7),
        ({"anthropic-ratelimit-output-tokens-remaining": "0", "anthropic-ratelimit-output-tokens-reset": "2025-12-31T23:59:00Z"}, 0),
        ({"anthropic-ratelimit-tokens-remaining": "0", "anthropic-ratelimit-tokens-reset": "2036-01-01T00:00:00Z"}, 3600),
        ({"anthropic-ratelimit-tokens-remaining": "0", "anthropic-ratelimit-tokens-reset": "2026-01-01T00:01:00"}, None),
        ({"anthropic-ratelimit-tokens-remaining": "0", "anthropic-ratelimit-tokens-reset": "soon"}, None),
        ({"anthropic-ratelimit-tokens-remaining": "0"}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_the_wait_is_what_retry_after_says_or_the_last_exhausted_limit_to_come_back(headers, wait):
    reply = read_reply(429, headers, json.dumps(refused("rate_limit_error")).encode(), provider="p", model="m", now=NOW)
    assert (reply.signal, reply.retry_after_s) == (Signal.RATE_LIMITED, wait)


@pytest.mark.parametrize(("status", "content", "wait_s"), [(200, message(text("x")), None), (429, refused("rate_limit_error"), 30)])
def test_what_remains_of_the_limits_is_told_with_every_reply_and_a_wait_with_a_refusal(status, content, wait_s):
    headers = {"anthropic-ratelimit-requests-remaining": "7", "anthropic-ratelimit-tokens-remaining": "0"}
    reply = read(status, content, {**headers, "anthropic-ratelimit-tokens-reset": "1970-01-01T00:00:30Z"})
    assert (reply.remaining_requests, reply.remaining_tokens, reply.retry_after_s) == (7, 0, wait_s)
    assert read(status, content).remaining_requests is None


FIELDS = ["type", "error", "message", "details", "error_code", "content", "text", "input", "id", "name", "model", "stop_reason", "usage"]
FIELDS += ["input_tokens", "output_tokens", "cache_read_input_tokens", "output_tokens_details", "thinking_tokens"]
WORDS = st.sampled_from(["message", "error", "text", "tool_use", "end_turn", "refusal", "max_tokens"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=5),
    max_leaves=20,
)
BLOCKS = st.lists(st.fixed_dictionaries({"type": WORDS}, optional={"text": JSON, "input": JSON, "id": JSON, "name": JSON}), max_size=3)


@given(st.integers(200, 599), st.binary(max_size=200) | (JSON | BLOCKS.map(lambda b: {"content": b})).map(lambda v: json.dumps(v).encode()))
def test_no_body_whatever_makes_reading_raise_or_an_answer_unstorable(status, content):
    reply = read(status, content)
    assert reply.signal in POLICIES
    assert reply.error_code is None or 0 < len(reply.error_code) <= 80
    assert (reply.answer is not None) == (reply.signal is Signal.ANSWERED)
    if reply.answer is not None:
        stored = json.dumps(reply.answer.to_json(), ensure_ascii=False, allow_nan=False)
        assert "\0" not in stored
        assert stored.encode()


# On the wire


async def spoken(answers, seen, reader, writer):
    """Gives these (status, body) in turn, and writes down the requests."""
    while True:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        fields = {name.lower(): value for name, value in (line.split(": ", 1) for line in head.split("\r\n")[1:] if line)}
        asked = await reader.readexactly(int(fields["content-length"]))
        seen.append((head.split("\r\n")[0], fields, json.loads(asked)))
        status, content = answers[min(len(seen), len(answers)) - 1]
        raw = json.dumps(content).encode()
        writer.write(b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (status, len(raw)) + raw)


def calls(*answers, requests, key="sk-ant"):
    async def run():
        seen = []
        async with vendor(partial(spoken, answers, seen)) as base_url, client() as http:
            provider = AnthropicMessages("p", ProviderConfig(base_url=base_url, model="claude", dialect="anthropic"), http, key=key)
            return [await provider.complete(request, timeout_s=20, call_id=f"call-{n}") for n, request in enumerate(requests)], seen

    return asyncio.run(run())


def test_a_call_sends_what_the_api_wants_and_reads_the_answer():
    [reply], [(line, headers, asked)] = calls((200, message(text("All good."))), requests=[ChatRequest(HELLO, {"temperature": 0.2})])
    assert reply.answer.content == "All good."
    assert line == "POST /v1/messages HTTP/1.1"
    assert (headers["x-api-key"], headers["anthropic-version"], headers["x-client-request-id"]) == ("sk-ant", "2023-06-01", "call-0")
    assert "authorization" not in headers
    assert asked == {"model": "claude", "max_tokens": 4096, "messages": [turn("user", TEXT)], "temperature": 0.2}


def test_without_a_key_no_key_is_sent():
    _, [(_, headers, _)] = calls((200, message(text("x"))), requests=[ChatRequest(HELLO)], key=None)
    assert "x-api-key" not in headers


@pytest.mark.parametrize("key", ["sk-1\n", " sk-1", "schlüssel"])
def test_a_key_that_no_header_can_carry_is_refused_without_being_shown(key):
    with pytest.raises(UsageError) as caught:
        AnthropicMessages("p", ProviderConfig(base_url="http://x", model="m", dialect="anthropic"), None, key=key)
    assert "providers.p.api_key" in str(caught.value)
    assert key not in str(caught.value)


@pytest.mark.parametrize(
    ("request_", "signal", "code"),
    [
        (ChatRequest(HELLO, {"n": 2}), Signal.UNSUPPORTED, "unsupported_n"),
        (ChatRequest([{1}]), Signal.UNSUPPORTED, "unsupported_shape"),
        (ChatRequest(HELLO, {"tools": 5}), Signal.UNSUPPORTED, "unsupported_shape"),
        (ChatRequest([user("\ud800")]), Signal.INVALID_REQUEST, "not_encodable"),
        (ChatRequest(HELLO, {"temperature": float("nan")}), Signal.INVALID_REQUEST, "not_encodable"),
    ],
)
def test_a_request_that_cannot_be_said_is_never_sent(request_, signal, code):
    [reply], seen = calls((200, message(text("x"))), requests=[request_])
    assert (reply.signal, reply.error_code, reply.http_status, seen) == (signal, code, None, [])


@pytest.mark.parametrize("name", ["temperature", "top_p", "top_k"])
def test_a_sampling_parameter_that_the_model_refuses_is_worth_one_retry_and_then_left_out(name):
    refusal = refused("invalid_request_error", f"`{name}` is deprecated for this model.")
    requests = [ChatRequest(HELLO, {name: 1})] * 2
    [first, second], seen = calls((400, refusal), (200, message(text("x"))), requests=requests)
    assert (first.signal, first.error_code) == (Signal.CONFLICT, f"refused_{name}")
    assert POLICIES[first.signal].retry
    assert second.signal is Signal.ANSWERED
    assert [name in asked for _, _, asked in seen] == [True, False]


@pytest.mark.parametrize(
    ("said", "signal"), [('{"a": 1}', Signal.ANSWERED), ('```json\n{"a": 1}\n```', Signal.UNFIT), ("[1]", Signal.UNFIT)]
)
def test_who_asks_for_a_json_object_gets_one_or_nothing(said, signal):
    [reply], _ = calls((200, message(text(said))), requests=[ChatRequest(HELLO, {"response_format": {"type": "json_object"}})])
    assert (reply.signal, reply.usage) == (signal, Usage(11, 4))
    assert (reply.answer is not None) == (signal is Signal.ANSWERED)
