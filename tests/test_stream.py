"""Streamed answers: events cut anywhere (pure), limits of silence (real sockets), and both dialects against the simulator."""

import asyncio
import gzip
import json
from contextlib import asynccontextmanager
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vendor import vendor

from worker.config import ProviderConfig
from worker.cost import Usage
from worker.job import ChatRequest
from worker.providers import stream as streams
from worker.providers.anthropic import AnthropicMessages
from worker.providers.anthropic_stream import MessageAssembly
from worker.providers.http import client
from worker.providers.openai import OpenAICompatible
from worker.providers.openai_stream import CompletionAssembly
from worker.providers.stream import Events, Stream
from worker.signals import POLICIES, Signal
from worker.simulator.script import parse
from worker.simulator.server import Simulator

ASK = ChatRequest(messages=[{"role": "user", "content": "Grüezi, does the VPN work? 🙂"}])
DIALECTS = {"openai": OpenAICompatible, "anthropic": AnthropicMessages}


def events_of(*pieces):
    events = Events()
    return [data for piece in pieces for data in events.feed(piece)] + list(events.rest())


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("data: a\n\ndata: b\n\n", ["a", "b"]),
        ("data:a\r\n\r\ndata: b\r\n\r\n", ["a", "b"]),
        ("data: a\r\rdata: b\r\r", ["a", "b"]),
        ("\ufeffdata: a\n\n", ["a"]),
        ("data: a\ndata: b\n\n", ["a\nb"]),
        ("data: a\r\ndata: b\r\n\r\n", ["a\nb"]),
        ("data\n\ndata:\n\n", ["", ""]),
        ("data:  a\n\n", [" a"]),
        (": OPENROUTER PROCESSING\n\n\n\n: ping\n\ndata: a\n\n", ["a"]),
        ("event: x\nid: 1\nretry: 5\ndata: a\n\n", ["a"]),
        ("event: x\n\ndatum: b\n\n", []),
        ("data: the last one without its blank line", ["the last one without its blank line"]),
        ("data: Zürich 🙂\n\n", ["Zürich 🙂"]),
        ("", []),
    ],
)
def test_events_are_cut_as_the_standard_says_wherever_the_bytes_are_split(text, data):
    raw = text.encode()
    expected = [item.encode() for item in data]
    assert events_of(raw) == expected
    assert events_of(*(bytes([byte]) for byte in raw)) == expected
    for at in range(len(raw)):
        assert events_of(raw[:at], b"", raw[at:]) == expected


LINES = st.sampled_from([b"data: x", b"data:", b"data", b": hm", b"event: e", b"", b"\xff"])
ENDS = st.sampled_from([b"\n", b"\r\n", b"\r"])


@given(st.lists(st.tuples(LINES, ENDS)), st.lists(st.integers(1, 7)))
def test_no_split_whatever_changes_the_events(lines, lengths):
    raw = b"".join(line + end for line, end in lines)
    pieces, at = [], 0
    for length in lengths:
        pieces.append(raw[at : at + length])
        at += length
    assert events_of(*pieces, raw[at:]) == events_of(raw)


# Put together


def sse(*events, name=None):
    lines = b"event: %s\n" % name.encode() if name else b""
    return b"".join(lines + b"data: " + (e if isinstance(e, bytes) else json.dumps(e).encode()) + b"\n\n" for e in events)


def chunk(delta=None, finish=None, **extra):
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish}]
    return {"id": "c-1", "object": "chat.completion.chunk", "model": "m-1", "choices": choices, "usage": None} | extra


OPENAI_USAGE = chunk(usage={"prompt_tokens": 11, "completion_tokens": 4, "total_tokens": 15})
OPENAI = [chunk({"role": "assistant", "content": ""}), chunk({"content": "All "}), chunk({"content": "good 🙂."})]
OPENAI_END = [chunk({}, "stop"), OPENAI_USAGE, b"[DONE]"]


def start(**usage):
    message = {"id": "msg_1", "type": "message", "role": "assistant", "model": "m-1", "content": [], "stop_reason": None}
    return {"type": "message_start", "message": {**message, "usage": {"input_tokens": 11, "output_tokens": 1, **usage}}}


