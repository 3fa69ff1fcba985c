"""The network before one server, on a port that stays the same: it can be cut, slowed, and made to lose what a test names.

What is held back is neither lost nor reordered. As on a host that cannot be reached for a while, it arrives late, unless its
connection is reset meanwhile. The kernels at both ends notice nothing, so keepalives stay content: only limits of the clients act.
"""

from __future__ import annotations

import asyncio
import re
import socket
import struct
from collections import deque
from collections.abc import Callable
from typing import Any, Self

# psycopg prepares what it runs often: from then on a statement travels as a name. Names are looked up, preparing is no request.
_PARSE = re.compile(rb"P.{4}(_pg3_\w+)\0([^\0]*)\0", re.DOTALL)
_BIND = re.compile(rb"B.{4}\0(_pg3_\w+)\0", re.DOTALL)
_AT_ONCE = struct.pack("ii", 1, 0)  # SO_LINGER: what is closed is reset


class Proxy:
    """An async context manager; inside it `port` forwards to `to_port`, both on loopback. Every mode holds until `thaw`."""

    def __init__(self, to_port: int) -> None:
        self.to_port = to_port
        self.holds_requests = False
        self.holds_replies = False
        self.delay_s = 0.0
        self.cut_bytes: int | None = None
        self.connections: set[_Connection] = set()
        self._losing: list[tuple[bytes, asyncio.Event]] = []
        self._place = _bound(0)  # keeps the port while nobody listens on it
        self.port: int = self._place.getsockname()[1]
        self._listener: asyncio.Server | None = None

    async def thaw(self) -> None:
        """All is forwarded again, new connections are taken; what was held back goes out."""
        self.holds_requests = self.holds_replies = False
        self.delay_s, self.cut_bytes = 0.0, None
        self._losing.clear()
        if self._listener is None:
            loop = asyncio.get_running_loop()
            self._listener = await loop.create_server(lambda: _Connection(self).requests, sock=_bound(self.port), backlog=1024)
        for connection in list(self.connections):
            connection.go_on()

    def refuse(self) -> None:
        """Nobody is there: connections end, new ones are refused."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        self.reset()

    def reset(self) -> None:
        """Every connection is reset, at both ends; new ones are taken as before."""
        for connection in list(self.connections):
            connection.reset()

    def blackhole(self) -> None:
        """Nothing arrives any more, in either direction; connections stay open, new ones are taken in silence."""
        self.holds_requests = self.holds_replies = True

    def deafen(self) -> None:
        """Requests arrive and are obeyed, no reply comes back."""
        self.holds_replies = True

    def delay(self, seconds: float) -> None:
        """Each piece arrives so much later, in both directions."""
        self.delay_s = seconds

    def cut_after(self, reply_bytes: int) -> None:
        """Each connection is reset once it has carried so many bytes of replies from now on."""
        self.cut_bytes = reply_bytes
        for connection in self.connections:
            connection.replied_bytes = 0

    def lose_reply(self, matching: bytes) -> asyncio.Event:
        """The next request with these bytes in it is obeyed to its end, but its client sees a reset; that sets the event.

        A Postgres statement is matched by its text, prepared or not.
        """
        lost = asyncio.Event()
        self._losing.append((matching, lost))
        return lost

    def loss(self, request: bytes) -> asyncio.Event | None:
        """What to set once the reply to this request is lost; None when it is not to be."""
        for losing in self._losing:
            if losing[0] in request:
                self._losing.remove(losing)
                return losing[1]
        return None

    async def __aenter__(self) -> Self:
        await self.thaw()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.refuse()
        self._place.close()
        await asyncio.sleep(0)  # transports close in the next turn of the loop
        await asyncio.sleep(0)


class _Connection:
    """A client, the server once it is connected, and a pipe for each direction."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self.requests = _Pipe(proxy, self._request, lambda: proxy.holds_requests or self.replies.source is None)
        self.replies = _Pipe(proxy, self._reply, lambda: proxy.holds_replies)
        self.requests.begun = self._accepted
        self.replied_bytes = 0
        self._prepared: dict[bytes, bytes] = {}
        self._loss: asyncio.Event | None = None
        self._told = False  # the server, that nothing more will come
        self._connecting: asyncio.Task[None] | None = None

    def go_on(self) -> None:
        if self._connecting is None and not self._proxy.holds_requests:
            self._connecting = asyncio.create_task(self._connect())
        self.requests.flow()
        self.replies.flow()

    def reset(self) -> None:
        self._proxy.connections.discard(self)
        if self._connecting is not None:
            self._connecting.cancel()
        self.requests.reset()
        self.replies.reset()

    def _accepted(self) -> None:
        self._proxy.connections.add(self)
        self.go_on()

    async def _connect(self) -> None:
        try:
            await asyncio.get_running_loop().create_connection(lambda: self.replies, "127.0.0.1", self._proxy.to_port)
        except OSError:  # the server is down
            self.reset()
        else:
            self.requests.flow()

    def _request(self, piece: bytes) -> None:
        server = self.replies.source
        if not piece:
            self._proxy.connections.discard(self)
            server.close()
            return
        self._loss = self._loss or self._proxy.loss(self._meaning(piece))
        if not (server.is_closing() or self._told):
            server.write(piece)

    def _meaning(self, piece: bytes) -> bytes:
        """The request, with the text of what it only names; without what it only prepares."""
        if b"_pg3_" not in piece:
            return piece
        self._prepared.update(_PARSE.findall(piece))
        return _PARSE.sub(b"", piece) + b"".join(self._prepared.get(name, b"") for name in _BIND.findall(piece))

    def _reply(self, piece: bytes) -> None:
        client = self.requests.source
        if self._loss is not None:
            self._lose(piece)
        elif not piece:
            client.close()
        elif self._proxy.cut_bytes is None:
            client.write(piece)
        else:
            client.write(piece[: max(self._proxy.cut_bytes - self.replied_bytes, 0)])
            self.replied_bytes += len(piece)
            if self.replied_bytes >= self._proxy.cut_bytes:
                self.reset()

    def _lose(self, piece: bytes) -> None:
        """Told that nothing more will come, the server ends what it was asked for, commits, and leaves. Then the client is cut."""
        if piece and not self._told:
            self._told = True
            self.replies.source.write_eof()
        if not piece and self._loss is not None:
            self.reset()
            self._loss.set()


