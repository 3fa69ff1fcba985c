from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from worker.errors import UsageError
from worker.simulator.answers import say
from worker.simulator.bill import Bill, fingerprint
from worker.simulator.fitting import fit
from worker.simulator.limits import Bucket, Limits
from worker.simulator.plan import draw
from worker.simulator.script import ProviderScript, Script, load, parse
from worker.simulator.server import Simulator

ROOT = Path(__file__).parents[1]
MESSAGES = [{"role": "system", "content": "Sort tickets."}, {"role": "user", "content": "my laptop screen is broken"}]
ASK = {"model": "any", "messages": MESSAGES}


def script(**provider: Any) -> Script:
    return parse({"seed": 7, "providers": {"one": provider}}, "test")


def always(kind: str, **more: Any) -> Script:
    return script(faults=[{"kind": kind, "rate": 1, **more}])


def with_simulator(told: Script, use: Callable[[Simulator, aiohttp.ClientSession], Awaitable[Any]], **more: Any) -> Any:
    async def main() -> Any:
        async with Simulator(told, **more) as sim, aiohttp.ClientSession() as client:
            return await asyncio.wait_for(use(sim, client), 30)

    return asyncio.run(main())


async def ask(
    sim: Simulator, client: aiohttp.ClientSession, body: Any = ASK, call_id: str = "call-1", provider: str = "one"
) -> tuple[int, Any, str]:
    headers = {"X-Client-Request-Id": call_id}
    async with client.post(sim.base_url(provider) + "/chat/completions", json=body, headers=headers) as response:
        return response.status, response.headers, await response.text()


async def until(holds: Callable[[], bool]) -> None:
    while not holds():  # noqa: ASYNC110 - the bill has no event to wait for
        await asyncio.sleep(0.001)


async def received(sim: Simulator) -> None:
    await until(lambda: len(sim.bill) > 0)


async def settled(sim: Simulator) -> None:
    await until(lambda: all(line.outcome != "unfinished" for line in sim.bill.lines()))


def only_line(sim: Simulator) -> Any:
    (line,) = sim.bill.lines()
    return line


def test_a_healthy_provider_answers_as_openai_does_and_bills_the_tokens_it_reports() -> None:
    async def use(sim: Simulator, client: aiohttp.ClientSession) -> None:
        status, _, text = await ask(sim, client)
        body = json.loads(text)
        choice, usage = body["choices"][0], body["usage"]
        assert status == 200
        assert (body["object"], body["model"]) == ("chat.completion", "sim-9")
        assert choice["message"]["role"] == "assistant"
        assert "laptop" in choice["message"]["content"]
        assert choice["finish_reason"] == "stop"
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        line = only_line(sim)
        assert (line.call_id, line.prompt, line.outcome, line.status) == (
            "call-1",
            fingerprint(MESSAGES),
            "answered",
            200,
        )
        assert line.written
        price = Decimal("0.28") * usage["prompt_tokens"] + Decimal("0.42") * usage["completion_tokens"]
        assert line.cost == price / 10**6

    with_simulator(script(model="sim-9", price={"input": "0.28", "output": "0.42"}), use)


@pytest.mark.parametrize(
    ("told", "status", "code"),
    [
        ({"status": 500}, 500, "server_error"),
        ({"status": 429, "retry_after_s": 1.5}, 429, "rate_limit_exceeded"),
        ({"status": 429, "code": "insufficient_quota", "type": "insufficient_quota"}, 429, "insufficient_quota"),
        ({"status": 529}, 529, "overloaded"),
    ],
)
def test_a_status_fault_is_an_openai_error_and_costs_nothing(told: dict[str, Any], status: int, code: str) -> None:
    async def use(sim: Simulator, client: aiohttp.ClientSession) -> None:
        got, headers, text = await ask(sim, client)
        assert (got, json.loads(text)["error"]["code"]) == (status, code)
        waits = (headers.get("Retry-After"), headers.get("retry-after-ms"))
        assert waits == (("2", "1500") if "retry_after_s" in told else (None, None))
        line = only_line(sim)
        assert (line.outcome, line.status, line.cost, line.written) == ("status", status, 0, True)

    with_simulator(always("status", **told), use)


@pytest.mark.parametrize("kind", ["malformed", "empty", "error_in_200", "html"])
def test_a_body_that_lies_arrives_whole(kind: str) -> None:
    async def use(sim: Simulator, client: aiohttp.ClientSession) -> None:
        status, headers, text = await ask(sim, client)
        assert status == (502 if kind == "html" else 200)
        if kind in ("malformed", "html"):
            with pytest.raises(ValueError, match=r"Expecting|Unterminated|delimiter"):
                json.loads(text)
            assert headers["Content-Type"].startswith("text/html" if kind == "html" else "application/json")
        elif kind == "empty":
            assert json.loads(text)["choices"] == []
        else:
            assert json.loads(text).keys() == {"error"}
        line = only_line(sim)
        assert (line.outcome, line.written, line.cost > 0) == (kind, True, kind in ("malformed", "empty"))

    with_simulator(always(kind), use)