def block(index, **content):
    return {"type": "content_block_start", "index": index, "content_block": content}


def delta(index, **piece):
    return {"type": "content_block_delta", "index": index, "delta": piece}


def stop(index):
    return {"type": "content_block_stop", "index": index}


def ended(reason="end_turn", **usage):
    return {"type": "message_delta", "delta": {"stop_reason": reason, "stop_sequence": None}, "usage": {"output_tokens": 4, **usage}}


PING, STOP = {"type": "ping"}, {"type": "message_stop"}
ANTHROPIC = [start(), block(0, type="text", text=""), PING, delta(0, type="text_delta", text="All ")]
ANTHROPIC += [delta(0, type="text_delta", text="good 🙂."), stop(0)]
ANTHROPIC_END = [ended(), STOP]
WHOLE = {"openai": sse(*OPENAI, *OPENAI_END), "anthropic": sse(*ANTHROPIC, *ANTHROPIC_END)}
ASSEMBLIES = {"openai": CompletionAssembly, "anthropic": MessageAssembly}


def heard(dialect, *pieces, status=200):
    """The reply to a stream that comes in these pieces and then ends."""

    async def run():
        config = ProviderConfig(base_url="http://x", model="m", dialect=dialect, stream=True)
        stream = Stream(ASSEMBLIES[dialect](), config)
        now = asyncio.get_running_loop().time()

        async def body():
            for piece in pieces:
                yield piece

        async with asyncio.timeout_at(stream.opens(now, now + 60)) as limit:
            await stream.listen(status, {}, body(), limit)
        provider = DIALECTS[dialect]("p", config, None, key=None)
        read = provider._read if dialect == "openai" else lambda *seen: provider._read({}, *seen)
        return stream.reply(read)

    return asyncio.run(run())


@pytest.mark.parametrize("dialect", DIALECTS)
def test_an_answer_is_the_same_wherever_its_stream_is_split(dialect):
    raw = WHOLE[dialect]
    for at in range(len(raw)):
        reply = heard(dialect, raw[:at], raw[at:])
        assert (reply.signal, reply.answer.content, reply.answer.finish_reason) == (Signal.ANSWERED, "All good 🙂.", "stop")
        assert (reply.answer.model, reply.usage.input_tokens, reply.usage.output_tokens) == ("m-1", 11, 4)
        assert reply.first_token_s is not None


@given(st.sampled_from(sorted(DIALECTS)), st.lists(st.integers(1, 40), max_size=60))
def test_an_answer_is_the_same_in_pieces_of_any_size(dialect, lengths):
    raw, pieces = WHOLE[dialect], []
    for length in lengths:
        pieces.append(raw[:length])
        raw = raw[length:]
    assert heard(dialect, *pieces, raw).answer.content == "All good 🙂."


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_stream_that_ends_anywhere_before_its_finish_reason_is_dropped(dialect):
    raw = WHOLE[dialect]
    finish = raw.index(b'"stop"' if dialect == "openai" else b'"end_turn"')
    finish = raw.index(b"\n\n", finish) - 1
    for at in range(finish):
        reply = heard(dialect, raw[:at])
        assert (reply.signal, reply.error_code, reply.answer, reply.usage) == (Signal.DROPPED, "truncated", None, None), at
    for at in range(finish + 1, len(raw)):
        assert heard(dialect, raw[:at]).signal is Signal.ANSWERED, at