class _Pipe(asyncio.Protocol):
    """What `source` says is handed on in order, each piece when it is due and not `held`; an empty piece is its end."""

    def __init__(self, proxy: Proxy, hand_on: Callable[[bytes], None], held: Callable[[], bool]) -> None:
        self._proxy = proxy
        self._hand_on = hand_on
        self._held = held
        self._line: deque[tuple[float, bytes]] = deque()
        self.begun: Callable[[], None] = lambda: None
        self.source: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.source = transport
        self.begun()

    def data_received(self, data: bytes) -> None:
        loop = asyncio.get_running_loop()
        due_s = loop.time() + self._proxy.delay_s
        self._line.append((due_s, data))
        if self._proxy.delay_s:
            loop.call_at(due_s, self.flow)
        self.flow()

    def connection_lost(self, _error: Exception | None) -> None:
        self.data_received(b"")

    def flow(self) -> None:
        now_s = asyncio.get_running_loop().time() + 0.001  # timers may come early by a clock's tick
        while self._line and self._line[0][0] <= now_s and not self._held():
            self._hand_on(self._line.popleft()[1])

    def reset(self) -> None:
        self._line.clear()
        if self.source is not None and not self.source.is_closing():
            self.source.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
            self.source.abort()


def _bound(port: int) -> socket.socket:
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    bound.bind(("127.0.0.1", port))
    return bound