def test_a_reset_is_a_tcp_reset_before_any_byte() -> None:
    async def use(sim: Simulator, client: aiohttp.ClientSession) -> None:
        reader, writer = await asyncio.open_connection(sim.host, sim.port)
        body = json.dumps(ASK).encode()
        writer.write(b"POST /one/v1/chat/completions HTTP/1.1\r\nHost: x\r\n")
        writer.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        with pytest.raises(ConnectionResetError):
            await reader.read()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        line = only_line(sim)
        assert (line.outcome, line.status, line.call_id, line.cost, line.written) == ("reset", None, None, 0, False)

    with_simulator(always("reset"), use)


@pytest.mark.parametrize(("kind", "more"), [("truncate", {}), ("stall", {"seconds": 0.01})])
def test_a_cut_answer_has_headers_and_half_a_body_and_is_charged(kind: str, more: dict[str, Any]) -> None:
    async def use(sim: Simulator, client: aiohttp.ClientSession) -> None:
        async with client.post(sim.base_url("one") + "/chat/completions", json=ASK) as response:
            assert response.status == 200
            half = await response.content.readexactly(int(response.headers["Content-Length"]) // 2)
            assert half.startswith(b'{"id": "chatcmpl-')
            with pytest.raises(aiohttp.ClientError):
                await response.content.readexactly(1)
        line = only_line(sim)
        assert (line.outcome, line.status, line.written, line.cost > 0) == (kind, 200, False, True)

    with_simulator(always(kind, **more), use)


def test_a_hang_ends_in_a_reset_and_costs_nothing() -> None:
    async def use(sim: Simulator, client: aiohttp.ClientSession) -> None:
        with pytest.raises(aiohttp.ClientConnectionError):
            await ask(sim, client)
        line = only_line(sim)
        assert (line.outcome, line.status, line.cost, line.written) == ("hang", None, 0, False)

    with_simulator(always("hang", seconds=0.01), use)


def test_a_client_that_gives_up_on_a_hang_ends_it_on_the_bill() -> None:
    async def use(sim: Simulator, client: aiohttp.ClientSession) -> None:
        asked = asyncio.create_task(ask(sim, client))
        await received(sim)
        assert only_line(sim).outcome == "unfinished"
        asked.cancel()
        await asyncio.wait([asked])
        await settled(sim)
        assert (only_line(sim).outcome, only_line(sim).written) == ("hang", False)

    with_simulator(always("hang", seconds=3600), use)


def test_an_answer_nobody_waited_for_is_charged_and_marked_unread() -> None:
    async def use(sim: Simulator, client: aiohttp.ClientSession) -> None:
        asked = asyncio.create_task(ask(sim, client))
        await received(sim)
        asked.cancel()
        await asyncio.wait([asked])
        await settled(sim)
        line, totals = only_line(sim), sim.bill.totals()["one"]
        assert (line.outcome, line.written, line.cost > 0) == ("answered", False, True)
        assert (totals.answered, totals.unread, totals.usd) == (1, 1, line.cost)

    with_simulator(script(latency={"ms": 3_600_000}), use)


def test_a_request_that_never_arrives_whole_is_a_line_too() -> None:
    async def use(sim: Simulator, client: aiohttp.ClientSession) -> None:
        _, writer = await asyncio.open_connection(sim.host, sim.port)
        writer.write(b"POST /one/v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 999\r\n\r\n{")
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        await received(sim)
        await settled(sim)
        assert only_line(sim).outcome == "incomplete"
        assert sim.requests("one") == 0

    with_simulator(script(), use)


def test_a_slow_answer_is_a_good_answer() -> None:
    async def use(sim: Simulator, client: aiohttp.ClientSession) -> None:
        status, _, text = await ask(sim, client)
        assert (status, json.loads(text)["choices"][0]["finish_reason"]) == (200, "stop")
        totals = sim.bill.totals()["one"]
        assert (totals.answered, totals.failed, only_line(sim).outcome) == (1, 0, "slow")

    with_simulator(always("slow", seconds=0.01), use)


def test_an_outage_covers_exactly_the_requests_of_its_window() -> None:
    async def use(sim: Simulator, client: aiohttp.ClientSession) -> list[int]:
        return [(await ask(sim, client))[0] for _ in range(7)]

    told = script(outages=[{"from_request": 3, "to_request": 6, "kind": "status", "status": 503}])
    assert with_simulator(told, use) == [200, 200, 503, 503, 503, 200, 200]


def test_an_outage_by_time_includes_its_start_and_not_its_end() -> None:
    told = script(outages=[{"from_s": 2, "to_s": 12, "kind": "reset"}]).providers["one"]
    fates = [draw(told, 7, "one", 1, nth=1, elapsed_s=at).fault is not None for at in (0, 1.9, 2, 11.9, 12, 99)]
    assert fates == [False, False, True, True, False, False]


def test_the_fate_of_a_request_depends_on_seed_provider_and_number_alone() -> None:
    told = script(
        latency={"median_ms": 60, "p99_ms": 400},
        faults=[{"kind": "reset", "rate": 0.2}, {"kind": "status", "status": 500, "rate": 0.1}],
    ).providers["one"]

    def fates(seed: int, provider: str, numbers: list[int]) -> list[Any]:
        drawn = {n: draw(told, seed, provider, n, nth=n, elapsed_s=n) for n in numbers}
        return [(getattr(drawn[n].fault, "kind", None), drawn[n].latency_s) for n in sorted(numbers)]

    numbers = list(range(1, 4001))
    first = fates(7, "one", numbers)
    assert first == fates(7, "one", numbers[::-1])
    assert first != fates(8, "one", numbers)
    assert first != fates(7, "two", numbers)
    kinds = Counter(kind for kind, _ in first)
    assert 0.18 < kinds["reset"] / 4000 < 0.22
    assert 0.08 < kinds["status"] / 4000 < 0.12
    waits = sorted(latency_s for _, latency_s in first)
    assert 0.055 < waits[2000] < 0.065
    assert 0.33 < waits[3960] < 0.47


def test_a_brown_out_hits_its_share_of_the_window() -> None:
    told = script(outages=[{"from_request": 1, "kind": "reset", "rate": 0.3}]).providers["one"]
    hit = sum(draw(told, 1, "one", n, nth=n, elapsed_s=0).fault is not None for n in range(1, 4001))
    assert 0.27 < hit / 4000 < 0.33


def test_a_script_changed_live_heals_and_counts_its_windows_anew() -> None:
    async def use(sim: Simulator, client: aiohttp.ClientSession) -> None:
        async def post(body: Any) -> tuple[int, Any]:
            async with client.post(f"{sim.url}/one/script", json=body) as response:
                return response.status, await response.json()

        assert (await ask(sim, client))[0] == 500
        changed = {"faults": [], "outages": [{"from_request": 2, "to_request": 3, "kind": "status", "status": 503}]}
        assert await post(changed) == (200, {"latency": {"ms": 0.0}, **changed})
        assert [(await ask(sim, client))[0] for _ in range(3)] == [200, 503, 200]
        status, body = await post({"fault": []})
        assert status == 400
        assert "unknown key fault, did you mean 'faults'?" in body["error"]["message"]
        assert (await post([]))[0] == 400
        assert (await ask(sim, client))[0] == 200
        await sim.change("one", faults=[{"kind": "html", "rate": 1}])
        assert (await ask(sim, client))[0] == 502

    with_simulator(script(latency={"ms": 0}, faults=[{"kind": "status", "status": 500, "rate": 1}]), use)


def test_a_provider_with_its_own_port_refuses_connections_while_it_is_told_to() -> None:
    async def use(sim: Simulator, _: aiohttp.ClientSession) -> None:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as client:

            async def refuses() -> bool:
                try:
                    await ask(sim, client)
                except aiohttp.ClientConnectionError as error:
                    return isinstance(getattr(error, "os_error", None), ConnectionRefusedError)
                return False

            assert sim.base_url("one") != f"{sim.url}/one/v1"
            assert not await refuses()
            await sim.change("one", outages=[{"from_s": 0, "kind": "refuse"}])
            assert [await refuses() for _ in range(3)] == [True, True, True]
            assert sim.requests("one") == 1
            await sim.change("one", outages=[{"to_s": 0.03, "kind": "refuse"}])
            while await refuses():
                pass
            await sim.change("one", outages=[{"from_s": 0.03, "kind": "refuse"}])
            while not await refuses():
                pass

    with_simulator(script(port=0), use)


def test_a_closing_port_cuts_the_connections_it_has() -> None:
    async def use(sim: Simulator, client: aiohttp.ClientSession) -> None:
        asked = asyncio.create_task(ask(sim, client))
        await received(sim)
        await sim.change("one", outages=[{"from_s": 0, "kind": "refuse"}])
        with pytest.raises(aiohttp.ClientConnectionError):
            await asked
        await settled(sim)
        assert not only_line(sim).written

    with_simulator(script(port=0, latency={"ms": 3_600_000}), use)


def test_the_bill_has_every_request_once_under_concurrency_and_disconnects(tmp_path: Path) -> None:
    file = tmp_path / "bill.jsonl"
    faults = [
        {"kind": "status", "status": 500, "rate": 0.1},
        {"kind": "reset", "rate": 0.1},
        {"kind": "truncate", "rate": 0.1},
        {"kind": "malformed", "rate": 0.1},
        {"kind": "hang", "rate": 0.1, "seconds": 3600},
    ]
    seen: dict[str, str] = {}

    async def use(sim: Simulator, client: aiohttp.ClientSession) -> dict[str, Any]:
        async def one(number: int) -> None:
            call_id = f"call-{number}"
            try:
                status, _, text = await asyncio.wait_for(ask(sim, client, call_id=call_id), 3.0 if number % 3 else 0.02)
                seen[call_id] = "answered" if status == 200 and text.endswith("}") else "other"
            except (aiohttp.ClientError, TimeoutError):
                seen[call_id] = "cut"

        await asyncio.gather(*(one(number) for number in range(300)))
        await settled(sim)
        async with client.get(f"{sim.url}/bill?full=1") as response:
            return dict(await response.json())

    bill = with_simulator(script(faults=faults, latency={"median_ms": 5, "p99_ms": 40}), use, bill_file=file)
    lines, totals = bill["lines"], bill["providers"]["one"]
    by_call = {line["call_id"]: line for line in lines}
    assert len(lines) == totals["requests"] == len(by_call)
    assert all(by_call[call]["written"] for call, how in seen.items() if how != "cut")
    assert all(by_call[call]["outcome"] == "answered" for call, how in seen.items() if how == "answered")
    # A call given up before its connection was made never reached the vendor; all others are on the bill.
    assert by_call.keys() <= seen.keys()
    assert {call for call, how in seen.items() if how != "cut"} <= by_call.keys()
    assert totals["answered"] + totals["failed"] == len(lines)
    assert totals["unfinished"] == 0
    assert Decimal(totals["usd"]) == sum(Decimal(line["cost"]) for line in lines) > 0
    written = [json.loads(line) for line in file.read_text().splitlines()]
    received = {row["seq"]: row for row in written if row["event"] == "received"}
    completed = {row["seq"]: row for row in written if row["event"] == "completed"}
    assert len(written) == 2 * len(lines)
    for line in lines:
        assert {**received[line["seq"]], **completed[line["seq"]]} == {**line, "event": "completed"}


def test_a_line_is_on_the_file_before_the_fault_happens(tmp_path: Path) -> None:
    file = tmp_path / "bill.jsonl"

    async def use(sim: Simulator, client: aiohttp.ClientSession) -> None:
        asked = asyncio.create_task(ask(sim, client, call_id="call-7"))
        await received(sim)
        (row,) = [json.loads(line) for line in file.read_text().splitlines()]
        assert (row["event"], row["provider"], row["call_id"]) == ("received", "one", "call-7")
        asked.cancel()
        await asyncio.wait([asked])

    with_simulator(always("hang"), use, bill_file=file, fsync=True)


def test_with_fsync_every_line_is_synced_and_without_it_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    price = ProviderScript().price
    for fsync in (True, False):
        bill = Bill(tmp_path / "bill.jsonl", fsync=fsync)
        bill.close(bill.open("one", price, None, ""), "answered", 200, (1, 2), written=True)
        bill.end()
    assert len(synced) == 2


def test_a_price_changed_live_does_not_touch_older_lines() -> None:
    bill = Bill()
    dear, cheap = (ProviderScript.model_validate({"price": {"input": p, "output": p}}).price for p in ("1000", "1"))
    for price in (dear, cheap, dear):
        bill.close(bill.open("one", price, None, ""), "answered", 200, (1, 2), written=True)
    assert [line.cost for line in bill.lines()] == [Decimal("0.003"), Decimal("0.000003"), Decimal("0.003")]
    assert bill.to_json()["providers"]["one"]["usd"] == "0.006003"


NO_CHAT: list[Any] = [
    {"messages": []},
    {"messages": ["hi"]},
    [],
    {**ASK, "response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": []}}}},
]