CALLS = [
    chunk({"role": "assistant", "content": None, "tool_calls": [
        {"index": 0, "id": "call_1", "type": "function", "arguments": "stray", "function": {"name": "look", "arguments": ""}}]}),
    chunk({"tool_calls": [{"index": 0, "function": {"arguments": '{"at":'}}]}),
    chunk({"tool_calls": [{"index": 1, "id": "call_2", "type": "function", "function": {"name": "ask", "arguments": "{}"}}]}),
    chunk({"tool_calls": [{"index": 0, "function": {"arguments": ' "VPN"}'}}]}),
    chunk({}, "tool_calls"), b"[DONE]",
]  # fmt: skip
WITHOUT_INDEX = [
    chunk({"tool_calls": [{"id": "a", "function": {"name": "look", "arguments": '{"at": "VPN"}'}}]}),
    chunk({"tool_calls": [{"id": "b", "type": "function", "function": {"name": "ask", "arguments": "{}"}}]}),
    chunk({}, "stop"),
]
USES = [
    start(), block(0, type="thinking", thinking=""), delta(0, type="thinking_delta", thinking="hm"),
    delta(0, type="signature_delta", signature="x"), stop(0),
    block(1, type="tool_use", id="call_1", name="look", input={}), delta(1, type="input_json_delta", partial_json=""),
    delta(1, type="input_json_delta", partial_json='{"at":'), delta(1, type="input_json_delta", partial_json=' "VPN"}'), stop(1),
    block(2, type="tool_use", id="call_2", name="ask", input={}), stop(2),
    ended("tool_use"), STOP,
]  # fmt: skip


@pytest.mark.parametrize(("dialect", "events"), [("openai", CALLS), ("openai", WITHOUT_INDEX), ("anthropic", USES)])
def test_tool_calls_are_put_together_by_index(dialect, events):
    reply = heard(dialect, sse(*events))
    calls = reply.answer.tool_calls
    assert [call["function"]["name"] for call in calls] == ["look", "ask"]
    assert [json.loads(call["function"]["arguments"]) for call in calls] == [{"at": "VPN"}, {}]
    assert all(call["type"] == "function" and isinstance(call["id"], str) for call in calls)


def test_a_tool_call_cut_off_by_max_tokens_keeps_what_it_had():
    events = [start(), block(0, type="tool_use", id="a", name="f", input={}), delta(0, type="input_json_delta", partial_json='{"a')]
    reply = heard("anthropic", sse(*events, ended("max_tokens"), STOP))
    assert (reply.answer.finish_reason, reply.answer.tool_calls[0]["function"]["arguments"]) == ("length", '{"a')


ERRORS = [
    ("openai", {"error": {"message": "boom", "type": "server_error", "code": 502}}, Signal.SERVER_ERROR, "server_error"),
    (
        "openai",
        {"choices": [{"index": 0, "error": {"code": 429, "message": "slow"}, "finish_reason": "error"}]},
        Signal.RATE_LIMITED,
        "429",
    ),
    ("anthropic", {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}, Signal.OVERLOADED, "overloaded_error"),
]


@pytest.mark.parametrize(("dialect", "error", "signal", "code"), ERRORS)
def test_an_error_in_a_stream_means_what_it_says_until_there_is_a_token_to_pay_for(dialect, error, signal, code):
    first = {"openai": OPENAI, "anthropic": ANTHROPIC}[dialect]
    before, after = heard(dialect, sse(first[0], error)), heard(dialect, sse(*first, error))
    assert (before.signal, before.error_code, before.first_token_s) == (signal, code, None)
    assert (after.signal, after.error_code, after.usage) == (Signal.DROPPED, code, None)
    assert after.first_token_s is not None


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("late", [{"error": {"message": "too late"}}, b"{"])
def test_nothing_after_the_finish_reason_takes_an_answer_away(dialect, late):
    events = {"openai": [*OPENAI, OPENAI_END[0]], "anthropic": [*ANTHROPIC, ended()]}[dialect]
    assert heard(dialect, sse(*events, late)).answer.content == "All good 🙂."


def test_what_is_said_of_other_choices_and_thinking_is_left_out():
    other = {"index": 1, "delta": {"content": "no"}, "finish_reason": "stop"}
    events = [chunk({"reasoning_content": "hm"}), chunk({"content": "A"}), {"choices": [other]}, chunk({"content": "B"}, "stop")]
    assert heard("openai", sse(*events)).answer.content == "AB"
    assert heard("openai", sse(chunk({"reasoning": "hm"}))).first_token_s is not None


def test_usage_of_a_stream_is_the_last_that_was_stated():
    growing = [chunk({"content": text}, usage={"prompt_tokens": 11, "completion_tokens": n}) for n, text in enumerate("abc", 1)]
    assert heard("openai", sse(*growing, chunk({}, "stop"))).usage.output_tokens == 3
    events = [start(cache_read_input_tokens=5, cache_creation_input_tokens=2), *ANTHROPIC[1:]]
    reply = heard("anthropic", sse(*events, ended(input_tokens=None, output_tokens=9), STOP))
    assert (reply.usage.input_tokens, reply.usage.output_tokens, reply.usage.cached_tokens) == (18, 9, 5)


