"""Commands that run until they are stopped: up, and each of its roles alone."""

from __future__ import annotations

import asyncio
import gc
import os
import secrets
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import click
import httpx
import uvicorn

from worker import keys, reads
from worker.cli.children import Children
from worker.cli.screen import say
from worker.cli.session import servers, with_ledger
from worker.config import load
from worker.embedded.attach import attached
from worker.errors import UsageError
from worker.events import configure
from worker.job import Lane
from worker.settings import Settings, read_settings
from worker.wiring import Connections

HOST = "127.0.0.1"
API_PORT = 8000
FLOWER_PORT = 5555
PORT = click.IntRange(1, 65_535)
CHECK_S = 0.25
SCRIPT = Path(__file__).parents[1] / "simulator" / "default.toml"


@click.command()
@click.option("--host", default=HOST, show_default=True, help="Where the API listens. Keys are always needed.")
@click.option("--port", type=PORT, default=API_PORT, show_default=True)
@click.option("--concurrency", type=click.IntRange(1, 10_000), help="Bulk jobs in flight at once (default 400).")
@click.option("--flower-port", type=PORT, default=FLOWER_PORT, show_default=True)
@click.option("--no-flower", is_flag=True, help="Without Flower.")
def up(host: str, port: int, concurrency: int | None, flower_port: int, no_flower: bool) -> None:
    """Servers (if none are given), migrations, workers, API, Flower; Ctrl-C stops them all.

    Once all are up, one that dies is started again; only one that dies again and again ends `up`.
    """
    settings = read_settings()
    checked = _checked(settings)
    _check_free(host, port, "--port")
    if not no_flower:
        _check_free(HOST, flower_port, "--flower-port")
    if concurrency:
        os.environ["BACKSTOP_BULK_SLOTS"] = str(concurrency)
    say(f"starting {'servers, ' if _embeds(settings) else ''}workers and API")
    with servers() as settings, Children(settings.data.absolute() / "logs", grace_s=settings.drain_s + 10) as children:
        key_file = first_key(settings.data)
        for lane in Lane:
            children.start(f"worker-{lane}", ["worker", "--lane", lane])
        children.start("api", ["api", "--host", host, "--port", str(port)])
        children.start("beat", ["beat"])
        ready = [f"http://{host}:{port}/readyz"]
        if not no_flower:
            login = _flower_login(settings.data)
            children.start("flower", ["flower", "--port", str(flower_port)])
            ready.append(f"http://{HOST}:{flower_port}/healthcheck")
        with_ledger(partial(until_up, children=children, ready=ready))
        say(f"API      http://{host}:{port}   key in {key_file}, documentation at /docs")
        if not no_flower:
            say(f"Flower   http://{HOST}:{flower_port}   login in {login}")
        say(f"workers  {', '.join(Lane)}; providers {', '.join(checked)}; logs in {settings.data / 'logs'}")
        say("Ctrl-C stops everything")
        try:
            while True:
                children.see_through()
                time.sleep(CHECK_S)
        except KeyboardInterrupt:  # how it is meant to end, so no error
            say(f"stopping; running calls have {settings.drain_s:.0f} s (Ctrl-C again: at once)")


@click.command()
@click.option("--lane", "lanes", multiple=True, type=click.Choice([lane.value for lane in Lane]), help="Only this one; default both.")
@click.option("--concurrency", type=click.IntRange(1, 10_000), help="Bulk jobs in flight at once (default 400).")
def worker(lanes: Sequence[str], concurrency: int | None) -> None:
    """One worker process. SIGTERM lets running calls finish, releases the rest and loses nothing."""
    _checked(read_settings())
    if concurrency:
        os.environ["BACKSTOP_BULK_SLOTS"] = str(concurrency)
    with servers() as settings:
        from worker.app import app, threads
        from worker.dispatch import queue_name

        chosen = [Lane(lane) for lane in lanes] or list(Lane)
        app.worker_main([
            "worker",
            f"--queues={','.join(queue_name(lane) for lane in chosen)}",
            f"--hostname={'-'.join(chosen)}-{os.getpid()}@%h",
            f"--concurrency={threads(read_settings(), chosen)}",
            f"--loglevel={settings.log_level}",
            "--without-gossip",
            "--without-mingle",
        ])  # fmt: skip


