"""Processes of a benchmark: started, measured through /proc (Linux), and always stopped, by their ids."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_PAGE_MB = os.sysconf("SC_PAGE_SIZE") / 2**20


@contextmanager
def running(arguments: Sequence[str], log: Path, env: Mapping[str, str], *, grace_s: float = 20) -> Iterator[subprocess.Popen[bytes]]:
    """`python ARGUMENTS` runs, its words in `log`; afterwards it was asked to stop, and made to after `grace_s`."""
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, *arguments], env=dict(env), stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(grace_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # a session of its own: its children only
            process.wait()


@contextmanager
def stub(env: Mapping[str, str]) -> Iterator[str]:
    """A base URL where `bench.stub` answers."""
    argv = [sys.executable, "-m", "bench.stub"]
    with subprocess.Popen(argv, env=dict(env), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
        finally:
            process.stdin.close()
            process.wait(10)


def family(pid: int) -> dict[int, float]:
    """The process and its descendants, with the CPU seconds of each: user and system, and those of children that ended."""
    parents: dict[int, list[int]] = {}
    spent: dict[int, float] = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            fields = (place / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue  # it has just ended
        parents.setdefault(int(fields[1]), []).append(int(place.name))
        spent[int(place.name)] = sum(map(int, fields[11:15])) * _TICK_S
    found, unseen = {}, [pid]
    while unseen:
        one = unseen.pop()
        found[one] = spent.get(one, 0.0)
        unseen += parents.get(one, [])
    return found


def cpu_s(pid: int) -> float:
    """CPU seconds of a process and its descendants."""
    return sum(family(pid).values())


@asynccontextmanager
async def peaks(look: Callable[[], float], every_s: float) -> AsyncIterator[list[float]]:
    """What `look` has seen since the beginning, looked at every so often in a thread."""
    seen = [look()]

    async def watch() -> None:
        while True:
            await asyncio.sleep(every_s)
            seen.append(await asyncio.to_thread(look))

    watching = asyncio.create_task(watch())
    try:
        yield seen
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


def tree_rss_mb(pid: int) -> float:
    """Resident memory of a process and its descendants, pages they share counted in each."""
    return sum(map(rss_mb, family(pid)))


def rss_mb(pid: int) -> float:
    """Resident memory of one process; 0 when it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_MB
    except OSError:
        return 0.0


def wait_until(done: Callable[[], bool], *, limit_s: float, what: str, every_s: float = 0.05) -> None:
    """Returns when `done()` is true; raises TimeoutError naming `what` after `limit_s`."""
    give_up_s = time.monotonic() + limit_s
    while not done():
        if time.monotonic() > give_up_s:
            raise TimeoutError(f"{what}: not within {limit_s:.0f} s")
        time.sleep(every_s)