@pytest.mark.parametrize(
    ("dialect", "raw", "signal", "code"),
    [
        ("openai", sse(b"[DONE]"), Signal.MALFORMED, "empty_answer"),
        ("openai", sse(OPENAI_USAGE, b"[DONE]"), Signal.MALFORMED, "empty_answer"),
        ("openai", sse(OPENAI[0], b"{"), Signal.MALFORMED, "not_json"),
        ("openai", sse(b"[1]"), Signal.MALFORMED, "not_json"),
        ("openai", sse(b"[" * 100_000), Signal.MALFORMED, "not_json"),
        ("openai", b"", Signal.DROPPED, "truncated"),
        ("openai", b"\n\n: only comments\n\n", Signal.DROPPED, "truncated"),
        ("openai", sse(*OPENAI, b"[DONE]"), Signal.DROPPED, "truncated"),
        ("openai", sse(chunk({}, "content_filter")), Signal.CONTENT_POLICY, "finish_content_filter"),
        ("openai", sse(chunk({}, "length")), Signal.UNFIT, "empty_length"),
        ("anthropic", sse(start(), ended(), STOP), Signal.MALFORMED, "empty_answer"),
        ("anthropic", sse(start(), ended("refusal"), STOP), Signal.CONTENT_POLICY, "refusal"),
        ("anthropic", sse(start(), STOP), Signal.MALFORMED, "empty_answer"),
    ],
)
def test_a_stream_without_an_answer_says_why(dialect, raw, signal, code):
    reply = heard(dialect, raw)
    assert (reply.signal, reply.error_code, reply.answer) == (signal, code, None)


FIELDS = ["type", "index", "delta", "content_block", "message", "usage", "error", "choices", "finish_reason", "stop_reason"]
FIELDS += ["content", "text", "partial_json", "tool_calls", "function", "arguments", "name", "id", "input", "output_tokens"]
TYPES = ["message_start", "content_block_start", "content_block_delta", "message_delta", "text", "tool_use", "text_delta"]
TYPES += ["input_json_delta", "stop", "end_turn"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(0, 2) | st.floats() | st.text(max_size=5) | st.sampled_from(TYPES),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=5),
    max_leaves=25,
)
REAL = [*OPENAI, *OPENAI_END, *ANTHROPIC, *ANTHROPIC_END, *CALLS, *USES]


@given(st.sampled_from(sorted(DIALECTS)), st.lists(st.binary(max_size=40) | st.sampled_from(REAL).map(sse) | JSON.map(sse), max_size=8))
def test_no_stream_whatever_makes_reading_raise_or_an_answer_unstorable(dialect, pieces):
    reply = heard(dialect, *pieces)
    assert reply.signal in POLICIES
    assert (reply.answer is not None) == (reply.signal is Signal.ANSWERED)
    if reply.answer is not None:
        stored = json.dumps(reply.answer.to_json(), ensure_ascii=False, allow_nan=False)
        assert "\0" not in stored
        assert stored.encode()


def test_a_stream_is_bounded_as_it_comes_and_as_it_is_put_together(monkeypatch):
    assert heard("openai", WHOLE["openai"]).signal is Signal.ANSWERED
    monkeypatch.setattr(streams, "MOST_STREAM_BYTES", len(WHOLE["openai"]) - 1)
    assert heard("openai", WHOLE["openai"]).error_code == "body_too_large"
    monkeypatch.undo()
    monkeypatch.setattr(streams, "MOST_ANSWER_BYTES", 20)
    reply = heard("openai", WHOLE["openai"])
    assert (reply.signal, reply.error_code) == (Signal.MALFORMED, "body_too_large")


# Under limits of silence


