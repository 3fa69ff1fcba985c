"""The embedded servers as the rest of Backstop sees them: two URLs that answer for as long as they are used."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import worker
from worker.embedded import home
from worker.embedded import minder as minding
from worker.embedded.minder import START_S, STOP_S, Server
from worker.embedded.postgres import Postgres
from worker.embedded.valkey import Valkey
from worker.errors import Unreachable, UsageError
from worker.settings import Settings

_LOOK_EVERY_S = 0.02


@dataclass(frozen=True)
class Endpoints:
    """Where the servers answer, passwords included; empty for one that was not wanted."""

    database_url: str
    redis_url: str


@contextmanager
def running(data: Path, *, want_postgres: bool = True, want_redis: bool = True, durable: bool = True) -> Iterator[Endpoints]:
    """Real Postgres 18 and Valkey 9 under `data` answer, until the last process that uses them leaves (or dies).

    Started when nobody uses them yet, else shared with who does. A server that dies is started again at the same URL.
    What they hold is kept for the next time. `durable` False trades safety from power cuts for speed, in tests.
    Raises UsageError (not installed, directory not writable, data of another user or version) or Unreachable (does not
    start; the message names the log).
    """
    data = data.absolute()
    with ExitStack() as stack:
        # Both start before either is waited for.
        valkey = stack.enter_context(_use(Valkey(data / Valkey.name, durable))) if want_redis else str
        postgres = stack.enter_context(_use(Postgres(data / Postgres.name, durable))) if want_postgres else str
        yield Endpoints(database_url=postgres(), redis_url=valkey())


@contextmanager
def provided(settings: Settings) -> Iterator[Settings]:
    """Settings whose `database_url` and `redis_url` are set: given ones as they are, else the embedded servers'.

    Says nothing on stdout. Raises as `running`.
    """
    want_postgres, want_redis = not settings.database_url, not settings.redis_url
    if not (want_postgres or want_redis):
        yield settings
        return
    with running(settings.data, want_postgres=want_postgres, want_redis=want_redis) as endpoints:
        yield settings.model_copy(
            update={
                "database_url": settings.database_url or endpoints.database_url,
                "redis_url": settings.redis_url or endpoints.redis_url,
            }
        )


def found(data: Path) -> Endpoints:
    """Where servers under `data` run now, empty for one that does not. Starts nothing."""
    postgres, valkey = (_published(data.absolute() / kind.name) for kind in (Postgres, Valkey))
    return Endpoints(database_url=postgres, redis_url=valkey)


def _published(place: Path) -> str:
    url = place / "url"
    return url.read_text() if home.is_held(place / "minder.lock") and url.exists() else ""


@contextmanager
def _use(server: Server) -> Iterator[Callable[[], str]]:
    """This process uses the server, which is at least starting. Yields what waits until it answers, for its URL."""
    _make_home(server)
    minder: subprocess.Popen[str] | None = None
    with ExitStack() as door:
        door.callback(os.close, _take(server, "door.lock"))
        users = _take(server, "users.lock", shared=True)
        try:
            _check_generation(server)
            minder = _start_minder(server)

            def url() -> str:
                nonlocal minder
                with door:
                    give_up_at = time.monotonic() + START_S
                    while not (answer := _url(server, minder)):
                        if time.monotonic() > give_up_at:
                            raise Unreachable(f"{server.title} does not start: see {server.home / 'log'}")
                        time.sleep(_LOOK_EVERY_S)
                        minder = minder or _start_minder(server)
                    return answer

            yield url
        finally:
            door.close()
            _leave(server, users, minder)


def _make_home(server: Server) -> None:
    data = server.home.parent
    try:
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
        server.home.mkdir(mode=0o700, exist_ok=True)
        owner = server.home.stat().st_uid
    except OSError as error:
        raise UsageError(f"{data} cannot hold data ({error.strerror}): set BACKSTOP_DATA, or {server.setting}") from None
    if owner != os.geteuid():
        raise UsageError(f"{server.home} belongs to user {owner}, you are {os.geteuid()}: be that user, or set BACKSTOP_DATA")


def _take(server: Server, name: str, *, shared: bool = False) -> int:
    try:
        lock = home.take(server.home / name, shared=shared, wait_s=START_S + STOP_S)
    except OSError as error:
        raise UsageError(f"{server.home / name}: {error.strerror}") from None
    if lock is None:
        raise Unreachable(f"another process has been starting or stopping {server.title} for too long: see {server.home / 'log'}")
    return lock


def _check_generation(server: Server) -> None:
    stamp, generation = server.home / "VERSION", server.generation()
    if not stamp.exists():
        home.write(stamp, generation)
    elif stamp.read_text() != generation:
        raise UsageError(
            f"{server.home} was written by {server.title} {stamp.read_text()}, installed is {generation}: "
            "install the backstop[local] it came from and dump it, or move the directory away"
        )


def _start_minder(server: Server) -> subprocess.Popen[str] | None:
    """None when another process has started it already."""
    lock = home.take(server.home / "minder.lock")
    if lock is None:
        return None
    try:
        (server.home / "url").unlink(missing_ok=True)  # of a minder that was killed
        durable = "durable" if server.durable else "fast"
        process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", minding.__name__, server.name, str(server.home), durable],
            cwd=server.home,  # nothing there that Python could import
            env=os.environ | {"PYTHONPATH": _python_path()},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # Ctrl-C is for us alone
            pass_fds=(lock,),
        )
        home.write_holder(lock, process.pid)
        return process
    finally:
        os.close(lock)


def _python_path() -> str:
    root, given = str(Path(worker.__file__).parent.parent), os.environ.get("PYTHONPATH")
    return os.pathsep.join([root, given] if given else [root])


def _url(server: Server, minder: subprocess.Popen[str] | None) -> str:
    """Where the server answers, empty as long as it does not. Raises a minder's reason when it has given up."""
    if minder is not None and minder.stdout is not None and not minder.stdout.closed:
        with minder.stdout as words:
            reason = words.read().strip()
        if reason:
            raise (UsageError if minder.wait() == UsageError.exit_code else Unreachable)(reason.splitlines()[-1])
    return _published(server.home)


def _leave(server: Server, users: int, minder: subprocess.Popen[str] | None) -> None:
    """We use the server no more. When nobody does, it has stopped."""
    try:
        if minder is not None and minder.stdout is not None:
            minder.stdout.close()
        if home.turn(users, shared=False):  # and stays so until the server is gone: who comes now waits for that
            _stop_minder(server, minder)
        elif minder is not None:
            minder.returncode = 0  # others use what it minds: not our child to wait for any more
    finally:
        os.close(users)


def _stop_minder(server: Server, ours: subprocess.Popen[str] | None) -> None:
    if ours is not None:
        ours.terminate()
        ours.wait()
    lock = server.home / "minder.lock"
    theirs = home.holder(lock)
    if theirs is not None:
        with suppress(ProcessLookupError):
            os.kill(theirs, signal.SIGTERM)
        gone = home.take(lock, wait_s=2 * STOP_S)
        if gone is not None:
            os.close(gone)
