"""What vendors of the OpenAI-compatible dialect really send, and what it means. One file of `vendors/` for each."""

import asyncio
import json
import re
from pathlib import Path

import pytest

from worker.config import ProviderConfig
from worker.job import ChatRequest
from worker.providers.http import client
from worker.providers.openai import OpenAICompatible
from worker.providers.openai_answers import read_reply

NOW = 1_700_000_000
CASES = [
    pytest.param(case, id=f"{path.stem}-{case['about']}")
    for path in sorted((Path(__file__).parent / "vendors").glob("*.json"))
    for case in json.loads(path.read_text(encoding="utf-8"))
]
ASK = ChatRequest([{"role": "user", "content": "Does the VPN work?"}])


def body_of(case):
    return case["text"].encode() if "text" in case else json.dumps(case["body"]).encode()


def meaning_of(reply):
    """All that a reply says, without what it does not."""
    answer, usage = reply.answer, reply.usage
    counts = None if usage is None else [usage.input_tokens, usage.output_tokens, usage.cached_tokens, usage.reasoning_tokens]
    while counts and counts[-1] is None:
        counts.pop()
    means = {
        "signal": reply.signal.value,
        "code": reply.error_code,
        "content": answer and answer.content,
        "finish": answer and answer.finish_reason,
        "model": answer and answer.model,
        "tools": answer and answer.tool_calls and [call["function"]["name"] for call in answer.tool_calls],
        "usage": counts,
        "wait_s": reply.retry_after_s,
        "requests_left": reply.remaining_requests,
        "tokens_left": reply.remaining_tokens,
    }
    return {name: value for name, value in means.items() if value is not None}


def expected(case):
    """What the case says that it means; where an answer names no other model, it is that of most cases."""
    return ({"model": "m-1"} if case["means"]["signal"] == "answered" else {}) | case["means"]


@pytest.mark.parametrize("case", CASES)
def test_what_a_vendor_sends_means_what_it_means_there(case):
    reply = read_reply(case["status"], case.get("headers", {}), body_of(case), provider="p", model="m", now=NOW)
    assert meaning_of(reply) == expected(case)
    assert reply.http_status == case["status"]
    assert reply.error_code is None or re.fullmatch(r"[a-z0-9_.-]{1,64}", reply.error_code)  # no message, no prompt


def test_on_the_wire_it_means_the_same_but_that_missing_counts_are_estimated():
    cases = [case.values[0] for case in CASES]

    async def speak(reader, writer):
        for case in cases:
            head = await reader.readuntil(b"\r\n\r\n")
            lengths = [int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")]
            await reader.readexactly(lengths[0])
            body = body_of(case)
            fields = {"Content-Length": len(body), **case.get("headers", {})}
            lines = [f"HTTP/1.1 {case['status']} Vendor", *(f"{name}: {value}" for name, value in fields.items())]
            writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        writer.close()
        await writer.wait_closed()

    async def run():
        server = await asyncio.start_server(speak, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        async with server, client() as http:
            endpoint = OpenAICompatible("p", ProviderConfig(base_url=url, model="m"), http, key="k")
            return [await endpoint.complete(ASK, timeout_s=20, call_id="c") for _ in cases]

    for case, reply in zip(cases, asyncio.run(run()), strict=True):
        assert (reply.signal.value, reply.error_code) == (case["means"]["signal"], case["means"].get("code"))
        if reply.answer is not None:
            counts = case["means"]["usage"][:2]
            assert reply.usage.estimated == (len(counts) < 2 or 0 in counts)
            assert reply.usage.input_tokens > 0
            assert reply.usage.output_tokens > 0
            assert reply.usage == reply.answer.usage