async def each_request(handle, reader, writer):
    """Does `handle(head, body, reader, writer)` for each request of a connection."""
    while head := (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower():
        length = int(head.split("content-length: ")[1].split("\r\n")[0])
        await handle(head, json.loads(await reader.readexactly(length)), reader, writer)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


def chunked(raw):
    return b"%x\r\n%s\r\n" % (len(raw), raw)


def sends(*pieces):
    """Writes these bytes, and then nothing; a callable among them is awaited."""

    async def handle(head, body, reader, writer):
        for piece in pieces:
            if callable(piece):
                await piece()
            else:
                writer.write(piece)
                await writer.drain()

    return handle


def calls(dialect, handle, *, count=1, timeout_s=20.0, patience_s=60, **config):
    async def run():
        async with asyncio.timeout(patience_s), vendor(partial(each_request, handle)) as base_url, client() as http:
            limits = ProviderConfig(base_url=base_url, model="m", dialect=dialect, stream=True, **config)
            provider = DIALECTS[dialect]("p", limits, http, key="sk")
            return [await provider.complete(ASK, timeout_s=timeout_s, call_id=f"c{n}") for n in range(count)]

    return asyncio.run(run())


FIRST_WORDS = {"openai": sse(*OPENAI), "anthropic": sse(*ANTHROPIC)}
NO_WORDS = {"openai": sse(OPENAI[0]), "anthropic": sse(*ANTHROPIC[:3])}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("before", ["nothing", "headers", "a role", "pings"])
def test_a_provider_that_does_not_begin_is_left_after_its_first_token_limit(dialect, before):
    async def handle(head, body, reader, writer):
        if before != "nothing":
            writer.write(HEAD)
        if before in ("a role", "pings"):
            writer.write(chunked(NO_WORDS[dialect]))
        while before == "pings" and not writer.is_closing():
            writer.write(chunked(b": ping\n\n" + (sse(PING) if dialect == "anthropic" else b"")))
            await asyncio.sleep(0.005)
        await reader.read()

    [reply] = calls(dialect, handle, first_token_timeout_s=0.1, stall_timeout_s=20)
    assert (reply.signal, reply.error_code, reply.first_token_s) == (Signal.TIMED_OUT, "no_first_token", None)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("pings", [False, True])
def test_a_provider_that_falls_silent_is_left_after_its_stall_limit(dialect, pings):
    async def handle(head, body, reader, writer):
        writer.write(HEAD + chunked(FIRST_WORDS[dialect]))
        while pings and not writer.is_closing():
            writer.write(chunked(b": ping\n\n" + (sse(PING) if dialect == "anthropic" else b"")))
            await asyncio.sleep(0.005)
        await reader.read()

    [reply] = calls(dialect, handle, first_token_timeout_s=20, stall_timeout_s=0.1)
    assert (reply.signal, reply.error_code) == (Signal.TIMED_OUT, "stalled")
    assert reply.first_token_s is not None


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_provider_that_keeps_writing_is_left_at_the_end_of_the_whole_call_only(dialect):
    words = {"openai": sse(OPENAI[1]), "anthropic": sse(ANTHROPIC[3])}

    async def handle(head, body, reader, writer):
        writer.write(HEAD + chunked(FIRST_WORDS[dialect]))
        while not writer.is_closing():
            writer.write(chunked(words[dialect]))
            await writer.drain()
            await asyncio.sleep(0.02)

    [reply] = calls(dialect, handle, timeout_s=1.2, first_token_timeout_s=20, stall_timeout_s=0.8)
    assert (reply.signal, reply.error_code) == (Signal.TIMED_OUT, None)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_call_shorter_than_the_limits_of_silence_times_out_as_any_other(dialect):
    async def handle(head, body, reader, writer):
        await reader.read()

    [reply] = calls(dialect, handle, timeout_s=0.1)
    assert (reply.signal, reply.error_code) == (Signal.TIMED_OUT, None)


UNENDED = {"openai": WHOLE["openai"].replace(b"data: [DONE]\n\n", b""), "anthropic": WHOLE["anthropic"].replace(sse(STOP), b"")}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("then", ["closed", "silent"])
def test_an_answer_whose_stream_breaks_off_after_its_finish_reason_is_an_answer(dialect, then):
    async def handle(head, body, reader, writer):
        writer.write(HEAD + chunked(UNENDED[dialect]))
        await writer.drain()
        if then == "closed":
            writer.close()
        else:
            await reader.read()

    [reply] = calls(dialect, handle, stall_timeout_s=0.2)
    assert (reply.signal, reply.answer.content, reply.usage) == (Signal.ANSWERED, "All good 🙂.", Usage(11, 4))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_nobody_waits_for_a_stream_to_be_closed_that_has_said_its_last_word(dialect):
    async def handle(head, body, reader, writer):
        writer.write(HEAD + chunked(WHOLE[dialect]))
        await reader.read()

    [reply] = calls(dialect, handle, timeout_s=60, patience_s=10, first_token_timeout_s=50, stall_timeout_s=50)
    assert reply.answer.content == "All good 🙂."


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_stream_read_to_its_end_leaves_its_connection_to_the_next(dialect, monkeypatch):
    monkeypatch.setattr(streams, "_LINGER_S", 20)
    peers = set()

    async def handle(head, body, reader, writer):
        peers.add(writer.get_extra_info("peername"))
        assert "accept: text/event-stream" in head
        assert "accept-encoding: identity" in head
        assert body["stream"] is True
        assert body.get("stream_options") == ({"include_usage": True} if dialect == "openai" else None)
        writer.write(HEAD + chunked(WHOLE[dialect]))
        await asyncio.sleep(0.05)  # the last word is heard before the body ends
        writer.write(END)

    replies = calls(dialect, handle, count=3)
    assert [reply.signal for reply in replies] == [Signal.ANSWERED] * 3
    assert len(peers) == 1


def test_a_server_that_ignores_stream_is_read_whole_however_late_it_is():
    message = {"role": "assistant", "content": "whole"}
    body = json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    [reply] = calls("openai", sends(head, lambda: asyncio.sleep(0.8), body), first_token_timeout_s=0.5, stall_timeout_s=0.5)
    assert (reply.signal, reply.answer.content, reply.first_token_s) == (Signal.ANSWERED, "whole", None)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_stream_that_was_packed_against_our_wish_is_unpacked(dialect):
    head = HEAD.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n")
    packed = gzip.compress(WHOLE[dialect])
    [reply] = calls(dialect, sends(head, chunked(packed[:30]), chunked(packed[30:]), END))
    assert reply.answer.content == "All good 🙂."
    [reply] = calls(dialect, sends(head, chunked(b"no gzip at all"), END))
    assert reply.signal is Signal.DROPPED


def test_a_vendor_that_refuses_stream_options_is_asked_without_from_then_on():
    asked = []

    async def handle(head, body, reader, writer):
        asked.append("stream_options" in body)
        error = json.dumps({"detail": [{"loc": ["body", "stream_options"], "type": "extra_forbidden"}]}).encode()
        if "stream_options" in body:
            writer.write(b"HTTP/1.1 422 No\r\nContent-Length: %d\r\n\r\n" % len(error) + error)
        else:
            writer.write(HEAD + chunked(WHOLE["openai"]) + END)

    first, second = calls("openai", handle, count=2)
    assert (first.signal, first.error_code) == (Signal.CONFLICT, "stream_options")
    assert POLICIES[first.signal].retry
    assert second.signal is Signal.ANSWERED
    assert asked == [True, False]


# Both dialects, plain and streamed, against the simulator

STORIES = [
    ("answered", {}, (Signal.ANSWERED, None), (Signal.ANSWERED, None)),
    ("slow", {"kind": "slow", "seconds": 0.01}, (Signal.ANSWERED, None), (Signal.ANSWERED, None)),
    ("rate limited", {"kind": "status", "status": 429, "retry_after_s": 1.5}, (Signal.RATE_LIMITED, 429), (Signal.RATE_LIMITED, 429)),
    ("broken", {"kind": "status", "status": 500}, (Signal.SERVER_ERROR, 500), (Signal.SERVER_ERROR, 500)),
    ("overloaded", {"kind": "status", "status": 529}, (Signal.OVERLOADED, 529), (Signal.OVERLOADED, 529)),
    ("no such key", {"kind": "status", "status": 401}, (Signal.UNAUTHORIZED, 401), (Signal.UNAUTHORIZED, 401)),
    ("unpaid", {"kind": "status", "status": 402}, (Signal.QUOTA_EXHAUSTED, 402), (Signal.QUOTA_EXHAUSTED, 402)),
    ("no such model", {"kind": "status", "status": 404}, (Signal.MODEL_NOT_FOUND, 404), (Signal.MODEL_NOT_FOUND, 404)),
    ("a gateway's page", {"kind": "html"}, (Signal.SERVER_ERROR, 502), (Signal.SERVER_ERROR, 502)),
    ("hanging", {"kind": "hang", "seconds": 60}, (Signal.TIMED_OUT, None), (Signal.TIMED_OUT, "no_first_token")),
    ("stalled", {"kind": "stall", "seconds": 60}, (Signal.TIMED_OUT, None), (Signal.TIMED_OUT, "stalled")),
    ("reset", {"kind": "reset"}, (Signal.DROPPED, "disconnected"), (Signal.DROPPED, "disconnected")),
    ("cut", {"kind": "truncate"}, (Signal.DROPPED, None), (Signal.DROPPED, None)),
    ("not JSON", {"kind": "malformed"}, (Signal.MALFORMED, "not_json"), (Signal.MALFORMED, "not_json")),
    ("empty", {"kind": "empty"}, (Signal.MALFORMED, None), (Signal.MALFORMED, "empty_answer")),
    ("an error in a 200", {"kind": "error_in_200"}, (Signal.SERVER_ERROR, 200), (Signal.DROPPED, 200)),
]


@asynccontextmanager
async def simulated(dialect, fault, *, stream, **limits):
    script = {"latency": {"ms": 0}, "faults": [{"rate": 1, **fault}] if fault else []}
    async with Simulator(parse({"providers": {"one": script}}, "test")) as simulator, client() as http:
        more = {"stream": True, **limits} if stream else {}
        config = ProviderConfig(base_url=simulator.base_url("one"), model="m", dialect=dialect, connect_timeout_s=5, **more)
        yield simulator, DIALECTS[dialect]("p", config, http, key="sk")


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
@pytest.mark.parametrize(("fault", "plain", "streamed"), [story[1:] for story in STORIES], ids=[story[0] for story in STORIES])
def test_a_story_ends_alike_in_every_dialect(dialect, stream, fault, plain, streamed):
    kind = fault.get("kind")
    short = {"first_token_timeout_s": 0.2} if kind == "hang" else {"stall_timeout_s": 0.2} if kind == "stall" else {}

    async def run():
        async with simulated(dialect, fault, stream=stream, **short) as (simulator, provider):
            reply = await provider.complete(ASK, timeout_s=0.2 if short and not stream else 20, call_id="c")
            return reply, list(simulator.bill.lines())

    reply, [line] = asyncio.run(run())
    signal, more = streamed if stream else plain
    assert reply.signal is signal
    assert more in (None, reply.error_code, reply.http_status)
    assert line.call_id == "c"
    if signal is Signal.ANSWERED:
        assert "VPN" in reply.answer.content.upper()
        assert reply.answer.finish_reason == "stop"
        assert (reply.usage.input_tokens, reply.usage.output_tokens) == (line.input_tokens, line.output_tokens)
    if "retry_after_s" in fault:
        assert reply.retry_after_s == fault["retry_after_s"]
    begun = stream and kind in (None, "slow", "stall", "malformed", "error_in_200")
    assert (reply.first_token_s is not None) == begun or kind == "truncate"


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("kind", ["hang", "stall"])
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
def test_a_cancelled_call_closes_its_connection_at_once(dialect, kind, stream):
    async def run():
        async with simulated(dialect, {"kind": kind, "seconds": 3600}, stream=stream) as (simulator, provider):
            task = asyncio.create_task(provider.complete(ASK, timeout_s=60, call_id="c"))
            async with asyncio.timeout(10):
                while not len(simulator.bill):  # noqa: ASYNC110 - the bill has no event to wait for
                    await asyncio.sleep(0.001)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                while next(simulator.bill.lines()).outcome == "unfinished":  # noqa: ASYNC110
                    await asyncio.sleep(0.001)

    asyncio.run(run())