@pytest.mark.parametrize("body", NO_CHAT)
def test_what_is_no_chat_request_is_a_400_on_the_bill(body: Any) -> None:
    async def use(sim: Simulator, client: aiohttp.ClientSession) -> None:
        status, _, text = await ask(sim, client, body)
        assert (status, json.loads(text)["error"]["type"]) == (400, "invalid_request_error")
        assert (only_line(sim).outcome, only_line(sim).cost) == ("invalid", 0)

    with_simulator(script(), use)


NO_FIT = {**ASK, "max_tokens": 9, "output_config": {"format": {"type": "json_schema", "schema": {"enum": []}}}}


@pytest.mark.parametrize("body", [{"messages": []}, [], ASK, NO_FIT])
def test_what_is_no_message_request_is_an_anthropic_400(body: Any) -> None:
    async def use(sim: Simulator, client: aiohttp.ClientSession) -> None:
        async with client.post(sim.base_url("one") + "/messages", json=body) as response:
            said = await response.json()
        assert (response.status, said["type"], said["error"]["type"]) == (400, "error", "invalid_request_error")
        assert (only_line(sim).outcome, only_line(sim).cost) == ("invalid", 0)

    with_simulator(script(), use)


MESSAGE_ASK = {"model": "any", "max_tokens": 500, "system": "Sort tickets.", "messages": MESSAGES[1:]}


