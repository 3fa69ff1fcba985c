"""What must be right on this machine before jobs can run, and what is stuck in the ledger, looked at one by one.

Starts nothing, and changes nothing unless it is told to repair.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from redis.asyncio import Redis
from redis.exceptions import RedisError
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from worker import config, database, repair, schema, spool
from worker.embedded import postgres, servers, valkey
from worker.errors import BackstopError
from worker.settings import Settings

_PYTHONS = ((3, 11), (3, 15))  # from, up to but without; `requires-python` in pyproject.toml
_FREE_BYTES = 1_000_000_000
_CLOCK_S = 2.0  # leases and heartbeats are told apart by seconds
_PATIENCE_S = 5
_REPAIR = "run `backstop doctor --repair`"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `remedy` is empty where `ok`; `detail` holds no password and no key.

    `count`: how many rows of the ledger, or files, are not as they should be, `mended` those among them that now are.
    """

    name: str
    ok: bool
    detail: str
    remedy: str = ""
    count: int = 0
    mended: int = 0


async def examine(settings: Settings, *, mend: bool = False, again_s: float = repair.AGAIN_S) -> list[Finding]:
    """All findings, in the order they should be mended. Raises nothing for what is wrong: that is a finding.

    With `mend`, what is stuck in the ledger and can safely be put right has been. What stands there for less than `again_s` is
    not stuck.
    """
    running = await asyncio.to_thread(servers.found, settings.data)
    findings = [_python(), _data(settings.data)]
    if not settings.database_url:
        findings.append(_wheel("embedded Postgres", postgres.installed, "DATABASE_URL"))
    if not settings.redis_url:
        findings.append(_wheel("embedded Valkey", valkey.binary, "REDIS_URL"))
    findings += await _postgres(settings.database_url, running.database_url)
    findings += await _redis(settings.redis_url, running.redis_url)
    findings += _config(settings.config)
    if any(finding.name == "schema" and finding.ok for finding in findings):
        findings += await _ledger(settings.database_url or running.database_url, settings, mend, again_s)
    return findings


def _python() -> Finding:
    oldest, beyond = _PYTHONS
    ok = oldest <= sys.version_info[:2] < beyond
    remedy = "" if ok else f"use Python {oldest[0]}.{oldest[1]} to {beyond[0]}.{beyond[1] - 1}"
    return Finding("Python", ok, ".".join(map(str, sys.version_info[:3])), remedy)


