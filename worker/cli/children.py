"""Processes that a command starts for as long as it runs: workers, API, Flower, beat."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from worker.cli.screen import say
from worker.embedded.launch import end_with_parent
from worker.errors import BackstopError

PAUSES_S = (0.25, 0.5, 1.0, 2.0)  # before a child starts again, by how often it ended within WITHIN_S; once more is too often
WITHIN_S = 60.0


@dataclass(slots=True)
class Child:
    """`ends_s`: when it ended by itself of late. `due_s`: when it starts again, None while it runs."""

    arguments: Sequence[str]
    extra: Mapping[str, str]
    process: subprocess.Popen[bytes]
    ends_s: list[float] = field(default_factory=list)
    due_s: float | None = None


class Children:
    """Each has a log under `logs`. Leaving the context stops them all, the last started first, within their grace.

    On Linux they stop as well when this process is killed. Use it from the main thread: the kernel tells them when the
    thread that started them is gone.
    """

    def __init__(self, logs: Path, *, grace_s: float = 45) -> None:
        self._logs = logs
        self._grace_s = grace_s
        self._children: dict[str, Child] = {}

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
        self._children[name] = Child(arguments, extra or {}, self._process(name, arguments, extra or {}))

    def check(self) -> None:
        """Raises BackstopError naming the first child that has ended by itself, with the last line it wrote."""
        for name, child in self._children.items():
            if child.process.poll() is not None:
                raise BackstopError(self._ended(name))

    def see_through(self) -> None:
        """Call it now and then: a child that has ended by itself is started again after a pause, and stderr says so.

        Raises BackstopError, as `check` does, for one that ended once more than there are PAUSES_S within WITHIN_S.
        """
        for name, child in self._children.items():
            if child.process.poll() is None:
                continue
            if child.due_s is None:
                child.due_s = self._due_s(name, child)
            if time.monotonic() >= child.due_s:
                child.process = self._process(name, child.arguments, child.extra)
                child.due_s = None

    def pids(self) -> dict[str, int]:
        return {name: child.process.pid for name, child in self._children.items()}

    def _due_s(self, name: str, child: Child) -> float:
        now_s = time.monotonic()
        child.ends_s = [*(end_s for end_s in child.ends_s if end_s > now_s - WITHIN_S), now_s]
        times = len(child.ends_s)
        if times > len(PAUSES_S):
            raise BackstopError(f"{self._ended(name)}, {times} times within {WITHIN_S:.0f} s: it is not started again")
        pause_s = PAUSES_S[times - 1]
        say(f"{self._ended(name)}: starting it again in {pause_s:g} s")
        return now_s + pause_s

    def _ended(self, name: str) -> str:
        log = self._logs / f"{name}.log"
        return f"{name} ended with code {self._children[name].process.returncode}: {_last_line(log)} (see {log})"

    def _process(self, name: str, arguments: Sequence[str], extra: Mapping[str, str]) -> subprocess.Popen[bytes]:
        with (self._logs / f"{name}.log").open("ab") as log:
            return subprocess.Popen(  # noqa: S603 - our own program
                [sys.executable, "-m", "worker", *arguments],
                env={**os.environ, **extra},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is ours to pass on, in order
                preexec_fn=end_with_parent(signal.SIGTERM) if sys.platform == "linux" else None,
            )

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._stop()
        except KeyboardInterrupt:  # asked twice: at once, then
            self._kill()

    def _stop(self) -> None:
        processes = self._processes()
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        until_s = time.monotonic() + self._grace_s
        for process in processes:
            try:
                process.wait(max(until_s - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _kill(self) -> None:
        for process in self._processes():
            process.kill()
        for process in self._processes():
            process.wait()

    def _processes(self) -> list[subprocess.Popen[bytes]]:
        """The last started first."""
        return [child.process for child in reversed(self._children.values())]


def _last_line(log: Path) -> str:
    lines = log.read_text("utf-8", "replace").strip().splitlines()
    return lines[-1][:300] if lines else "it said nothing"
