"""`python -m bench.api [--quick] [--json]`: what polling costs, how many can wait at once, how large a file may be.

One API process (`backstop api`), a Postgres and a Valkey of its own, all on this machine. Polls are an open loop, beside a bare
FastAPI route in rounds that take turns.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import aiohttp
import click
import httpx
from sqlalchemy import text

from bench import processes
from bench.people import until_ready
from bench.throughput import CONFIG, machine
from worker import keys
from worker.database import run
from worker.embedded.servers import running
from worker.intervene import cancel
from worker.job import ChatRequest, Lane
from worker.loop import new_event_loop
from worker.schema import upgrade
from worker.settings import Settings
from worker.submit import NewJob, submit
from worker.wiring import Connections, connections

RATE = 500  # requests per second
LINE = {"custom_id": "", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [{"role": "user", "content": ""}]}}


@dataclass(frozen=True, slots=True)
class Size:
    rounds: int
    round_s: float
    waiters: int
    lines: int
    line_bytes: int


FULL = Size(rounds=5, round_s=8, waiters=1_000, lines=50_000, line_bytes=2_100)
QUICK = Size(rounds=1, round_s=3, waiters=200, lines=5_000, line_bytes=2_100)


@click.command()
@click.option("--quick", is_flag=True, help="One short round and a small file, half a minute.")
@click.option("--json", "as_json", is_flag=True, help="The figures as JSON.")
def main(quick: bool, as_json: bool) -> None:
    """Polling, waiting and large files at one API process."""
    with tempfile.TemporaryDirectory(prefix="backstop-bench-") as name:
        place = Path(name)
        place.chmod(0o755)  # root's Postgres runs as nobody
        with running(place / "data") as servers:
            asyncio.run(upgrade(servers.database_url))
            (place / "backstop.toml").write_text(CONFIG.format(url="http://127.0.0.1:9/v1"))
            os.environ.update(
                DATABASE_URL=servers.database_url,
                REDIS_URL=servers.redis_url,
                BACKSTOP_DATA=str(place / "data"),
                BACKSTOP_CONFIG=str(place / "backstop.toml"),
            )
            figures = {"machine": machine(), **_measured(QUICK if quick else FULL, place)}
    click.echo(json.dumps(figures, indent=2) if as_json else table(figures))


def _measured(size: Size, place: Path) -> dict[str, Any]:
    with ExitStack() as stack:
        urls, pids = {}, {}
        for name, argv in (("api", ["-m", "worker", "api"]), ("bare", ["-m", "uvicorn", "bench.bare:app", "--no-access-log"])):
            port = _free_port()
            process = stack.enter_context(processes.running([*argv, "--port", str(port)], place / f"{name}.log", os.environ))
            urls[name], pids[name] = f"http://127.0.0.1:{port}", process.pid
        gc.disable()  # its pauses would be taken for those of the server
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            return runner.run(_all(size, place, urls, pids["api"]))


async def _all(size: Size, place: Path, urls: Mapping[str, str], pid: int) -> dict[str, Any]:
    async with connections(Settings()) as open_:
        key = (await keys.create(open_.db, name="bench")).secret
        async with httpx.AsyncClient() as plain:
            for url in urls.values():
                await until_ready(plain, url)
        # Not httpx, whose pool looks at each of a thousand connections for each request.
        async with aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {key}"}, connector=aiohttp.TCPConnector(limit=0), raise_for_status=True
        ) as http:
            polls = await _polls(size, open_, http, urls)
            waiting = await _waiting(size, open_, http, urls["api"], pid)
            return {"polls": polls, "waiting": waiting, "file": await _file(size, http, urls["api"], place, pid)}


async def _polls(size: Size, open_: Connections, http: aiohttp.ClientSession, urls: Mapping[str, str]) -> dict[str, Any]:
    job_id = (await _jobs(open_, 1))[0]
    await cancel(open_.db, job_ids=[job_id])
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in urls}
    for url in urls.values():
        await _round(http, f"{url}/v1/jobs/{job_id}", 2)  # warms up
    for number in range(size.rounds):
        _say(f"polls, round {number + 1} of {size.rounds}")
        for name, url in urls.items():
            took[name].append(await _round(http, f"{url}/v1/jobs/{job_id}", size.round_s))
    return {name: {"p50_ms": median(p50 for p50, _ in of), "p99_ms": median(p99 for _, p99 in of)} for name, of in took.items()}


async def _round(http: aiohttp.ClientSession, url: str, length_s: float) -> tuple[float, float]:
    """Median and 99th percentile in ms of requests that leave at RATE, whether or not earlier ones have been answered."""
    took: list[float] = []
    began_s = time.perf_counter()

    async def one(due_s: float) -> None:
        await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
        async with http.get(url) as answer:
            await answer.read()
        took.append((time.perf_counter() - due_s) * 1000)

    async with asyncio.TaskGroup() as requests:
        for n in range(int(RATE * length_s)):
            requests.create_task(one(began_s + n / RATE))
    return median(took), quantiles(took, n=100, method="inclusive")[98]


async def _waiting(size: Size, open_: Connections, http: aiohttp.ClientSession, url: str, pid: int) -> dict[str, Any]:
    """All wait for a job of their own at once; then all of these end in one statement."""
    _say(f"{size.waiters} wait at once")
    before_mb = processes.tree_rss_mb(pid)
    job_ids = await _jobs(open_, size.waiters)
    ended: list[float] = []

    async def wait(job_id: Any) -> str:
        async with http.get(f"{url}/v1/jobs/{job_id}?wait=60") as answer:
            state: str = (await answer.json())["state"]
        ended.append(time.perf_counter())
        return state

    waits = [asyncio.create_task(wait(job_id)) for job_id in job_ids]
    await asyncio.sleep(5)
    peak_mb, (held,) = processes.tree_rss_mb(pid), await run(open_.db, _CONNECTIONS)
    early, over_s = len(ended), time.perf_counter()
    await cancel(open_.db, job_ids=job_ids)
    states = await asyncio.gather(*waits)
    return {
        "waiters": size.waiters,
        "answered_early": early,
        "told_right": sum(state == "cancelled" for state in states),
        "last_told_ms": (max(ended) - over_s) * 1000,
        "postgres_connections": held.n,
        "rss_mb": [before_mb, peak_mb],
    }


async def _file(size: Size, http: aiohttp.ClientSession, url: str, place: Path, pid: int) -> dict[str, Any]:
    file = place / "lines.jsonl"
    with file.open("w") as out:
        out.writelines(_line(n, size.line_bytes) for n in range(size.lines))
    with file.open("rb") as content:
        went = hashlib.file_digest(content, "sha256").digest()
    _say(f"a file of {file.stat().st_size / 1e6:.0f} MB up and down")
    before_mb, began_s = processes.tree_rss_mb(pid), time.perf_counter()
    async with processes.peaks(lambda: processes.tree_rss_mb(pid), 0.1) as seen_mb:
        form = aiohttp.FormData({"purpose": "batch"})
        with file.open("rb") as content:
            form.add_field("file", content, filename=file.name)
            async with http.post(f"{url}/v1/files", data=form) as answer:
                file_id = (await answer.json())["id"]
        up_s = time.perf_counter() - began_s
        began_s, came = time.perf_counter(), hashlib.sha256()
        async with http.get(f"{url}/v1/files/{file_id}/content") as response:
            async for piece in response.content.iter_any():
                came.update(piece)
        down_s = time.perf_counter() - began_s
    return {
        "lines": size.lines,
        "mb": file.stat().st_size / 1e6,
        "whole": came.digest() == went,
        "up_s": up_s,
        "down_s": down_s,
        "rss_mb": [before_mb, max(seen_mb)],
    }


def _line(n: int, length: int) -> str:
    body = {"messages": [{"role": "user", "content": f"{n} ".ljust(length - 150, "x")}]}
    return json.dumps({**LINE, "custom_id": f"line-{n}", "body": body}) + "\n"


async def _jobs(open_: Connections, number: int) -> list[Any]:
    """Jobs that nobody works on: bulk ones wait for a dispatcher."""
    new = NewJob(request=ChatRequest([{"role": "user", "content": "hello"}]), lane=Lane.BULK, deadline_s=3_600)
    return [(await submit(open_.db, open_.publish, new)).job_id for _ in range(number)]


_CONNECTIONS = text("SELECT count(*) AS n FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()")


def table(figures: Mapping[str, Any]) -> str:
    """The figures as a person reads them."""
    return "\n".join([*(f"{key:<10} {value}" for key, value in figures["machine"].items()), "", *_lines(figures)])


def _lines(figures: Mapping[str, Any]) -> Iterator[str]:
    polls, waiting, file = figures["polls"], figures["waiting"], figures["file"]
    yield f"{f'GET a job, {RATE}/s':<34}{'median ms':>12}{'p99 ms':>10}"
    for name, title in (("bare", "a bare FastAPI route"), ("api", "GET /v1/jobs/{id}")):
        yield f"{title:<34}{polls[name]['p50_ms']:>12.1f}{polls[name]['p99_ms']:>10.1f}"
    added = [polls["api"][of] - polls["bare"][of] for of in ("p50_ms", "p99_ms")]
    yield f"{'added':<34}{added[0]:>12.1f}{added[1]:>10.1f}"
    yield ""
    yield (
        f"{waiting['waiters']:,} long polls at once: {waiting['told_right']:,} told right, {waiting['answered_early']} too early, the last "
        f"{waiting['last_told_ms']:,.0f} ms after their jobs ended in one statement; "
        f"{waiting['postgres_connections']} Postgres connections; {_grown(waiting['rss_mb'])}"
    )
    yield (
        f"file of {file['mb']:.0f} MB, {file['lines']:,} lines: up in {file['up_s']:.1f} s, down in {file['down_s']:.1f} s, "
        f"{'whole' if file['whole'] else 'NOT WHOLE'}; {_grown(file['rss_mb'])}"
    )


def _grown(rss_mb: Sequence[float]) -> str:
    return f"memory {rss_mb[0]:.0f} MB before, {rss_mb[1]:.0f} MB at most"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