async def events(response: aiohttp.ClientResponse) -> list[tuple[str | None, Any]]:
    """Name and data of each event; data that is no JSON as text."""
    found: list[tuple[str | None, Any]] = []
    for event in (await response.text()).split("\n\n")[:-1]:
        fields = dict(line.split(": ", 1) for line in event.split("\n"))
        data = fields["data"]
        found.append((fields.get("event"), json.loads(data) if data.startswith("{") else data))
    return found


def test_a_healthy_provider_answers_as_anthropic_does_and_says_the_same() -> None:
    async def use(sim: Simulator, client: aiohttp.ClientSession) -> None:
        _, _, chat = await ask(sim, client)
        async with client.post(sim.base_url("one") + "/messages", json=MESSAGE_ASK) as response:
            body = await response.json()
        assert (response.status, body["type"], body["role"], body["stop_reason"]) == (200, "message", "assistant", "end_turn")
        assert body["content"] == [{"type": "text", "text": json.loads(chat)["choices"][0]["message"]["content"]}]
        by_chat, by_message = sim.bill.lines()
        assert body["usage"] == {"input_tokens": by_message.input_tokens, "output_tokens": by_message.output_tokens}
        assert by_message.cost == by_chat.cost > 0
        async with client.post(sim.base_url("one") + "/messages", json={**MESSAGE_ASK, "max_tokens": 3}) as response:
            assert (await response.json())["stop_reason"] == "max_tokens"

    with_simulator(script(), use)


