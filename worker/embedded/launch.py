"""How a server's process is started: as a child that ends with its parent."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_PR_SET_PDEATHSIG = 1
# Nothing of the caller's surroundings (PGDATA, PGOPTIONS, locales, keys of providers) reaches a server.
_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}


@dataclass(frozen=True)
class Account:
    """Who a process runs as. None: as ourselves."""

    user: int
    group: int


@dataclass(frozen=True)
class Launch:
    argv: list[str]
    account: Account | None = None
    stdin: bytes = b""


def start(launch: Launch, *, directory: Path, log: IO[bytes], lock: int, stop: signal.Signals) -> subprocess.Popen[bytes]:
    """The running process, in `directory`, with `lock` inherited.

    Call it from the main thread: the kernel ends the child with the thread that forked it.
    """
    user, group, groups = _identity(launch.account)
    process = subprocess.Popen(  # noqa: S603 - nothing in argv comes from a user
        launch.argv,
        cwd=directory,
        env=_ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=log,
        start_new_session=True,
        pass_fds=(lock,),
        user=user,
        group=group,
        extra_groups=groups,
        preexec_fn=end_with_parent(stop) if sys.platform == "linux" else None,
    )
    assert process.stdin is not None
    with suppress(BrokenPipeError), process.stdin:  # it ended before it read: its exit code and log say why
        process.stdin.write(launch.stdin)
    return process


def run(argv: list[str], *, directory: Path, account: Account | None, stdin: IO[bytes]) -> str | None:
    """None when the command succeeded, else what it wrote to stderr."""
    user, group, groups = _identity(account)
    done = subprocess.run(  # noqa: S603
        argv,
        cwd=directory,
        env=_ENVIRONMENT,
        stdin=stdin,
        capture_output=True,
        check=False,
        user=user,
        group=group,
        extra_groups=groups,
    )
    return done.stderr.decode(errors="replace") if done.returncode else None


def _identity(account: Account | None) -> tuple[int | None, int | None, list[int] | None]:
    return (account.user, account.group, []) if account else (None, None, None)


def end_with_parent(stop: signal.Signals) -> Callable[[], None]:
    """For `preexec_fn` on Linux: the kernel sends the child `stop` when the thread that forked it is gone."""
    parent, prctl = os.getpid(), ctypes.CDLL(None).prctl

    def ask_the_kernel() -> None:
        prctl(_PR_SET_PDEATHSIG, int(stop))
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)

    return ask_the_kernel
