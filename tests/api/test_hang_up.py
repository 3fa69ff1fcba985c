"""What becomes of a job whose client has gone, and of those who wait for a job that somebody cancels."""

import asyncio
import json

import httpx
import pytest

from worker import waiting

LONG_S = 30.0  # never waited out by a test that passes
CHAT = {"model": "default", "messages": [{"role": "user", "content": "Hello"}]}


async def hung_up(stage, headers, meanwhile=None, **fields):
    """A client that goes once its job is on its way, and `meanwhile` is over; what was sent to it in vain."""
    loop, published, sent = asyncio.get_running_loop(), asyncio.Queue(), []
    stage.on_publish = lambda _lane, _delivery, job_ids: loop.call_soon_threadsafe(published.put_nowait, job_ids[0])
    body = [{"type": "http.request", "body": json.dumps({**CHAT, **fields}).encode()}]

    async def receive():
        if body:
            return body.pop()
        job_id = await published.get()
        if meanwhile is not None:
            await meanwhile(job_id)
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    sent_with = {**stage.client.headers, "Content-Type": "application/json", **headers}
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "query_string": b"",
        "headers": [(name.lower().encode(), value.encode()) for name, value in sent_with.items()],
        "app": stage.client.app,
    }
    async with asyncio.timeout(LONG_S):
        await stage.client.app(scope, receive, send)
    return sent


@pytest.mark.parametrize("stream", [False, True])
def test_the_job_of_a_client_that_hangs_up_is_cancelled(stage, stream):
    stage.client.portal.call(lambda: hung_up(stage, {}, stream=stream))
    assert stage.sql("SELECT state FROM jobs") == [("cancelled",)]


@pytest.mark.parametrize("stream", [False, True])
def test_under_an_idempotency_key_the_job_goes_on_without_its_client(stage, stream):
    stage.client.portal.call(lambda: hung_up(stage, {"Idempotency-Key": "order-7"}, stream=stream))
    assert stage.sql("SELECT state, cancel_requested FROM jobs") == [("queued", False)]


def test_who_else_waits_for_the_job_of_a_client_that_hangs_up_is_told_at_once(stage, monkeypatch):
    monkeypatch.setattr(waiting, "POLL_S", 3600)
    parts, waits = stage.client.app.state.parts, []

    async def waiting_too(job_id):
        waits.append(asyncio.create_task(parts.endings.wait([job_id], LONG_S)))
        while not (await parts.redis.pubsub_numsub(waiting.CHANNEL))[0][1]:  # noqa: ASYNC110 - what is awaited is in a server
            await asyncio.sleep(0.005)

    async def story():
        await hung_up(stage, {}, waiting_too)
        return await waits[0]

    assert stage.client.portal.call(story) == set()


def test_who_waits_for_a_job_is_told_at_once_that_it_was_cancelled(stage, monkeypatch):
    monkeypatch.setattr(waiting, "POLL_S", 3600)
    path = f"/v1/jobs/{stage.submit()['id']}"
    app, parts = stage.client.app, stage.client.app.state.parts

    async def listening():
        return (await parts.redis.pubsub_numsub(waiting.CHANNEL))[0][1] and parts.endings._waits and not parts.endings._first_looks._sender

    async def story():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://api", headers=stage.client.headers) as client:
            poll = asyncio.create_task(client.get(path, params={"wait": 60}))
            async with asyncio.timeout(LONG_S):
                while not await listening():  # noqa: ASYNC110 - what is awaited is in a server
                    await asyncio.sleep(0.005)
                await client.post(f"{path}/cancel")
                return (await poll).json()["state"]

    assert stage.client.portal.call(story) == "cancelled"