def test_a_message_in_a_schema_fits_it() -> None:
    async def use(sim: Simulator, client: aiohttp.ClientSession) -> None:
        asked = {**MESSAGE_ASK, "output_config": {"format": {"type": "json_schema", "schema": TRIAGE}}}
        async with client.post(sim.base_url("one") + "/messages", json=asked) as response:
            Draft202012Validator(TRIAGE).validate(json.loads((await response.json())["content"][0]["text"]))

    with_simulator(script(), use)


def test_a_streamed_answer_says_word_by_word_what_a_whole_one_says() -> None:
    async def use(sim: Simulator, client: aiohttp.ClientSession) -> None:
        whole = json.loads((await ask(sim, client))[2])
        async with client.post(sim.base_url("one") + "/chat/completions", json={**ASK, "stream": True}) as response:
            assert response.headers["Content-Type"] == "text/event-stream"
            *chunks, (_, done) = await events(response)
        deltas = [chunk["choices"][0] for _, chunk in chunks if chunk["choices"]]
        assert "".join(choice["delta"].get("content", "") for choice in deltas) == whole["choices"][0]["message"]["content"]
        assert len(deltas) > 10
        assert ([choice["finish_reason"] for choice in deltas][-2:], done) == ([None, "stop"], "[DONE]")
        assert chunks[-1][1]["usage"] == whole["usage"]
        async with client.post(sim.base_url("one") + "/messages", json={**MESSAGE_ASK, "stream": True}) as response:
            named = await events(response)
        assert all(name == data["type"] for name, data in named)
        assert [name for name, _ in named[:3]] == ["message_start", "content_block_start", "ping"]
        assert [name for name, _ in named[-3:]] == ["content_block_stop", "message_delta", "message_stop"]
        texts = [data["delta"]["text"] for name, data in named if name == "content_block_delta"]
        assert "".join(texts) == whole["choices"][0]["message"]["content"]
        assert [(line.outcome, line.written, line.cost > 0) for line in sim.bill.lines()] == [("answered", True, True)] * 3

    with_simulator(script(), use)


@pytest.mark.parametrize("path", ["chat/completions", "messages"])
@pytest.mark.parametrize("kind", ["stall", "truncate", "malformed", "empty", "error_in_200"])
def test_a_fault_in_a_stream_comes_after_the_first_word_and_before_the_end(kind: str, path: str) -> None:
    async def use(sim: Simulator, client: aiohttp.ClientSession) -> None:
        got = b""
        async with client.post(f"{sim.base_url('one')}/{path}", json={**MESSAGE_ASK, "stream": True}) as response:
            with contextlib.suppress(aiohttp.ClientError):
                async for piece in response.content.iter_any():
                    got += piece
        ended = b"[DONE]" in got or b"message_stop" in got
        assert ended == (kind in ("malformed", "empty"))
        first_word = say(7, ASK).content.split()[0].encode()
        assert (b'"%s"' % first_word in got) == (kind != "empty") or kind == "truncate"  # its reset may overtake the words
        assert (b'"error"' in got) == (kind == "error_in_200")
        assert (b"data: {\n\n" in got) == (kind == "malformed")
        line = only_line(sim)
        assert (line.outcome, line.written, line.cost > 0) == (kind, kind not in ("stall", "truncate"), kind != "error_in_200")

    with_simulator(always(kind, **({"seconds": 0.2} if kind == "stall" else {})), use)