@click.command()
@click.option("--host", default=HOST, show_default=True)
@click.option("--port", type=PORT, default=API_PORT, show_default=True)
def api(host: str, port: int) -> None:
    """The REST API, for producers and for people who poll results."""
    _checked(read_settings(), with_keys=False)
    _check_free(host, port, "--port")
    with servers() as settings:
        first_key(settings.data)
        configure(settings)
        config = uvicorn.Config(
            "api.app:create_app", factory=True, host=host, port=port, log_config=None, access_log=False,
            server_header=False, timeout_graceful_shutdown=5,
        )  # fmt: skip
        config.load()
        gc.freeze()  # modules and routes stay: each full collection would go through them, a pause of 80 ms
        with suppress(KeyboardInterrupt):  # uvicorn has already stopped in good order
            uvicorn.Server(config).run()


@click.command()
def beat() -> None:
    """Celery beat, for slow housekeeping; one is enough."""
    with servers() as settings:
        from worker.app import app

        settings.data.mkdir(parents=True, exist_ok=True)  # its schedule goes there
        app.start(["beat", f"--loglevel={settings.log_level}", "--pidfile="])


@click.command()
@click.option("--port", type=PORT, default=FLOWER_PORT, show_default=True)
@click.option("--address", default=HOST, show_default=True, help="Where it listens.")
def flower(port: int, address: str) -> None:
    """Flower: workers, queues and tasks as they run. Read-only, behind a password."""
    settings = attached(read_settings())
    _check_free(address, port, "--port")
    assert settings.redis_url is not None
    os.environ.update(REDIS_URL=settings.redis_url, DATABASE_URL=settings.database_url or "")
    if "FLOWER_BASIC_AUTH" not in os.environ:
        os.environ["FLOWER_BASIC_AUTH"] = _flower_login(settings.data).read_text().strip()
    from worker.app import app

    app.start([
        "flower",
        f"--address={address}",
        f"--port={port}",
        "--read_only=True",
        "--max_tasks=20000",
        "--inspect_timeout=2000",
        "--purge_offline_workers=300",
    ])  # fmt: skip


@click.command()
@click.option("--host", default=HOST, show_default=True)
@click.option("--port", type=PORT, default=9090, show_default=True)
@click.option(
    "--script",
    "file",
    type=click.Path(path_type=Path),
    help="Faults (TOML); default: the providers of the shipped backstop.toml.",
)
@click.option("--bill", type=click.Path(path_type=Path), help="Append every request received to this file, as JSON lines.")
def simulate(host: str, port: int, file: Path | None, bill: Path | None) -> None:
    """OpenAI-compatible providers that fail as scripted and keep a bill: GET /bill."""
    from worker.simulator import script, server

    server.serve(script.load(file or SCRIPT), host, port, bill)


def first_key(data: Path) -> Path:
    """The file that holds the key of the first installation; made when there is none. Mode 0600."""
    file = data / "api-key"

    async def ensure(open_: Connections) -> None:
        if not file.exists() or await keys.verify(open_.db, file.read_text().strip()) is None:
            _write_secret(file, (await keys.create(open_.db, name="first")).secret)

    with_ledger(ensure)
    return file


def _flower_login(data: Path) -> Path:
    file = data / "flower-login"
    if not file.exists():
        _write_secret(file, f"backstop:{secrets.token_urlsafe(18)}")
    return file


def _write_secret(file: Path, secret: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
        out.write(secret + "\n")


def _checked(settings: Settings, *, with_keys: bool = True) -> list[str]:
    """Names of the providers of a configuration that can be used. Raises UsageError."""
    configured = load(settings.config)
    for name in configured.not_yet():
        say(f"note: {name} is read but has no effect in this version")
    for provider in configured.providers.values() if with_keys else ():
        provider.key()
    return list(configured.providers)


def _check_free(host: str, port: int, option: str) -> None:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise UsageError(f"port {port} on {host} cannot be used ({error.strerror}): choose another with {option}") from None


def _embeds(settings: Settings) -> bool:
    return not (settings.database_url and settings.redis_url)


async def until_up(open_: Connections, *, children: Children, ready: Sequence[str]) -> None:
    """These URLs answer 200 and every worker has registered. Raises BackstopError when one of them has ended instead."""
    ours = {pid for name, pid in children.pids().items() if name.startswith("worker-")}
    async with httpx.AsyncClient(timeout=2, trust_env=False) as http:
        while True:
            children.check()
            live = {worker.pid for worker in await reads.workers(open_.db) if worker.state == "live"}
            if ours <= live and all([await _answers(http, url) for url in ready]):
                return
            await asyncio.sleep(0.1)


async def _answers(http: httpx.AsyncClient, url: str) -> bool:
    try:
        return (await http.get(url)).status_code == 200
    except httpx.TransportError:
        return False
