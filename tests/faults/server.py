"""The lab's own Postgres and Valkey: processes that a test may stop, kill, freeze and start again, at the same port."""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from ports import free_port
from proxy import Proxy
from psycopg import AsyncConnection

from worker import schema
from worker.embedded import home, launch
from worker.embedded.postgres import Postgres
from worker.embedded.valkey import Valkey

PATIENCE_S = 60.0
_TEMPLATE = "template_lab"
_STOPS = {"fast": signal.SIGINT, "immediate": signal.SIGQUIT}  # Postgres's words; Valkey knows one way


class Server:
    """One server, durable against a kill but not against a power cut. `proxy` is how its clients reach it, as long as a lab is open."""

    def __init__(self, recipe: Postgres | Valkey) -> None:
        self.recipe = recipe
        self.proxy: Proxy
        self.port = free_port()
        self._password = secrets.token_hex(12)
        self.options: dict[str, Any] = {}
        self._process: subprocess.Popen[bytes] | None = None
        recipe.home.mkdir(mode=0o700)

    def url(self, proxy: Proxy | None = None) -> str:
        """Straight to it, or on the way through this proxy."""
        return self.recipe.url(proxy.port if proxy else self.port, self._password)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    async def start(self, **options: Any) -> None:
        """It answers. `options` are settings of the server's own, as `max_connections=20` or `appendonly="yes"`."""
        if not self.running():
            self.launch(**options)
        await self.ready()

    def launch(self, **options: Any) -> None:
        """Like `start`, but what it has to recover may take its time: `await ready()`. Main thread only."""
        self.options = options
        lock = home.take(self.recipe.home / "server.lock", wait_s=PATIENCE_S)  # what a killed one left behind may still write
        assert lock is not None
        self.recipe.prepare(self._password)
        with (self.recipe.home / "log").open("ab") as log:
            self._process = launch.start(
                self._launch(), directory=self.recipe.home / "data", log=log, lock=lock, stop=self.recipe.stop_signal
            )
        os.close(lock)

    async def ready(self) -> None:
        give_up_s = time.monotonic() + PATIENCE_S
        while not self.recipe.ready(self.pid, self.port, self._password):
            log = self.recipe.home / "log"
            assert self.running(), f"{self.recipe.title} ended: {log.read_text()[-2000:]}"
            assert time.monotonic() < give_up_s, f"{self.recipe.title} does not answer: {log.read_text()[-2000:]}"
            await asyncio.sleep(0.01)

    async def stop(self, how: str = "fast") -> None:
        """Gone: "fast" in good order, "immediate" as in a crash. Valkey keeps nothing unless its options say so."""
        assert self._process is not None
        self.thaw()
        self._process.send_signal(_STOPS[how] if isinstance(self.recipe, Postgres) else self.recipe.stop_signal)
        await asyncio.to_thread(self._process.wait, PATIENCE_S)

    async def restart(self, **options: Any) -> None:
        """Stopped in good order and started with these options, and no others."""
        await self.stop()
        await self.start(**options)

    def kill(self) -> None:
        """Gone at once, with all its processes: the machine's power was cut, but for what the kernel had still to write."""
        assert self._process is not None
        self.freeze()
        for pid in self._family():
            _signal(pid, signal.SIGKILL)
        self._process.wait(PATIENCE_S)

    def freeze(self) -> None:
        """Takes connections, as the kernel does so, and answers nothing."""
        _signal(self.pid, signal.SIGSTOP)  # from now on its children are those that it has
        for pid in self._family():
            _signal(pid, signal.SIGSTOP)

    def thaw(self) -> None:
        for pid in reversed(self._family()):
            _signal(pid, signal.SIGCONT)

    def end(self) -> None:
        if self.running():
            self.kill()

    def _launch(self) -> launch.Launch:
        made = self.recipe.launch(self.port, self._password)
        if isinstance(self.recipe, Postgres):
            own = [f"--{name}={value}" for name, value in self.options.items()]
        else:
            own = [word for name, value in self.options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        return replace(made, argv=[*made.argv, *own])

    def _family(self) -> list[int]:
        """The process and its children: Postgres has one for each connection, each in a session of its own."""
        children = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                if int(stat.read_text().rpartition(")")[2].split()[1]) == self.pid:
                    children.append(int(stat.parent.name))
        return [self.pid, *children]


class Servers:
    """A Postgres and a Valkey for all labs of a run, one lab at a time."""

    def __init__(self, directory: Path) -> None:
        self.postgres = Server(Postgres(directory / Postgres.name, durable=False))
        self.valkey = Server(Valkey(directory / Valkey.name, durable=False))
        self._numbers = itertools.count(1)

    async def fresh(self) -> str:
        """Both answer as if nothing had ever happened to them. The name of an empty database with the newest schema."""
        self.valkey.end()
        self.valkey.launch()
        await self._plain_postgres()
        await self.valkey.ready()
        number = next(self._numbers)
        async with await AsyncConnection.connect(self.postgres.url(), autocommit=True) as connection:
            if number == 1:
                await connection.execute(f"CREATE DATABASE {_TEMPLATE}".encode())
                await schema.upgrade(named(self.postgres.url(), _TEMPLATE))
            await connection.execute(f"DROP DATABASE IF EXISTS lab_{number - 1} WITH (FORCE)".encode())
            await connection.execute(f"CREATE DATABASE lab_{number} TEMPLATE {_TEMPLATE} STRATEGY file_copy".encode())
        return f"lab_{number}"

    async def _plain_postgres(self) -> None:
        """It answers and has no settings but its recipe's; most tests leave it so."""
        altered = self.postgres.recipe.home / "data" / "postgresql.auto.conf"
        if self.postgres.options or (altered.exists() and not all(line.startswith("#") for line in altered.read_text().splitlines())):
            self.postgres.end()
            altered.write_text("")
        if self.postgres.running():
            self.postgres.thaw()
        await self.postgres.start()

    def end(self) -> None:
        self.postgres.end()
        self.valkey.end()


def named(url: str, database_name: str) -> str:
    """The same server, another database."""
    return urlunsplit(urlsplit(url)._replace(path=f"/{database_name}"))


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
