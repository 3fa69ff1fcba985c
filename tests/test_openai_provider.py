"""The OpenAI-compatible dialect: what bodies mean (pure), and what happens on the wire (real sockets)."""

import asyncio
import errno
import gzip
import json
import os
import re
import socket
import struct
import zlib
from contextlib import AsyncExitStack, ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vendor import vendor

from worker.config import ProviderConfig
from worker.cost import Usage, estimated_tokens
from worker.errors import UsageError
from worker.job import ChatRequest
from worker.providers.exchange import MOST_BODY_BYTES
from worker.providers.http import client
from worker.providers.openai import OpenAICompatible
from worker.providers.openai_answers import read_reply, usage_of
from worker.signals import POLICIES, Next, Signal

ASK = ChatRequest(messages=[{"role": "user", "content": "Grüezi, does the VPN work? 🙂"}])
HTML = "<html><head><title>502 Bad Gateway</title></head><body><center><h1>502 Bad Gateway</h1></center></body></html>"


def read(status, body, headers=None):
    raw = body if isinstance(body, bytes) else (body if isinstance(body, str) else json.dumps(body)).encode()
    return read_reply(status, headers or {}, raw, provider="p", model="m", now=0)


def completion(content="All good.", finish_reason="stop", **extra):
    message = {"role": "assistant", "content": content} | extra.pop("message", {})
    usage = {"prompt_tokens": 11, "completion_tokens": 4, "total_tokens": 15}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    return {"id": "c-1", "object": "chat.completion", "model": "m-1", "choices": [choice], "usage": usage} | extra


def openai(message="", type="invalid_request_error", code=None):
    return {"error": {"message": message, "type": type, "param": None, "code": code}}


def google(code, status, message, *details):
    return [{"error": {"code": code, "message": message, "status": status, "details": list(details)}}]


def plain(message, type, code):
    return {"object": "error", "message": message, "type": type, "param": None, "code": code}


def router(code, message, **metadata):
    return {"error": {"code": code, "message": message, "metadata": metadata}, "user_id": "user_1"}


API_KEY_INVALID = {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID"}
RETRY_INFO = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "34.5s"}
QUOTA = "You exceeded your current quota, please check your plan and billing details."
TOO_LONG = "This model's maximum context length is 4096 tokens. However, you requested 9000 tokens."
AZURE_FILTER = {
    "error": {
        "message": "The response was filtered due to the prompt triggering our content management policy.",
        "type": None,
        "param": "prompt",
        "code": "content_filter",
        "status": 400,
        "innererror": {"code": "ResponsibleAIPolicyViolation", "content_filter_result": {"hate": {"filtered": True}}},
    }
}

