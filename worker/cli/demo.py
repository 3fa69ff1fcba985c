"""`backstop demo`: the main job on simulated providers, checked against the simulator's own bill."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import astuple, dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import click
import httpx

from worker import reads, template, tickets
from worker.cli.books import Books, compare
from worker.cli.children import Children
from worker.cli.look import batch_now, export
from worker.cli.produce import load_batch, rows_of
from worker.cli.roles import first_key, until_up
from worker.cli.screen import json_option, money, progress, say, show_json, show_table
from worker.cli.session import servers, with_ledger
from worker.config import load
from worker.embedded.servers import found
from worker.errors import BackstopError, UsageError
from worker.job import ChatRequest
from worker.settings import Settings, read_settings
from worker.submit import open_batch
from worker.views import BatchView, Failover
from worker.wiring import Connections

ROOT = Path(__file__).parents[2]
TICKETS = os.path.relpath(ROOT / "examples" / "tickets.csv")
TEMPLATE = ROOT / "examples" / "triage.toml"
CONFIG = ROOT / "backstop.toml"
IN_FLIGHT = 8
DOWN_AT, UP_AT = 0.15, 0.35  # shares of the tickets after which the first provider goes down, and is back


@dataclass(frozen=True, slots=True)
class Stage:
    """Where the demo plays."""

    data: Path
    simulator: str
    api: str
    key: str


@click.command()
@json_option
def demo(as_json: bool) -> None:
    """240 tickets through three simulated providers, one of which goes down for a while; then results, bill and books."""
    began_s = time.monotonic()
    data = read_settings().data.absolute() / "demo"
    simulator, api = _free_port(), _free_port()
    _set_scene(data, simulator)
    with servers() as settings, Children(data / "logs", grace_s=20) as children:
        stage = Stage(data, f"http://127.0.0.1:{simulator}", f"http://127.0.0.1:{api}", first_key(data).read_text().strip())
        children.start("simulator", ["simulate", "--port", str(simulator)])
        children.start("worker-interactive", ["worker", "--lane", "interactive"])
        children.start("worker-bulk", ["worker", "--lane", "bulk"])
        children.start("api", ["api", "--port", str(api)])
        report = with_ledger(lambda open_: _play(open_, settings, stage, children))
    report["seconds"] = round(time.monotonic() - began_s, 1)
    show_json(report) if as_json else _tell(report)
    if report["faults"]:
        raise BackstopError("the demo does not hold:\n  " + "\n  ".join(report["faults"]))


def _set_scene(data: Path, simulator_port: int) -> None:
    if any(astuple(found(data))):
        raise UsageError(f"another demo runs under {os.path.relpath(data)}: wait for it, or set BACKSTOP_DATA")
    shutil.rmtree(data, ignore_errors=True)  # nothing of an earlier run, whole or broken off, is in the books of this one
    data.mkdir(parents=True)
    for name in ("DATABASE_URL", "REDIS_URL", "BACKSTOP_DATABASE_URL", "BACKSTOP_REDIS_URL"):
        os.environ.pop(name, None)
    config = data / "backstop.toml"
    config.write_text(CONFIG.read_text("utf-8").replace("127.0.0.1:9090", f"127.0.0.1:{simulator_port}"), "utf-8")
    os.environ.update(BACKSTOP_DATA=str(data), BACKSTOP_CONFIG=str(config), BACKSTOP_BULK_SLOTS=str(IN_FLIGHT), BACKSTOP_PACK_SIZE="4")


async def _play(open_: Connections, settings: Settings, stage: Stage, children: Children) -> dict[str, Any]:
    say("starting Postgres, Valkey, the simulated providers, two workers and the API")
    await until_up(open_, children=children, ready=[f"{stage.simulator}/livez", f"{stage.api}/readyz"])
    async with httpx.AsyncClient(timeout=30, trust_env=False) as http:
        began = datetime.now(UTC)
        batch = await _enqueue(open_, settings)
        say("a person asks over REST in the meantime; and the first provider goes down for a while")
        asked = asyncio.create_task(_ask_over_rest(http, stage))
        view = await _watch(open_, http, stage, batch, children.check)
        rest_ms = await asked
        statuses = await open_.gates.status(list(load(settings.config).providers))
        books = await compare(open_.db, http, stage.simulator, began)
    results = stage.data / "results.csv"
    await export(open_, view, results, "csv")
    failover = await reads.failover(open_.db, view.id)
    return {
        "batch": view,
        "results": results,
        "fallbacks": await _fallbacks(open_, view),
        "failover": failover,
        "interactive_ms": rest_ms,
        "breakers": {status.provider: {"state": status.state, "opened": status.opened_times} for status in statuses},
        "bill": books.providers,
        "faults": [*_unanswered(view), *books.faults, *_unfailing(failover)],
    }


async def _enqueue(open_: Connections, settings: Settings) -> BatchView:
    asking = template.load(TEMPLATE)
    with tickets.open_tickets(TICKETS) as source:
        rows = rows_of(source, asking, load(settings.config), "default", "id")
        name = f"demo-{datetime.now(UTC):%Y%m%d-%H%M%S}"
        batch = await open_batch(open_.db, name, fingerprint=[name], columns=source.columns, fields=asking.fields)
        await load_batch(open_, batch, rows, source)
        return await batch_now(open_.db, batch.id)


async def _watch(open_: Connections, http: httpx.AsyncClient, stage: Stage, batch: BatchView, check: Callable[[], None]) -> BatchView:
    """Until every ticket has ended; the first provider is taken down and brought back on the way."""
    pending = [(DOWN_AT, [{"from_s": 0, "kind": "reset"}], "swift is down"), (UP_AT, [], "swift is back")]
    with progress("answering ") as bar:
        task = bar.add_task("", total=batch.total, note="")
        while True:
            view = await batch_now(open_.db, batch.id)
            ended = view.total - view.unfinished
            if pending and ended >= pending[0][0] * view.total:
                _, outages, note = pending.pop(0)
                await http.post(f"{stage.simulator}/swift/script", json={"outages": outages})
                bar.update(task, note=note)
            bar.update(task, completed=ended)
            if view.state == "finished":
                return view
            check()
            await asyncio.sleep(0.1)


async def _ask_over_rest(http: httpx.AsyncClient, stage: Stage) -> float:
    """How long one interactive job takes while all the tickets are being worked off, in milliseconds."""
    await asyncio.sleep(1)
    request = ChatRequest([{"role": "user", "content": "Is the service up?"}])
    began_s = time.monotonic()
    answer = await http.post(
        f"{stage.api}/v1/jobs?wait=20", json={"messages": request.messages}, headers={"Authorization": f"Bearer {stage.key}"}
    )
    if answer.status_code != 200 or answer.json()["state"] != "succeeded":
        raise BackstopError(f"the interactive job was not answered: HTTP {answer.status_code}")
    return round((time.monotonic() - began_s) * 1000, 1)


async def _fallbacks(open_: Connections, view: BatchView) -> dict[str, int]:
    """How many tickets each provider answered."""
    answered: Counter[str] = Counter()
    after = 0
    while page := await reads.batch_results(open_.db, view.id, after):
        answered.update(row.answer.provider for row in page if row.answer)
        after = page[-1].ordinal or 0
    return dict(answered)


def _unanswered(view: BatchView) -> list[str]:
    return [] if view.succeeded == view.total else [f"{view.total - view.succeeded} of {view.total} tickets are unanswered"]


def _unfailing(failover: Failover) -> list[str]:
    if failover.switches == 0:
        return ["no job ever changed its provider, although one was down"]
    return []


def _tell(report: dict[str, Any]) -> None:
    view, failover = report["batch"], report["failover"]
    books: dict[str, Books] = report["bill"]
    answered, breakers = report["fallbacks"], report["breakers"]
    by_fallback = view.succeeded - answered.get(next(iter(breakers)), 0)
    click.echo(f"\n{view.succeeded} of {view.total} tickets answered ({by_fallback} by a fallback), {view.failed} failed\n")
    show_table(
        ("provider", "tickets", "breaker opened", "requests billed", "on our books", "USD billed", "on our books", "cost unknown"),
        (
            (name, answered.get(name, 0), breakers[name]["opened"], book.billed_requests, book.booked_requests,
             money(book.billed_usd), money(book.booked_usd), f"{book.unknown_calls} calls")
            for name, book in books.items()
        ),
    )  # fmt: skip
    click.echo()
    total = sum((book.booked_usd for book in books.values()), Decimal(0))
    unknown = sum(book.unknown_calls for book in books.values())
    for name, words in {
        "books": f"{money(total)} USD, and {unknown} calls whose cost we cannot know; each request is on both sides, once",
        "failover": f"{failover.switches} times to the next provider, median {failover.p50_ms:.0f} ms, worst {failover.max_ms:.0f} ms",
        "a person's job": f"answered over REST in {report['interactive_ms']:.0f} ms beside the tickets, provider's time included",
        "time": f"{report['seconds']} s, start and stop of all servers included",
        "results": os.path.relpath(report["results"]),
        "next": "after `. .venv/bin/activate`: `backstop simulate` in one terminal, `backstop up` in another, in a third:",
        "": "backstop enqueue examples/tickets.csv --prompt examples/triage.toml --batch first --wait --out out.csv",
    }.items():
        click.echo(f"{name:<15} {words}")


def _free_port() -> int:
    """A port of 127.0.0.1 that nobody uses, below those the kernel gives to clients: one would have it before its server starts."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
