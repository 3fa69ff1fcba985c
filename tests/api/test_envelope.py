"""What leaves when a response that has begun cannot be finished."""

import asyncio
import traceback

import pytest

from api.envelope import BrokenOff, Envelope


def test_a_response_that_breaks_after_its_start_is_cut_and_tells_nothing(capsys):
    sent = []

    async def breaking(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("pa55" + "word")

    async def receive():
        return {"type": "http.request"}

    async def send(message):
        sent.append(message["type"])

    scope = {"type": "http", "method": "GET", "path": "/v1/files/x/content", "headers": []}
    with pytest.raises(BrokenOff) as broken:
        asyncio.run(Envelope(breaking)(scope, receive, send))
    assert sent == ["http.response.start"]
    assert "pa55word" not in "".join([*traceback.format_exception(broken.value), *capsys.readouterr()])