REFUSALS = [
    # OpenAI
    (401, openai("Incorrect API key provided: sk-1***2.", code="invalid_api_key"), "unauthorized", "invalid_api_key"),
    (403, openai("Country not supported", "request_forbidden", "unsupported_country_region_territory"), "unauthorized",
     "unsupported_country_region_territory"),
    (429, openai("Rate limit reached for gpt-5", "requests", "rate_limit_exceeded"), "rate_limited",
     "rate_limit_exceeded"),
    (429, openai(QUOTA, "insufficient_quota", "insufficient_quota"), "quota_exhausted", "insufficient_quota"),
    (429, openai("Limit", "tokens", "project_spend_limit_exceeded"), "quota_exhausted", "project_spend_limit_exceeded"),
    (400, openai(TOO_LONG, code="context_length_exceeded"), "context_too_long", "context_length_exceeded"),
    (400, openai("Unsupported value: 'temperature'", code="unsupported_value"), "unsupported", "unsupported_value"),
    (400, openai("Your request was rejected by our safety system.", code="content_policy_violation"), "content_policy",
     "content_policy_violation"),
    (404, openai("The model `gpt-9` does not exist", code="model_not_found"), "model_not_found", "model_not_found"),
    (500, openai("The server had an error", "server_error"), "server_error", "server_error"),
    (503, openai("Slow down", "slow_down"), "slow_down", "slow_down"),
    (503, openai("The engine is currently overloaded", "server_error"), "overloaded", "server_error"),
    # Azure
    (400, AZURE_FILTER, "content_policy", "content_filter"),
    (404, {"error": {"code": "DeploymentNotFound", "message": "The API deployment does not exist."}}, "model_not_found",
     "deploymentnotfound"),
    (429, {"statusCode": 429, "message": "Rate limit is exceeded. Try again in 7 seconds."}, "rate_limited", "429"),
    (401, {"error": {"code": "401", "message": "Access denied due to invalid subscription key"}}, "unauthorized", "401"),
    # DeepSeek
    (402, openai("Insufficient Balance", "unknown_error", "invalid_request_error"), "quota_exhausted",
     "invalid_request_error"),
    (400, openai("Model Not Exist"), "model_not_found", "invalid_request_error"),
    (400, openai("Content Exists Risk"), "content_policy", "invalid_request_error"),
    # OpenRouter
    (402, router(402, "Insufficient credits. Add more using https://openrouter.ai/credits"), "quota_exhausted", "402"),
    (403, router(403, "Your input was flagged for \"violence\"", reasons=["violence"]), "content_policy", "403"),
    (400, router(400, "gpt-x is not a valid model ID"), "model_not_found", "400"),
    (502, router(502, "Provider returned error", provider_name="X", raw="boom"), "server_error", "502"),
    (200, router(502, "Provider returned error", provider_name="X"), "server_error", "502"),
    (200, router(429, "Rate limited upstream"), "rate_limited", "429"),
    (200, {"id": "g", "choices": [{"error": {"code": 502, "message": "cut"}, "finish_reason": "error"}]}, "server_error",
     "502"),
    # Groq
    (413, openai("Request too large on tokens per minute (TPM)", "tokens", "rate_limit_exceeded"), "context_too_long",
     "rate_limit_exceeded"),
    (400, openai("Failed to generate JSON.", code="json_validate_failed"), "unfit", "json_validate_failed"),
    (498, openai("Flex tier at capacity", "capacity", "capacity_exceeded"), "overloaded", "capacity_exceeded"),
    (400, openai("decommissioned", code="model_decommissioned"), "model_not_found", "model_decommissioned"),
    # Together, TGI
    (422, openai("Input validation error: `inputs` tokens + `max_new_tokens` must be <= 8193."), "context_too_long",
     "invalid_request_error"),
    (404, openai("Unable to access model x", code="model_not_available"), "model_not_found", "model_not_available"),
    (503, openai("The server is overloaded or not ready yet.", "service_unavailable"), "overloaded",
     "service_unavailable"),
    # Mistral
    (401, {"message": "Unauthorized", "request_id": "1"}, "unauthorized", None),
    (422, {"object": "error", "message": {"detail": [{"type": "missing", "loc": ["body", "messages"]}]},
           "type": "invalid_request_error", "code": None}, "invalid_request", "invalid_request_error"),
    (429, plain("Requests rate limit exceeded", "rate_limited", "1300"), "rate_limited", "rate_limited"),
    (400, plain("Prompt contains 40000 tokens, too large for model with 32768 maximum context length",
                "invalid_request_prompt", "3051"), "context_too_long", "invalid_request_prompt"),
    # vLLM, FastAPI
    (400, plain(TOO_LONG, "BadRequestError", 400), "context_too_long", "badrequesterror"),
    (404, plain("The model `x` does not exist.", "NotFoundError", 404), "model_not_found", "notfounderror"),
    (422, {"detail": [{"loc": ["body", "messages"], "msg": "field required"}]}, "invalid_request", None),
    (404, {"detail": "Not Found"}, "model_not_found", None),
    # Ollama
    (404, openai('model "x" not found, try pulling it first', "api_error"), "model_not_found", "api_error"),
    (500, {"error": "model requires more system memory (8.4 GiB) than is available"}, "server_error", None),
    (200, {"error": "unexpected EOF"}, "server_error", None),
    # Gemini, compatible endpoint
    (400, google(400, "INVALID_ARGUMENT", "API key not valid.", API_KEY_INVALID), "unauthorized", "api_key_invalid"),
    (429, google(429, "RESOURCE_EXHAUSTED", QUOTA, RETRY_INFO), "rate_limited", "resource_exhausted"),
    (400, google(400, "INVALID_ARGUMENT", "The input token count (1200000) exceeds the maximum"), "context_too_long",
     "invalid_argument"),
    (503, google(503, "UNAVAILABLE", "The model is overloaded."), "overloaded", "unavailable"),
    (400, google(400, "FAILED_PRECONDITION", "User location is not supported"), "unauthorized", "failed_precondition"),
    # Anthropic, compatible endpoint
    (529, {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}, "overloaded",
     "overloaded_error"),
    (400, {"type": "error", "error": {"type": "invalid_request_error", "message": "Your credit balance is too low"}},
     "quota_exhausted", "invalid_request_error"),
    # one-api and its children, LiteLLM
    (403, openai("quota", "new_api_error", "insufficient_user_quota"), "quota_exhausted", "insufficient_user_quota"),
    (503, openai("No available channel for model x", "new_api_error", "model_not_found"), "model_not_found",
     "model_not_found"),
    (429, openai("Budget has been exceeded", "budget_exceeded", "400"), "quota_exhausted", "budget_exceeded"),
    # Moonshot
    (429, openai("The engine is busy", "engine_overloaded_error"), "overloaded", "engine_overloaded_error"),
    # No JSON at all
    (502, HTML, "server_error", None),
    (503, HTML, "overloaded", None),
    (403, "<html>Just a moment...</html>", "unauthorized", None),
    (504, HTML, "request_timeout", None),
    (524, "error code: 524", "request_timeout", None),
    (500, "Internal Server Error", "server_error", None),
    (408, "", "request_timeout", None),
    (409, "", "conflict", None),
    (418, "", "invalid_request", None),
    (301, "", "model_not_found", "redirect"),
    (500, "[]", "server_error", None),
    (400, '"no"', "invalid_request", None),
]  # fmt: skip


