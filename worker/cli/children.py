"""Processes that a command starts for as long as it runs: workers, API, Flower, beat."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from worker.embedded.launch import end_with_parent
from worker.errors import BackstopError


class Children:
    """Each has a log under `logs`. Leaving the context stops them all, the last started first, within their grace.

    On Linux they stop as well when this process is killed. Use it from the main thread: the kernel tells them when the
    thread that started them is gone.
    """

    def __init__(self, logs: Path, *, grace_s: float = 45) -> None:
        self._logs = logs
        self._grace_s = grace_s
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        self._logs.mkdir(parents=True, exist_ok=True)
        for number in (signal.SIGTERM, signal.SIGHUP):  # a stop from outside leaves the context as Ctrl-C does
            if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN:  # nohup is respected
                signal.signal(number, signal.default_int_handler)
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a script's `backstop up &` can still be interrupted
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return self

    def start(self, name: str, arguments: Sequence[str], extra: Mapping[str, str] | None = None) -> None:
        """`backstop` with these arguments runs as a child, its words in `logs/NAME.log`."""
        with (self._logs / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(  # noqa: S603 - our own program
                [sys.executable, "-m", "worker", *arguments],
                env={**os.environ, **(extra or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is ours to pass on, in order
                preexec_fn=end_with_parent(signal.SIGTERM) if sys.platform == "linux" else None,
            )

    def check(self) -> None:
        """Raises BackstopError naming the first child that has ended by itself, with the last line it wrote."""
        for name, child in self._running.items():
            if child.poll() is not None:
                log = self._logs / f"{name}.log"
                raise BackstopError(f"{name} ended with code {child.returncode}: {_last_line(log)} (see {log})")

    def pids(self) -> dict[str, int]:
        return {name: child.pid for name, child in self._running.items()}

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._stop()
        except KeyboardInterrupt:  # asked twice: at once, then
            self._kill()

    def _stop(self) -> None:
        for child in reversed(self._running.values()):
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)
        until_s = time.monotonic() + self._grace_s
        for child in reversed(self._running.values()):
            try:
                child.wait(max(until_s - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()

    def _kill(self) -> None:
        for child in self._running.values():
            child.kill()
        for child in self._running.values():
            child.wait()


def _last_line(log: Path) -> str:
    lines = log.read_text("utf-8", "replace").strip().splitlines()
    return lines[-1][:300] if lines else "it said nothing"
