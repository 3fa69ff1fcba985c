"""The cheapest provider there can be, in its own process: one fixed answer, about 0.05 ms of CPU a request, no latency.

`python -m bench.stub` prints its port and serves on 127.0.0.1 until its stdin is closed, so it never outlives its parent.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from typing import cast

import uvloop

_USAGE = {"prompt_tokens": 500, "completion_tokens": 120, "total_tokens": 620}
_MESSAGE = {"role": "assistant", "content": "Please restart the router, then try again. " * 14}
_CHOICE = {"index": 0, "message": _MESSAGE, "finish_reason": "stop"}
_BODY = json.dumps({"id": "stub", "object": "chat.completion", "model": "stub", "choices": [_CHOICE], "usage": _USAGE}).encode()
_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(_BODY), _BODY)
_LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")


class _Connection(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but its class
        self._unread = b""

    def data_received(self, data: bytes) -> None:
        self._unread += data
        while (end := self._unread.find(b"\r\n\r\n")) >= 0:
            length = _LENGTH.search(self._unread, 0, end)
            end += 4 + (int(length[1]) if length else 0)
            if len(self._unread) < end:
                return
            self._unread = self._unread[end:]
            self._transport.write(_ANSWER)


async def _serve() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(_Connection, "127.0.0.1", 0, backlog=1000)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    uvloop.run(_serve())
