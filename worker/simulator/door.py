"""A provider's own port, shut while its script says `refuse`: clients then meet a real ECONNREFUSED."""

from __future__ import annotations

import asyncio
import contextlib
import socket

from aiohttp import web

from worker.simulator.plan import Vendor


class Door:
    """Open or shut as the script goes, until `stop`. The port stays the same and stays ours while nobody listens on it:
    a second socket, bound but never listening, keeps it.
    """

    def __init__(self, vendor: Vendor, server: web.Server, host: str, port: int) -> None:
        self._vendor, self._server, self._host = vendor, server, host
        _bound(host, port, shared=False).close()  # says so when somebody else has it; sharing would not
        self._place = _bound(host, port)
        self.port: int = self._place.getsockname()[1]
        self._listener: asyncio.Server | None = None
        self._changed = asyncio.Event()
        self._watch: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self._turn()
        self._watch = asyncio.create_task(self._follow())

    async def look_again(self) -> None:
        """The script changed: the door is as it says when this returns."""
        await self._turn()
        self._changed.set()

    async def stop(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
        self._shut()
        self._place.close()

    async def _follow(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), self._vendor.next_turn_s())
            self._changed.clear()
            await self._turn()

    async def _turn(self) -> None:
        if self._vendor.is_refusing():
            self._shut()
        elif self._listener is None:
            listener = _bound(self._host, self.port)
            loop = asyncio.get_running_loop()
            self._listener = await loop.create_server(self._server, sock=listener, backlog=4096)

    def _shut(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        for connection in self._server.connections:
            if connection.transport is not None:
                connection.transport.abort()


def _bound(host: str, port: int, *, shared: bool = True) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(shared))
    try:
        bound.bind((host, port))
    except OSError:
        bound.close()
        raise
    return bound
