"""The process that starts one server, starts it again when it dies, and stops it when nobody uses it any more.

`python -m worker.embedded.minder NAME HOME DURABLE`, inheriting the descriptor that holds `minder.lock`. It closes
stdout when the server answers; what it wrote there before is why it does not. A process of its own, so that the server
outlives the command that happened to start it while others still work with it.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, NoReturn, Protocol

from worker.embedded import home, launch
from worker.embedded.postgres import Postgres
from worker.embedded.valkey import Valkey
from worker.errors import BackstopError, Unreachable

START_S = 120.0  # a server may have to read back much after a crash
STOP_S = 30.0
_TRIES = 3  # a free port may be taken before the server has it
_LOOK_EVERY_S = 0.05
_RUINED = 5  # deaths within _RUIN_S: no use to go on
_RUIN_S = 60.0


class Server(Protocol):
    """What the minder and `servers` need to know of Postgres and of Valkey."""

    name: ClassVar[str]
    title: ClassVar[str]
    setting: ClassVar[str]
    stop_signal: ClassVar[signal.Signals]

    @property
    def home(self) -> Path: ...
    @property
    def durable(self) -> bool: ...
    def generation(self) -> str: ...
    def prepare(self, password: str) -> None: ...
    def launch(self, port: int, password: str) -> launch.Launch: ...
    def ready(self, pid: int, port: int, password: str) -> bool: ...
    def url(self, port: int, password: str) -> str: ...


class Minder:
    """Owns the one process of `server`. Raises Unreachable or UsageError, naming the log, where that does not start.

    `told_to_stop` is looked at where it waits: an exception out of a signal handler could break off a look at the process
    half way, and leave its lock taken for ever.
    """

    def __init__(self, server: Server, told_to_stop: Callable[[], bool]) -> None:
        self.server = server
        self.told_to_stop = told_to_stop
        self.home = server.home
        self.password = _kept_password(self.home / "password")
        self.port = _free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.deaths: list[float] = []
        lock = home.take(self.home / "server.lock", wait_s=_end_orphan(server))
        if lock is None:
            raise Unreachable(f"a former {server.title} still writes to {self.home / 'data'}: end its processes")
        self.lock = lock

    def start(self) -> None:
        """The server answers, at a port that was free. Raises when it did not start."""
        self.server.prepare(self.password)
        for _ in range(_TRIES):
            if self._answers():
                return
            self.port = _free_port()
        raise Unreachable(f"{self.server.title} did not start: {_last_words(self.home / 'log')} (log: {self.home / 'log'})")

    def watch(self, users: int) -> None:
        """Returns when nobody uses the server, or when told to stop. Raises Unreachable when it dies again and again."""
        while not (self.told_to_stop() or home.turn(users, shared=False)):
            time.sleep(_LOOK_EVERY_S)
            if self.process is not None and self.process.poll() is not None:
                self._start_again()

    def stop(self) -> None:
        """The server is gone, its data are on disk."""
        (self.home / "url").unlink(missing_ok=True)
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(self.server.stop_signal)
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def publish(self) -> None:
        """Others find the server by the file `url`."""
        home.write(self.home / "url", self.server.url(self.port, self.password))

    def _start_again(self) -> None:
        now = time.monotonic()
        self.deaths = [*(died for died in self.deaths if died > now - _RUIN_S), now]
        # Its children outlive a killed Postgres for a moment; only when they have let go may a new one touch the data.
        os.close(self.lock)
        lock = home.take(self.home / "server.lock", wait_s=STOP_S)
        if len(self.deaths) >= _RUINED or lock is None:
            raise Unreachable(f"{self.server.title} keeps dying: see {self.home / 'log'}")
        self.lock = lock
        self.server.prepare(self.password)
        self._answers()

    def _answers(self) -> bool:
        with (self.home / "log").open("ab") as log:
            self.process = launch.start(
                self.server.launch(self.port, self.password),
                directory=self.home / "data",
                log=log,
                lock=self.lock,
                stop=self.server.stop_signal,
            )
        home.write_holder(self.lock, self.process.pid)
        give_up_at = time.monotonic() + START_S
        while self.process.poll() is None:
            if self.server.ready(self.process.pid, self.port, self.password):
                return True
            if time.monotonic() > give_up_at:
                raise Unreachable(f"{self.server.title} has not answered for {START_S:.0f} s: see {self.home / 'log'}")
            if self.told_to_stop():
                sys.exit(0)
            time.sleep(_LOOK_EVERY_S / 5)
        return False


def mind(server: Server) -> None:
    """The whole life of a minder. Raises what kept the server from starting."""
    told = heard_sigterm()
    users = os.open(server.home / "users.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    log = server.home / "log"
    if log.exists():
        log.replace(log.with_name("log.1"))
    log.touch(mode=0o600)
    minder = Minder(server, told)
    try:
        minder.start()
        minder.publish()
        _detach(log)
        minder.watch(users)
    finally:
        minder.stop()


def heard_sigterm() -> Callable[[], bool]:
    """From now on SIGTERM ends nothing by itself; whether one came."""
    heard: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    return lambda: bool(heard)


def kinds() -> dict[str, type[Postgres] | type[Valkey]]:
    return {kind.name: kind for kind in (Postgres, Valkey)}


def _end_orphan(server: Server) -> float:
    """A server whose minder was killed is told to stop. Returns how long, in seconds, it may take."""
    pid = home.holder(server.home / "server.lock")
    if pid is None:
        return 0
    with suppress(ProcessLookupError):
        os.kill(pid, server.stop_signal)
    return STOP_S


def _kept_password(path: Path) -> str:
    if not path.exists():
        home.write(path, secrets.token_hex(24))
    return path.read_text()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _last_words(log: Path) -> str:
    """The newest line in which the server complains; at its start that is about files, memory and ports."""
    lines = log.read_text(errors="replace").splitlines()
    complaints = [line for line in lines if any(word in line for word in ("FATAL:", "PANIC:", "rror", "annot"))]
    return (complaints or lines or ["it said nothing"])[-1].strip()


def _detach(log: Path) -> None:
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def main() -> NoReturn:
    name, directory, durable = sys.argv[1:]
    try:
        mind(kinds()[name](Path(directory), durable == "durable"))
    except BackstopError as error:
        print(error)
        sys.exit(error.exit_code)
    except OSError as error:
        print(f"{name} under {directory}: {error.strerror or error}")
        sys.exit(1)
    sys.exit(0)


if __name__ == "__main__":
    main()