@pytest.mark.parametrize(("status", "body", "signal", "code"), REFUSALS)
def test_a_refusal_means_what_its_vendor_means(status, body, signal, code):
    reply = read(status, body)
    assert (reply.signal, reply.error_code, reply.http_status) == (signal, code, status)
    assert reply.answer is None


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("", "not_json"),
        (HTML, "not_json"),
        ('{"choices": [{"mess', "not_json"),
        ("null", "not_json"),
        ("[" * 100_000, "not_json"),
        ("[]", "no_choices"),
        ("7", "no_choices"),
        ({"id": "c"}, "no_choices"),
        ({"choices": []}, "no_choices"),
        ({"choices": {}}, "no_choices"),
        ({"choices": [None]}, "no_choices"),
        ({"choices": [{"text": "old dialect"}]}, "no_choices"),
        (completion(None), "empty_answer"),
        (completion(" \n"), "empty_answer"),
        (completion(17), "empty_answer"),
        (completion("", message={"tool_calls": []}), "empty_answer"),
    ],
)
def test_a_200_without_an_answer_is_malformed(body, code):
    reply = read(200, body)
    assert (reply.signal, reply.error_code, reply.answer) == (Signal.MALFORMED, code, None)


def test_an_answer_is_read_with_its_usage_and_the_model_that_gave_it():
    reply = read(200, completion())
    assert reply.signal is Signal.ANSWERED
    assert (reply.answer.content, reply.answer.finish_reason) == ("All good.", "stop")
    assert (reply.answer.provider, reply.answer.model) == ("p", "m-1")
    assert reply.usage == reply.answer.usage == Usage(11, 4)


@pytest.mark.parametrize(
    ("said", "kept"), [("stop", "stop"), ("length", "length"), ("max_tokens", "length"), (None, "stop"), ("STOP", "stop")]
)
def test_a_finish_reason_that_is_no_fault_is_an_answer(said, kept):
    reply = read(200, completion(finish_reason=said))
    assert (reply.signal, reply.answer.finish_reason) == (Signal.ANSWERED, kept)


@pytest.mark.parametrize(
    ("finish", "signal"),
    [
        ("content_filter", Signal.CONTENT_POLICY),
        ("content_filter: SAFETY", Signal.CONTENT_POLICY),
        ("error", Signal.SERVER_ERROR),
        ("insufficient_system_resource", Signal.OVERLOADED),
    ],
)
def test_a_200_that_was_filtered_or_broken_off_is_no_answer_but_its_usage_is_kept(finish, signal):
    reply = read(200, completion("Half an ans", finish))
    assert (reply.signal, reply.answer, reply.usage) == (signal, None, Usage(11, 4))


def test_thinking_that_used_up_all_tokens_is_unfit_and_paid_but_no_illness():
    reply = read(200, completion("", "length"))
    assert (reply.signal, reply.error_code, reply.usage) == (Signal.UNFIT, "empty_length", Usage(11, 4))


def test_a_structured_refusal_is_content_policy():
    reply = read(200, completion(None, message={"refusal": "I cannot help with that."}))
    assert (reply.signal, reply.error_code) == (Signal.CONTENT_POLICY, "refusal")


def test_tool_calls_are_an_answer_without_content():
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    reply = read(200, completion(None, "tool_calls", message={"tool_calls": calls}))
    assert (reply.signal, reply.answer.content, reply.answer.tool_calls) == (Signal.ANSWERED, None, calls)


def test_content_in_parts_is_joined_without_the_thinking():
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "A"}]
    assert read(200, completion([*parts, {"type": "text", "text": "B"}])).answer.content == "AB"