def _data(data: Path) -> Finding:
    name, path = "data directory", data.absolute()
    nearest = next(place for place in (path, *path.parents) if place.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        return Finding(name, False, f"{nearest} cannot be written to", "set BACKSTOP_DATA to a directory that can")
    if path.exists() and path.stat().st_uid != os.geteuid():
        detail = f"{path} belongs to user {path.stat().st_uid}, you are {os.geteuid()}"
        return Finding(name, False, detail, "be that user, or set BACKSTOP_DATA")
    free = shutil.disk_usage(nearest).free
    detail = f"{path}, {free / 1e9:.1f} GB free"
    return Finding(name, free >= _FREE_BYTES, detail, "" if free >= _FREE_BYTES else "make room, or set BACKSTOP_DATA")


def _wheel(name: str, find: Callable[[], Path], setting: str) -> Finding:
    try:
        return Finding(name, True, f"installed in {find().parent}")
    except BackstopError as error:
        return Finding(name, False, str(error), f"pip install 'backstop[local]', or set {setting}")


async def _postgres(given: str | None, embedded: str) -> list[Finding]:
    url, remedy = given or embedded, "check DATABASE_URL and that the server runs"
    if not url:
        return [Finding("Postgres", True, "embedded, not running: it is started when it is needed")]
    try:
        engine = database.engine(url)
    except BackstopError as error:
        return [Finding("Postgres", False, str(error), "set it to postgresql://user:password@host:5432/name")]
    place = _place(given, engine.url.host, engine.url.port)
    try:
        async with engine.connect() as connection:
            asked_at = time.time()
            version, now = (await connection.execute(text("SELECT version(), clock_timestamp()"))).one()
            ahead_s = now.timestamp() - (asked_at + time.time()) / 2
        pending = await schema.pending(url)
    except DBAPIError as error:
        return [Finding("Postgres", False, f"{place}: {database.unreachable(error)}", remedy)]
    except BackstopError as error:
        return [Finding("Postgres", False, f"{place}: {error}", remedy)]
    finally:
        await engine.dispose()
    return [
        Finding("Postgres", True, f"{place} answers: {version.split(' on ')[0]}"),
        Finding("schema", pending is None, pending or "up to date", "run `backstop db upgrade`" if pending else ""),
        _clock("Postgres", ahead_s),
    ]


async def _redis(given: str | None, embedded: str) -> list[Finding]:
    url = given or embedded
    if not url:
        return [Finding("Redis", True, "embedded, not running: it is started when it is needed")]
    try:
        client = Redis.from_url(url, socket_connect_timeout=_PATIENCE_S, socket_timeout=_PATIENCE_S)
    except ValueError:
        detail = "REDIS_URL is not a URL that Redis clients understand"
        return [Finding("Redis", False, detail, "set it to redis://:password@host:6379/0")]
    target = client.connection_pool.connection_kwargs
    place = _place(given, target.get("host"), target.get("port"))
    try:
        async with client:
            asked_at = time.time()
            seconds, microseconds = await client.time()
            ahead_s = seconds + microseconds / 1e6 - (asked_at + time.time()) / 2
            about = await client.info()
    except (RedisError, OSError) as error:
        detail = f"{place} does not answer: {type(error).__name__}"
        return [Finding("Redis", False, detail, "check REDIS_URL and that the server runs")]
    return [
        Finding("Redis", True, f"{place} answers: {_redis_version(about)}"),
        _eviction(str(about.get("maxmemory_policy", "unknown"))),
        _clock("Redis", ahead_s),
    ]


def _redis_version(about: dict[str, object]) -> str:
    if "valkey_version" in about:
        return f"Valkey {about['valkey_version']}"
    return f"Redis {about.get('redis_version', 'of unknown version')}"


def _eviction(policy: str) -> Finding:
    ok = policy == "noeviction"
    remedy = "" if ok else "set maxmemory-policy noeviction, or a full Redis forgets messages and breakers"
    return Finding("Redis memory", ok, f"maxmemory-policy is {policy}", remedy)


def _clock(server: str, ahead_s: float) -> Finding:
    ok = abs(ahead_s) <= _CLOCK_S
    detail = f"{abs(ahead_s):.2f} s {'ahead of' if ahead_s > 0 else 'behind'} this machine"
    return Finding(f"clock of {server}", ok, detail, "" if ok else "keep both machines' time with NTP")


def _config(path: Path) -> Iterator[Finding]:
    try:
        loaded = config.load(path)
    except BackstopError as error:
        yield Finding("config", False, str(error), "mend it, then run `backstop config check`")
        return
    yield Finding("config", True, f"{path}: {len(loaded.providers)} providers, {len(loaded.chains)} chains")
    for name, provider in loaded.providers.items():
        try:
            detail = "needs none" if provider.key() is None else "set"
            yield Finding(f"key of {name}", True, detail)
        except BackstopError as error:
            yield Finding(f"key of {name}", False, str(error), "set it, or take the provider out of the config")


async def _ledger(url: str, settings: Settings, mend: bool, again_s: float) -> list[Finding]:
    engine, spooled = database.engine(url), spool.place(settings.data)
    try:
        found = await _spooled(engine, spooled, mend)  # first: a rescue would come between an answer and its job
        stuck = await repair.examine(engine, heartbeat_ttl_s=settings.heartbeat_ttl_s, repair=mend, again_s=again_s)
    except DBAPIError as error:
        return [Finding("ledger", False, str(database.unreachable(error)), "look at the load and the locks of Postgres")]
    finally:
        await engine.dispose()
    found += [*_refused(spooled), *(_stuck(one) for one in stuck)]
    return found or [Finding("ledger", True, "nothing is stuck")]


def _stuck(stuck: repair.Stuck) -> Finding:
    check = stuck.check
    detail = f"{check.words}: {stuck.count}, such as {stuck.example}"
    if stuck.mended:
        detail += f"; {stuck.mended} {check.then}"
    remedy = _REPAIR if check.mend else check.then
    return Finding(check.name, not stuck.left, detail, remedy if stuck.left else "", stuck.count, stuck.mended)


async def _spooled(engine: AsyncEngine, directory: Path, mend: bool) -> list[Finding]:
    name, waiting = "spooled answers", spool.found(directory)
    if not waiting:
        return []
    detail = f"files of answers in {directory} that Postgres has not taken: {len(waiting)}"
    if not mend:
        return [Finding(name, False, detail, "they are settled by the next worker that starts here, or " + _REPAIR, len(waiting))]
    try:
        settled = await spool.replay(engine, directory)
    except OSError as error:
        return [Finding(name, False, f"{detail}; {error.strerror}", "be the user that the workers run as", len(waiting))]
    return [Finding(name, True, f"{detail}; {settled} jobs settled with them", "", len(waiting), len(waiting))]


def _refused(directory: Path) -> list[Finding]:
    files = list(directory.glob("*.refused"))
    detail = f"files of answers in {directory} that can never be settled: {len(files)}"
    return [Finding("refused answers", False, detail, "read them, then remove them", len(files))] if files else []


def _place(given: str | None, host: str | None, port: object) -> str:
    """Which server this is. No more of its URL: a password may hide anywhere in one that is misspelt."""
    return f"{'given' if given else 'embedded'} server {host or 'on a socket'}{f':{port}' if port else ''}"