def test_a_request_above_the_vendors_limits_is_a_429_that_costs_nothing_and_says_when_to_come_back() -> None:
    async def use(sim: Simulator, client: aiohttp.ClientSession) -> None:
        replies = [await ask(sim, client) for _ in range(3)]
        assert [status for status, _, _ in replies] == [200, 200, 429]
        assert [headers["x-ratelimit-remaining-requests"] for _, headers, _ in replies] == ["1", "0", "0"]
        refused = replies[2][1]
        assert refused["x-ratelimit-limit-requests"] == "2"
        assert 0 < int(refused["retry-after-ms"]) <= 30_000
        assert refused["Retry-After"] == str(-(-int(refused["retry-after-ms"]) // 1000))
        assert json.loads(replies[2][2])["error"]["code"] == "rate_limit_exceeded"
        async with client.post(sim.base_url("one") + "/messages", json=MESSAGE_ASK) as response:
            assert (response.status, (await response.json())["error"]["type"]) == (429, "rate_limit_error")
            assert response.headers["anthropic-ratelimit-requests-remaining"] == "0"
            assert response.headers["anthropic-ratelimit-requests-reset"].endswith("Z")
        lines = list(sim.bill.lines())
        assert [line.outcome for line in lines] == ["answered", "answered", "limited", "limited"]
        assert [line.cost > 0 for line in lines] == [True, True, False, False]
        assert sim.bill.totals()["one"].failed == 2
        await sim.change("one", rpm=100)
        assert (await ask(sim, client))[1]["x-ratelimit-remaining-requests"] == "99"

    with_simulator(script(rpm=2), use)


def test_without_limits_there_are_no_headers_of_them() -> None:
    async def use(sim: Simulator, client: aiohttp.ClientSession) -> None:
        assert not [name for name in (await ask(sim, client))[1] if "ratelimit" in name.lower()]

    with_simulator(script(), use)


def test_tokens_are_limited_by_what_a_request_reads_and_writes() -> None:
    async def use(sim: Simulator, client: aiohttp.ClientSession) -> None:
        _, headers, text = await ask(sim, client)
        used = json.loads(text)["usage"]["total_tokens"]
        assert int(headers["x-ratelimit-remaining-tokens"]) == 100 - used
        assert (await ask(sim, client))[0] == 429

    with_simulator(script(tpm=100), use)


def test_calls_at_once_are_limited_and_make_room_when_they_end() -> None:
    async def use(sim: Simulator, client: aiohttp.ClientSession) -> None:
        asked = [asyncio.create_task(ask(sim, client)) for _ in range(2)]
        await until(lambda: len(sim.bill) == 2)
        status, headers, _ = await ask(sim, client)
        assert (status, headers["Retry-After"], headers["retry-after-ms"]) == (429, "1", "500")
        for task in asked:
            task.cancel()
        await asyncio.wait(asked)
        await settled(sim)
        await sim.change("one", latency={"ms": 0})
        assert (await ask(sim, client))[0] == 200

    with_simulator(script(concurrency=2, latency={"ms": 3_600_000}), use)


@given(st.integers(1, 600), st.lists(st.tuples(st.floats(0, 5), st.integers(1, 50)), max_size=60))
def test_a_bucket_never_gives_more_than_it_holds_and_refills_and_its_hint_suffices(limit: int, asks: list[tuple[float, int]]) -> None:
    bucket, now_s, given_ = Bucket(limit, 0.0), 0.0, 0
    for pause_s, wanted in asks:
        now_s += pause_s
        wait_s = bucket.wait_s(wanted, now_s)
        if wait_s > 0:
            now_s += wait_s + 1e-6
            assert bucket.wait_s(wanted, now_s) == 0
        bucket.take(wanted)
        given_ += min(wanted, limit)
        assert given_ <= limit + limit * now_s / 60 + 1e-3


def test_a_bucket_left_alone_holds_a_minutes_worth_and_no_more() -> None:
    bucket = Bucket(60, 0.0)
    bucket.take(40)
    assert bucket.wait_s(60, 10.0) == 30
    assert bucket.wait_s(60, 3600.0) == 0
    assert bucket.level() == (60, 60, 0)


def test_a_refused_request_takes_nothing_from_any_limit() -> None:
    limits = Limits.of(script(rpm=60, tpm=600).providers["one"], 0.0)
    assert limits.refusal_s(600, 0, 0.0) is None
    assert [limits.refusal_s(60, 0, 0.0) for _ in range(100)] == [6.0] * 100
    assert limits.levels()["requests"].remaining == 59


def test_models_livez_and_unknown_routes() -> None:
    async def use(sim: Simulator, client: aiohttp.ClientSession) -> None:
        async with client.get(f"{sim.base_url('one')}/models") as response:
            assert [model["id"] for model in (await response.json())["data"]] == ["sim-small"]
        async with client.get(f"{sim.url}/livez") as response:
            assert response.status == 200
        async with client.post(f"{sim.url}/nobody/v1/chat/completions", json=ASK) as response:
            assert response.status == 404
            assert "providers: one" in (await response.json())["error"]["message"]
        assert len(sim.bill) == 0
        with pytest.raises(UsageError, match="no provider 'nobody'; there are: one"):
            sim.base_url("nobody")

    with_simulator(script(), use)


def test_an_answer_is_the_same_for_the_same_seed_and_request() -> None:
    assert say(1, ASK) == say(1, ASK)
    assert len({say(seed, ASK).content for seed in range(20)}) > 5


def test_max_tokens_cuts_the_answer_and_says_so() -> None:
    cut = say(1, {**ASK, "max_tokens": 3})
    assert (cut.finish_reason, cut.output_tokens, len(cut.content)) == ("length", 3, 12)


def test_template_text_in_a_ticket_comes_back_harmless() -> None:
    ticket = "=cmd|' /C calc'!A0 {{ 7*7 }} {% for x in y %} ${env} {0.__class__} <script>alert(1)</script> %s"
    content = say(3, {"messages": [{"role": "user", "content": [{"type": "text", "text": ticket}]}]}).content
    assert "env class script" in content
    assert not set("{}<>$%=|") & set(content)


TRIAGE = {
    "type": "object",
    "properties": {
        "category": {"enum": ["access rights", "broken screen", "order"]},
        "urgency": {"type": "integer", "minimum": 1, "maximum": 4},
        "reply": {"type": "string", "minLength": 1},
    },
    "required": ["category", "urgency", "reply"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("nested", [{"json_schema": {"name": "triage", "schema": TRIAGE}}, {"schema": TRIAGE}])
def test_an_answer_in_a_schema_fits_it_and_takes_up_the_words_of_the_ticket(nested: dict[str, Any]) -> None:
    value = json.loads(say(1, {**ASK, "response_format": {"type": "json_schema", **nested}}).content)
    Draft202012Validator(TRIAGE).validate(value)
    assert value["category"] == "broken screen"


def test_without_shared_words_an_enum_is_chosen_by_hash() -> None:
    schema = {"enum": ["a", "b", "c"]}
    chosen = Counter(fit(schema, ticket=f"ticket {n}", sentence="", seed=1) for n in range(300))
    assert min(chosen[letter] for letter in "abc") > 60


def test_a_recursive_schema_ends() -> None:
    node = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "children": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
        "required": ["name", "children"],
    }
    schema = {"$defs": {"node": node}, "$ref": "#/$defs/node"}
    Draft202012Validator(schema).validate(fit(schema, ticket="x", sentence="y", seed=1))


@pytest.mark.parametrize(
    "further",
    [
        {"properties": {"next": {"$ref": "#"}}, "required": []},
        {"properties": {"next": {"anyOf": [{"$ref": "#"}] * 6 + [{"type": "string"}]}}, "required": ["next"]},
    ],
)
def test_a_schema_that_may_go_on_for_ever_stops_where_it_may(further: dict[str, Any]) -> None:
    schema = {"type": "object", "additionalProperties": False, **further}
    for seed in range(100):
        Draft202012Validator(schema).validate(fit(schema, ticket="x", sentence="y", seed=seed))


def test_exclusive_bounds_are_never_reached() -> None:
    schema = {"type": "integer", "exclusiveMinimum": 1, "exclusiveMaximum": 4}
    assert {fit(schema, ticket="x", sentence="", seed=seed) for seed in range(100)} == {2, 3}


def numbers(kind: str) -> st.SearchStrategy[dict[str, Any]]:
    spans = st.tuples(st.integers(-1000, 1000), st.integers(2, 50))
    lows, highs = st.sampled_from(["minimum", "exclusiveMinimum"]), st.sampled_from(["maximum", "exclusiveMaximum"])
    bounded = st.builds(lambda s, low, high: {"type": kind, low: s[0], high: s[0] + s[1]}, spans, lows, highs)
    half = st.builds(lambda s, key: {"type": kind, key: s[0]}, spans, lows | highs)
    return bounded | half | st.just({"type": kind})


def leaves() -> st.SearchStrategy[dict[str, Any]]:
    scalars = st.none() | st.booleans() | st.integers() | st.text(max_size=5)
    return st.one_of(
        st.builds(
            lambda low, more: {"type": "string", "minLength": low, "maxLength": low + more},
            st.integers(0, 300),
            st.integers(0, 20),
        ),
        st.sampled_from([{"type": "string"}, {"type": "boolean"}, {"type": "null"}, {"type": ["null", "string"]}]),
        numbers("integer"),
        numbers("number"),
        st.builds(lambda step: {"type": "integer", "multipleOf": step, "minimum": -7}, st.integers(1, 9)),
        st.builds(lambda values: {"enum": values}, st.lists(scalars, min_size=1, max_size=4)),
        st.builds(lambda value: {"const": value}, scalars),
    )


def branches(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.one_of(
        st.builds(
            lambda fields: {
                "type": "object",
                "properties": fields,
                "required": list(fields)[:2],
                "additionalProperties": False,
            },
            st.dictionaries(st.text(min_size=1, max_size=4), inner, max_size=4),
        ),
        st.builds(
            lambda items, low, more: {"type": "array", "items": items, "minItems": low, "maxItems": low + more},
            inner,
            st.integers(0, 4),
            st.integers(0, 2),
        ),
        st.builds(
            lambda parts: {"type": "array", "prefixItems": parts, "items": False},
            st.lists(inner, min_size=1, max_size=3),
        ),
        st.builds(lambda parts: {"anyOf": parts}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(lambda part: {"allOf": [part]}, inner),
    )


@settings(max_examples=300, deadline=None)
@given(st.recursive(leaves(), branches, max_leaves=8), st.text(max_size=40), st.integers(0, 99))
def test_a_fitted_value_validates_against_its_schema(schema: dict[str, Any], ticket: str, seed: int) -> None:
    value = fit(schema, ticket=ticket, sentence="A plain sentence.", seed=seed)
    Draft202012Validator(schema).validate(json.loads(json.dumps(value)))
    assert value == fit(schema, ticket=ticket, sentence="A plain sentence.", seed=seed)


def test_unique_items_are_unique() -> None:
    schema = {"type": "array", "items": {"enum": ["a", "b", "c"]}, "uniqueItems": True, "minItems": 3}
    for seed in range(50):
        Draft202012Validator(schema).validate(fit(schema, ticket="", sentence="", seed=seed))


@pytest.mark.parametrize(
    ("provider", "message"),
    [
        ({"fautls": []}, "unknown key providers.one.fautls, did you mean 'faults'?"),
        (
            {"faults": [{"kind": "rest", "rate": 1}]},
            "providers.one.faults.0.kind: no kind 'rest'; there are: status, hang",
        ),
        ({"faults": [{"kind": "reset"}]}, "providers.one.faults.0.rate: Field required"),
        (
            {"faults": [{"kind": "reset", "rate": 1.5}]},
            "providers.one.faults.0.rate: Input should be less than or equal to 1",
        ),
        ({"faults": [{"kind": "status", "rate": 1}]}, "needs a status, as in status = 503"),
        ({"faults": [{"kind": "reset", "rate": 1, "seconds": 3}]}, 'seconds means nothing for kind = "reset"'),
        (
            {"faults": [{"kind": "reset", "rate": 0.6}] * 2},
            "providers.one: the rates of its faults add up to more than 1",
        ),
        ({"outages": [{"kind": "reset"}]}, "an outage needs from_s/to_s or from_request/to_request"),
        ({"outages": [{"kind": "reset", "from_s": 5, "to_s": 5}]}, "the window ends before it begins"),
        ({"outages": [{"kind": "refuse", "from_s": 5}]}, "needs a port of its own: add port = 0"),
        ({"rpm": 0}, "providers.one.rpm: Input should be greater than 0"),
        ({"concurency": 3}, "unknown key providers.one.concurency, did you mean 'concurrency'?"),
        ({"port": 0, "outages": [{"kind": "refuse", "from_request": 5}]}, 'goes by from_s/to_s; else use "reset"'),
        ({"latency": {"median_ms": 5}}, "write either { ms = 50 } or { median_ms = 60, p99_ms = 400 }"),
        ({"price": {"input": 0.28, "output": "1"}}, 'write money as a string, as in "0.28"'),
    ],
)
def test_a_mistake_in_a_script_names_the_file_the_key_and_what_to_do(provider: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        script(**provider)
    assert message in str(caught.value)
    assert str(caught.value).startswith("test: ")
    assert "\n" not in str(caught.value)


def test_the_example_script_loads_and_a_missing_or_broken_one_is_named(tmp_path: Path) -> None:
    assert set(load(ROOT / "examples" / "faults.toml").providers) == {"steady", "flaky", "dying", "crowded", "unplugged"}
    with pytest.raises(UsageError, match=r"no .*absent\.toml here"):
        load(tmp_path / "absent.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("seed = ")
    with pytest.raises(UsageError, match=r"broken\.toml is not TOML"):
        load(broken)


def test_a_port_in_use_is_named() -> None:
    async def use(sim: Simulator, client: aiohttp.ClientSession) -> None:
        with pytest.raises(UsageError, match=f"port {sim.port} on 127.0.0.1 is in use"):
            await Simulator(script(), port=sim.port).__aenter__()

    with_simulator(script(), use)


def test_a_port_of_its_own_in_use_is_named() -> None:
    async def use(sim: Simulator, client: aiohttp.ClientSession) -> None:
        port = int(sim.base_url("one").split(":")[2].split("/")[0])
        with pytest.raises(UsageError, match=f"port {port} on 127.0.0.1 is in use"):
            await Simulator(script(port=port)).__aenter__()

    with_simulator(script(port=0), use)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_says_where_it_is_and_stops_cleanly_on_a_signal(number: signal.Signals) -> None:
    code = (
        "from worker.simulator.script import parse; from worker.simulator.server import serve\n"
        "serve(parse({'providers': {'one': {}}}, 'x'), '127.0.0.1', 0, None)"
    )

    async def main() -> None:
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        pipe = asyncio.subprocess.PIPE
        child = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=pipe, stderr=pipe, env=env)
        assert child.stderr is not None
        base_url = (await child.stderr.readline()).decode().split()[1]
        async with aiohttp.ClientSession() as client, client.post(f"{base_url}/chat/completions", json=ASK) as response:
            assert response.status == 200
        await child.stderr.readline()
        child.send_signal(number)
        out, err = await asyncio.wait_for(child.communicate(), 30)
        assert (child.returncode, out, err) == (0, b"", b"")

    asyncio.run(main())