def test_what_postgres_cannot_store_is_replaced_and_what_it_can_is_kept():
    body = json.dumps(completion("@")).replace("@", r"a\u0000b\ud800c\udc00d\ud83d\ude42e\\u0000f")
    assert read(200, body).answer.content == "a\ufffdb\ufffdc\ufffdd🙂e\\u0000f"
    assert read(200, json.dumps(completion("@")).replace("@", "line\nNUL\0")).answer.content == "line\nNUL\ufffd"
    calls = [{"function": {"arguments": float("nan")}}]
    assert read(200, completion(None, message={"tool_calls": calls})).answer.tool_calls == [{"function": {"arguments": None}}]


def test_a_byte_order_mark_and_invalid_utf8_do_not_spoil_an_answer():
    body = b"\xef\xbb\xbf" + json.dumps(completion("@")).encode().replace(b"@", b"caf\xe9")
    assert read(200, body).answer.content == "caf\ufffd"


@pytest.mark.parametrize(
    ("usage", "normal"),
    [
        ({"prompt_tokens": 10, "completion_tokens": 5}, Usage(10, 5)),
        ({"prompt_tokens": "10", "completion_tokens": 5.0, "total_tokens": None}, Usage(10, 5)),
        ({"prompt_tokens": None, "completion_tokens": 5}, Usage(None, 5)),
        ({"prompt_tokens": -1, "completion_tokens": True}, Usage()),
        ({"prompt_tokens": 2**31, "completion_tokens": "many"}, Usage()),
        ({"prompt_tokens": 10, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 4}}, Usage(10, 5, 4)),
        ({"prompt_tokens": 10, "completion_tokens": 5, "prompt_tokens_details": None}, Usage(10, 5)),
        ({"prompt_tokens": 10, "completion_tokens": 5, "prompt_cache_hit_tokens": 99}, Usage(10, 5, 10)),
        (
            {"prompt_tokens": 10, "completion_tokens": 50, "completion_tokens_details": {"reasoning_tokens": 40}},
            Usage(10, 50, None, 40),
        ),
        ({"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 115}, Usage(10, 105, None, 100)),
        ({"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 12}, Usage(10, 5)),
        ({"prompt_tokens": 10, "total_tokens": 15}, Usage(10, 5)),
        ({"completion_tokens": 5, "total_tokens": 15}, Usage(10, 5)),
        ({"prompt_tokens": 20, "total_tokens": 15}, Usage(20)),
        ({"total_tokens": 15}, Usage()),
        ({}, Usage()),
    ],
)
def test_usage_is_normalised_and_what_is_missing_stays_unknown(usage, normal):
    assert usage_of(usage) == normal


@pytest.mark.parametrize("usage", [None, [], "12", 5])
def test_an_answer_without_usable_usage_is_still_an_answer(usage):
    assert read(200, completion(usage=usage)).usage == Usage()


def test_the_wait_comes_from_the_header_or_from_googles_body():
    body = google(429, "RESOURCE_EXHAUSTED", QUOTA, RETRY_INFO)
    assert read(429, "", {"retry-after": "7"}).retry_after_s == 7
    assert read(429, body).retry_after_s == 34.5
    assert read(429, body, {"retry-after": "7"}).retry_after_s == 7
    assert read(429, "").retry_after_s is None


def test_who_writes_the_request_cannot_take_a_provider_out_by_what_the_vendor_quotes_of_it():
    for words in ("insufficient balance", "api key not valid", "model not exist"):
        assert read(400, openai(f"Invalid value: '{words}'.")).signal is Signal.INVALID_REQUEST
        assert read(400, openai(f'Invalid value: "{words}".')).signal is Signal.INVALID_REQUEST
        assert read(400, {"error": {"message": f"Unknown parameter: {words}", "param": words}}).signal is Signal.INVALID_REQUEST
        assert POLICIES[read(400, openai(f"The vendor's own words: {words}.")).signal].isolate_s
    assert read(400, openai("Invalid value: try again in 5 hours")).retry_after_s is None


def test_a_vendor_that_breaks_its_packing_off_is_malformed_and_nothing_worse():
    whole = gzip.compress(json.dumps(completion()).encode())
    for packed in (whole[:-12], whole[: len(whole) // 2], b"\x1f\x8b", whole[:20] + b"\0" * 20):
        reply = call_once(sends(http(packed, "200 OK", "Content-Encoding: gzip")))
        assert (reply.signal, reply.error_code) == (Signal.MALFORMED, "not_json")


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary Redirect", "308 Permanent Redirect"])
def test_a_redirect_to_another_host_takes_neither_prompt_nor_key_there(status):
    visits = []

    async def elsewhere(reader, writer):
        visits.append(await request_of(reader))

    async def run():
        async with AsyncExitStack() as stack:
            other = await stack.enter_async_context(vendor(elsewhere))
            moved = sends(http(b"", status, f"Location: {other}/chat/completions"))
            base_url = await stack.enter_async_context(vendor(moved))
            http_client = await stack.enter_async_context(client())
            return await provider(base_url, http_client).complete(ASK, timeout_s=20, call_id="c")

    reply = asyncio.run(run())
    assert (reply.signal, reply.error_code) == (Signal.MODEL_NOT_FOUND, "redirect")
    assert visits == []


def test_a_proxy_that_lets_nobody_through_was_never_sent_to(monkeypatch):
    async def refuse(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")

    async def run():
        async with vendor(refuse) as url:
            monkeypatch.setenv("HTTPS_PROXY", url.removesuffix("/v1"))
            monkeypatch.delenv("NO_PROXY", raising=False)
            monkeypatch.delenv("no_proxy", raising=False)
            async with client() as http_client:
                return await provider("https://127.0.0.1:1/v1", http_client).complete(ASK, timeout_s=20, call_id="c")

    reply = asyncio.run(run())
    assert (reply.signal, reply.error_code) == (Signal.UNREACHABLE, "proxy")


def test_an_answer_without_usage_is_estimated_from_the_request_that_was_sent():
    body = {"choices": [{"message": {"content": "z" * 35}, "finish_reason": "stop"}]}
    usage = call_once(sends(http(body))).usage
    assert usage == Usage(estimated_tokens(ASK.messages), 10, estimated=True)


@given(st.sampled_from([400, 401, 403, 429, 500]), st.text(min_size=12).filter(str.strip))
def test_no_message_of_a_vendor_is_in_what_is_kept_of_its_error(status, words):
    sentence = f"You said: {words}"
    for body in (
        openai(sentence, type=sentence, code=sentence),
        {"error": sentence},
        [{"error": {"message": sentence}}],
        sentence.encode(),
    ):
        reply = read(status, body)
        assert (reply.error_code, reply.answer) == (None, None)


def test_an_error_code_never_carries_a_sentence():
    assert read(400, openai("secret", "the prompt was: my secret", "my secret is 42")).error_code is None
    assert "secret" not in repr(read(400, openai("my secret is 42")))


FIELDS = ["error", "code", "type", "status", "message", "detail", "details", "metadata", "innererror", "object", "id"]
FIELDS += ["choices", "usage", "model", "finish_reason", "content", "tool_calls", "refusal", "retryDelay", "reason"]
FIELDS += ["prompt_tokens", "completion_tokens", "total_tokens"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4),
    max_leaves=20,
)


NAMES = ["Retry-After", "retry-after-ms", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens", "X-RateLimit-Reset"]
NAMES += ["X-RateLimit-Remaining", "anthropic-ratelimit-requests-remaining", "anthropic-ratelimit-requests-reset"]
VALUES = (
    st.text(max_size=20) | st.integers().map(str) | st.sampled_from(["0", "1e400", "nan", "-1", "6m0s", "20ms", "2030-01-01T00:00:00Z"])
)
HEADERS = st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=10), VALUES, max_size=6)


@given(
    st.integers(0, 999),
    st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()),
    HEADERS,
    st.sampled_from([0, 1.8e9]),
)
def test_no_body_status_or_headers_whatever_make_reading_raise(status, body, headers, now):
    reply = read_reply(status, headers, body, provider="p", model="m", now=now)
    assert reply.retry_after_s is None or 0 <= reply.retry_after_s <= 3600
    assert all(left is None or 0 <= left < 10**15 for left in (reply.remaining_requests, reply.remaining_tokens))
    assert reply.signal in POLICIES
    assert reply.error_code is None or re.fullmatch(r"[a-z0-9_.-]{1,80}", reply.error_code)
    assert (reply.answer is not None) == (reply.signal is Signal.ANSWERED)
    assert status < 300 or POLICIES[reply.signal].next in Next


@given(JSON)
def test_no_message_whatever_makes_reading_raise_or_an_answer_unstorable(message):
    reply = read(200, {"choices": [{"message": message if isinstance(message, dict) else {"content": message}}]})
    if reply.answer is not None:
        stored = json.dumps(reply.answer.to_json(), ensure_ascii=False, allow_nan=False)
        assert "\0" not in stored
        assert stored.encode()


# On the wire


async def request_of(reader):
    """Head and body of the next request."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if line)
    headers = {name.lower(): value for name, value in fields.items()}
    body = await reader.readexactly(int(headers["content-length"]))
    return head.split("\r\n")[0], headers, body


def http(body, status="200 OK", *headers):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def sends(*pieces):
    """Handles a connection by reading a request and writing these bytes, then hanging up."""

    async def handle(reader, writer):
        await request_of(reader)
        for piece in pieces:
            writer.write(piece)
            await writer.drain()

    return handle


def provider(base_url, http_client, *, key="sk-test", **config):
    return OpenAICompatible("p", ProviderConfig(base_url=base_url, model="m", **config), http_client, key=key)


def call(handle, *, request=ASK, timeout_s=20.0, calls=1, key="sk-test"):
    """The replies to `calls` requests, one after the other on one client, of a vendor that does `handle`."""

    async def run():
        async with vendor(handle) as base_url, client() as http_client:
            endpoint = provider(base_url, http_client, key=key)
            return [await endpoint.complete(request, timeout_s=timeout_s, call_id=f"call-{n}") for n in range(calls)]

    return asyncio.run(run())


def call_once(handle, **options):
    return call(handle, **options)[0]


def test_a_call_sends_what_the_contract_says_and_reads_the_answer():
    seen = []

    async def handle(reader, writer):
        seen.append(await request_of(reader))
        writer.write(http(completion()))

    asked = ChatRequest(ASK.messages, {"temperature": 0.2, "model": "evil", "messages": [], "stream": True})
    assert call_once(handle, request=asked).answer.content == "All good."
    [(line, headers, body)] = seen
    assert line == "POST /v1/chat/completions HTTP/1.1"
    assert headers["authorization"] == "Bearer sk-test"
    assert headers["x-client-request-id"] == "call-0"
    assert headers["content-type"] == "application/json"
    assert json.loads(body) == {"model": "m", "messages": ASK.messages, "temperature": 0.2}


def test_without_a_key_no_authorization_is_sent():
    seen = []

    async def handle(reader, writer):
        seen.append((await request_of(reader))[1])
        writer.write(http(completion()))

    call(handle, key=None)
    assert "authorization" not in seen[0]


@pytest.mark.parametrize("key", ["sk-1\n", " sk-1", "sk-1\r\nX: y", "schlüssel"])
def test_a_key_that_no_header_can_carry_is_refused_without_being_shown(key):
    with pytest.raises(UsageError) as caught:
        provider("http://127.0.0.1/v1", None, key=key)
    assert "providers.p.api_key" in str(caught.value)
    assert key not in str(caught.value)


@pytest.mark.parametrize(
    "request_", [ChatRequest([{"content": "\ud800"}]), ChatRequest([], {"temperature": float("nan")}), ChatRequest([{1}])]
)
def test_a_request_that_is_no_json_is_invalid_and_never_sent(request_):
    reply = call_once(sends(), request=request_)
    assert (reply.signal, reply.error_code, reply.http_status) == (Signal.INVALID_REQUEST, "not_encodable", None)


def test_connections_are_kept_and_used_again_without_cookies():
    connections, cookies = [], []

    async def handle(reader, writer):
        connections.append(writer)
        while True:
            cookies.append("cookie" in (await request_of(reader))[1])
            writer.write(http(completion(), "200 OK", "Set-Cookie: machine=7; Path=/"))

    async def run():
        async with vendor(handle) as base_url, client() as http_client:
            endpoint = provider(base_url.replace("127.0.0.1", "localhost"), http_client)  # cookies need a host name
            return [(await endpoint.complete(ASK, timeout_s=20, call_id="c")).signal for _ in range(3)]

    assert asyncio.run(run()) == [Signal.ANSWERED] * 3
    assert len(connections) == 1
    assert cookies == [False] * 3


def test_a_closed_port_was_never_sent_to():
    async def run():
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))  # bound, not listening: refused, and nobody else gets it
            async with client() as http_client:
                endpoint = provider(f"http://127.0.0.1:{unused.getsockname()[1]}/v1", http_client)
                return await endpoint.complete(ASK, timeout_s=5, call_id="c")

    reply = asyncio.run(run())
    assert (reply.signal, reply.error_code) == (Signal.UNREACHABLE, "refused")


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.EMFILE, "out_of_sockets"), (errno.EADDRNOTAVAIL, "out_of_sockets"), (errno.ENETUNREACH, "no_route"),
        (errno.EHOSTUNREACH, "no_route"), (errno.ECONNREFUSED, "refused"),
    ],
)  # fmt: skip
def test_what_this_machine_lacks_is_told_from_what_a_host_refuses(monkeypatch, number, code):
    async def run():
        async with client() as http_client:
            return await provider("http://127.0.0.1:9/v1", http_client).complete(ASK, timeout_s=5, call_id="c")

    def connect(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(socket.socket, "connect", connect)
    reply = asyncio.run(run())
    assert (reply.signal, reply.error_code) == (Signal.UNREACHABLE, code)


def test_a_connect_that_hangs_is_unreachable_after_the_connect_limit():
    async def run(port):
        async with client() as http_client:
            endpoint = provider(f"http://127.0.0.1:{port}/v1", http_client, connect_timeout_s=0.1)
            return await endpoint.complete(ASK, timeout_s=20, call_id="c")

    with ExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(5):  # more than the backlog holds: from now on nobody answers a SYN
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        reply = asyncio.run(run(full.getsockname()[1]))
    assert (reply.signal, reply.error_code) == (Signal.UNREACHABLE, "connect_timeout")


def test_a_proxy_of_the_environment_is_used_unless_no_proxy_names_the_host(monkeypatch):
    lines = []

    async def proxy(reader, writer):
        lines.append((await request_of(reader))[0])
        writer.write(http(completion("by proxy")))

    async def run():
        async with vendor(proxy) as url, vendor(sends(http(completion("straight")))) as base_url:
            monkeypatch.setenv("HTTP_PROXY", url.removesuffix("/v1"))
            monkeypatch.delenv("NO_PROXY", raising=False)
            monkeypatch.delenv("no_proxy", raising=False)
            async with client() as http_client:
                by_proxy = await provider(base_url, http_client).complete(ASK, timeout_s=20, call_id="c")
            monkeypatch.setenv("NO_PROXY", "127.0.0.1")
            async with client() as http_client:
                straight = await provider(base_url, http_client).complete(ASK, timeout_s=20, call_id="c")
            assert lines == [f"POST {base_url}/chat/completions HTTP/1.1"]
            return by_proxy.answer.content, straight.answer.content

    assert asyncio.run(run()) == ("by proxy", "straight")


def test_plain_http_on_a_tls_port_is_unreachable():
    async def handle(reader, writer):
        await reader.read(10)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async def run():
        async with vendor(handle) as base_url, client() as http_client:
            endpoint = provider(base_url.replace("http:", "https:"), http_client, connect_timeout_s=5)
            return await endpoint.complete(ASK, timeout_s=10, call_id="c")

    assert asyncio.run(run()).signal is Signal.UNREACHABLE


async def reset(reader, writer):
    await request_of(reader)
    linger = struct.pack("ii", 1, 0)  # close() sends RST
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()


def test_a_connection_lost_after_the_request_is_dropped_and_not_sent_again():
    requests = []

    async def handle(reader, writer):
        requests.append(await request_of(reader))

    reply = call_once(handle)
    assert (reply.signal, reply.error_code) == (Signal.DROPPED, "disconnected")
    assert len(requests) == 1


@pytest.mark.parametrize(
    "handle",
    [
        reset,
        sends(b"HTTP/1.1 200 OK\r\nContent-Le"),
        sends(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n" + json.dumps(completion()).encode()),
        sends(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n400\r\n{"),
        sends(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n"),
        sends(b"220 mail.example.com ESMTP\r\n\r\n"),
        sends(b"\x16\x03\x01\x00\xff\r\n\r\n"),
        sends(b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n{}"),
        sends(b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n{}"),
    ],
)
def test_whatever_breaks_off_or_is_no_http_is_dropped(handle):
    assert call_once(handle).signal is Signal.DROPPED


def test_a_connection_closed_while_it_was_idle_is_not_used_again():
    async def run():
        closed = asyncio.Event()

        async def handle(reader, writer):
            await request_of(reader)
            writer.write(http(completion()))
            await writer.drain()
            writer.close()
            await writer.wait_closed()
            closed.set()

        async with vendor(handle) as base_url, client() as http_client:
            endpoint = provider(base_url, http_client)
            signals = []
            for _ in range(3):
                signals.append((await endpoint.complete(ASK, timeout_s=20, call_id="c")).signal)
                await closed.wait()
                closed.clear()
                for _ in range(5):  # rounds of the loop in which our own end sees the FIN
                    await asyncio.sleep(0)
            return signals

    assert asyncio.run(run()) == [Signal.ANSWERED] * 3


async def hang(reader, writer):
    await request_of(reader)
    await reader.read()


async def stall(reader, writer):
    await request_of(reader)
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{")
    await reader.read()


async def trickle(reader, writer):
    await request_of(reader)
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    while not writer.is_closing():
        writer.write(b" ")
        await writer.drain()
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("handle", [hang, stall, trickle])
def test_the_timeout_bounds_the_whole_call_however_the_vendor_dawdles(handle):
    reply = call_once(handle, timeout_s=0.15)
    assert (reply.signal, reply.answer) == (Signal.TIMED_OUT, None)


def test_a_cancelled_call_is_cancelled_and_its_connection_closed():
    async def run():
        asked, left = asyncio.Event(), asyncio.Event()

        async def handle(reader, writer):
            await request_of(reader)
            asked.set()
            assert await reader.read() == b""
            left.set()

        async with vendor(handle) as base_url, client() as http_client:
            task = asyncio.create_task(provider(base_url, http_client).complete(ASK, timeout_s=20, call_id="c"))
            await asked.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.wait_for(left.wait(), 10)

    asyncio.run(run())


@pytest.mark.parametrize(("name", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_a_compressed_answer_is_unpacked(name, pack):
    packed = pack(json.dumps(completion()).encode())
    assert call_once(sends(http(packed, "200 OK", f"Content-Encoding: {name}"))).answer.content == "All good."


def test_bytes_that_only_claim_to_be_gzip_are_malformed():
    assert call_once(sends(http(b"nothing", "200 OK", "Content-Encoding: gzip"))).signal is Signal.MALFORMED


def test_a_chunked_answer_is_put_together():
    body = json.dumps(completion()).encode()
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body)
    reply = call_once(sends(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"))
    assert reply.signal is Signal.ANSWERED


def test_a_content_length_too_short_is_malformed():
    body = json.dumps(completion()).encode()
    reply = call_once(sends(b"HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n" + body))
    assert reply.signal in (Signal.MALFORMED, Signal.DROPPED)


def test_a_redirect_is_not_followed():
    paths = []

    async def handle(reader, writer):
        paths.append((await request_of(reader))[0])
        writer.write(http(b"", "307 Temporary Redirect", "Location: /elsewhere"))

    reply = call_once(handle)
    assert (reply.signal, reply.http_status) == (Signal.MODEL_NOT_FOUND, 307)
    assert paths == ["POST /v1/chat/completions HTTP/1.1"]


def test_a_huge_body_is_left_unread():
    async def handle(reader, writer):
        await request_of(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while not writer.is_closing():
            writer.write(b"10000\r\n" + b" " * 0x10000 + b"\r\n")
            await writer.drain()

    reply = call_once(handle)
    assert (reply.signal, reply.error_code) == (Signal.MALFORMED, "body_too_large")


def test_a_small_body_that_unpacks_to_a_huge_one_is_refused():
    packed = gzip.compress(b" " * (MOST_BODY_BYTES + 1))
    reply = call_once(sends(http(packed, "200 OK", "Content-Encoding: gzip")))
    assert (reply.signal, reply.error_code) == (Signal.MALFORMED, "body_too_large")


def test_a_large_request_arrives_whole():
    seen = []

    async def handle(reader, writer):
        seen.append((await request_of(reader))[2])
        writer.write(http(completion()))

    text = "ä" * 2**20
    reply = call_once(handle, request=ChatRequest([{"role": "user", "content": text}]))
    assert reply.signal is Signal.ANSWERED
    assert json.loads(seen[0])["messages"][0]["content"] == text


def test_a_rate_limit_tells_how_long_to_wait():
    reply = call_once(sends(http(openai("slow", "requests", "rate_limit_exceeded"), "429 Too Many", "Retry-After: 12")))
    assert (reply.signal, reply.http_status, reply.retry_after_s) == (Signal.RATE_LIMITED, 429, 12)


def test_a_refusal_before_the_large_request_was_read_is_understood():
    async def handle(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(http(openai("Request too large"), "413 Payload Too Large"))
        await reader.read()

    reply = call_once(handle, request=ChatRequest([{"role": "user", "content": "x" * 2**22}]))
    assert (reply.signal, reply.http_status) == (Signal.CONTEXT_TOO_LONG, 413)


def test_many_calls_at_once_each_get_their_own_answer():
    async def handle(reader, writer):
        while True:
            _, headers, _ = await request_of(reader)
            writer.write(http(completion(headers["x-client-request-id"])))

    async def run():
        async with vendor(handle) as base_url, client() as http_client:
            endpoint = provider(base_url, http_client)
            return await asyncio.gather(*(endpoint.complete(ASK, timeout_s=20, call_id=f"c{n}") for n in range(100)))

    replies = asyncio.run(run())
    assert [reply.answer.content for reply in replies] == [f"c{n}" for n in range(100)]
