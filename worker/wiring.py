"""Builds what a process needs from its settings: the only place that knows how the parts fit together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from uuid import UUID

import httpx
import structlog
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from worker import spool
from worker.attempt import Attempts
from worker.calls import open_calls
from worker.chain import Chain
from worker.config import Config, load
from worker.cost import Pricing
from worker.database import engine
from worker.deliver import deliver
from worker.dispatch import Publish
from worker.embedded.attach import attached
from worker.errors import UsageError
from worker.grouping import Group
from worker.intake import tend
from worker.intervene import cancel
from worker.job import Lane
from worker.keeper import Keeper
from worker.loop import cancel_surely
from worker.providers.anthropic import AnthropicMessages
from worker.providers.http import client
from worker.providers.openai import OpenAICompatible
from worker.resilience.cache import AnswerCache
from worker.resilience.gate import Gates, Limits
from worker.settings import Settings
from worker.slots import Slots
from worker.step import Station, Steps
from worker.transport import Bell
from worker.waiting import announce

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Connections:
    """What producers and readers need: API and CLI."""

    db: AsyncEngine
    redis: Redis
    gates: Gates
    publish: Publish


def redis_client(url: str) -> Redis:
    """A client that answers or fails fast, and never tries again by itself. Raises UsageError."""
    try:
        return Redis.from_url(url, socket_timeout=2, socket_connect_timeout=1, retry=Retry(NoBackoff(), 0))
    except ValueError:
        raise UsageError("REDIS_URL is no URL of a Redis: expected redis://:password@host:6379/0") from None


@asynccontextmanager
async def connections(settings: Settings, config: Config | None = None, fleet: Callable[[], int] = lambda: 1) -> AsyncIterator[Connections]:
    """Open for one event loop. Raises UsageError or Unreachable when the URLs are unusable; connects on first use.

    `config` names the limits of the providers. `fleet`: how many workers share them, for when Redis is away.
    """
    settings = attached(settings)
    assert settings.database_url is not None
    assert settings.redis_url is not None
    db, redis = engine(settings.database_url), redis_client(settings.redis_url)
    gate_redis, bell = redis_client(settings.redis_url), Bell(settings.redis_url)
    gates = Gates(gate_redis, limits(config) if config else {}, fleet=fleet)
    try:
        yield Connections(db, redis, gates, bell.publish)
    finally:
        bell.close()
        await gates.aclose()
        await gate_redis.aclose()
        await redis.aclose()
        await db.dispose()


def limits(config: Config) -> dict[str, Limits]:
    return {n: Limits(rpm=p.rpm, tpm=p.tpm, concurrency=p.max_concurrency) for n, p in config.providers.items()}


def stations(config: Config, http: httpx.AsyncClient) -> dict[str, Station]:
    """Every configured provider, ready to be asked. Raises UsageError naming the variable of a missing key, or what lacks a price."""
    for lack in unpriced(config):
        raise UsageError(lack)
    dialects: Mapping[str, type[OpenAICompatible] | type[AnthropicMessages]] = {"openai": OpenAICompatible, "anthropic": AnthropicMessages}
    return {
        name: Station(
            provider=dialects[provider.dialect](name, provider, http, key=provider.key()),
            config=provider,
            pricing=Pricing.of(provider),
        )
        for name, provider in config.providers.items()
    }


def unpriced(config: Config) -> list[str]:
    """Providers without a price in chains that keep to a share of the spend, a line each."""
    return [
        f'chains.{name}: strategy = "hedge" keeps to a share of the spend, so providers.{provider}.price is needed: none is listed'
        for name, chain in config.chains.items()
        if chain.strategy == "hedge"
        for provider in chain.providers
        if Pricing.of(config.providers[provider]).source is None
    ]


class WorkerProcess:
    """All that lives on the loop of one worker process."""

    def __init__(self, settings: Settings, keeper: Keeper, attempts: Attempts, db: AsyncEngine, open_: AsyncExitStack, leads: bool) -> None:
        self._settings = settings
        self._keeper = keeper
        self.attempts = attempts
        self._db = db
        self._open = open_
        self._loops = [asyncio.create_task(keeper.beat(attempts)), *([asyncio.create_task(keeper.lead())] if leads else [])]

    @classmethod
    async def open(cls, settings: Settings, lanes: Collection[Lane], *, leads: bool = True) -> WorkerProcess:
        """Registered in the ledger, its heart beating. `leads`: whether it may become the leader.

        Raises UsageError for a faulty configuration, DBAPIError without Postgres.
        """
        settings = attached(settings)
        config = load(settings.config)
        for name in config.not_yet():
            log.warning("setting_without_effect", setting=name)
        open_ = AsyncExitStack()
        fleet: Callable[[], int] = lambda: keeper.fleet()  # noqa: E731 - of the keeper, which is made of these connections
        shared = await open_.enter_async_context(connections(settings, config, fleet))
        assert settings.database_url is not None
        keeper_db = engine(settings.database_url, pooled=False)
        open_.push_async_callback(keeper_db.dispose)
        http = client(most_connections=settings.bulk_slots + settings.interactive_slots)
        open_.push_async_callback(http.aclose)
        duties = [partial(tend, shared.db, config)] * 2  # two, so that a large file holds up nobody
        duties.append(partial(deliver, shared.db, private=settings.webhooks_private))
        keeper = Keeper(keeper_db, shared.redis, shared.publish, settings, lanes, duties)
        steps = Steps(shared.gates, Group(partial(open_calls, shared.db)), keeper.may_call)
        chain = Chain(stations(config, http), steps, AnswerCache(shared.redis))
        attempts = Attempts(
            shared.db,
            config,
            chain,
            worker_id=lambda: keeper.worker_id,
            fresh=keeper.fresh,
            seems_closed=shared.gates.seems_closed,
            announce=_announcer(shared.redis),
            slots={Lane.BULK: Slots(settings.bulk_slots), Lane.INTERACTIVE: Slots(settings.interactive_slots)},
        )
        await spool.replay(shared.db, spool.place(settings.data))
        await keeper.register()
        return cls(settings, keeper, attempts, shared.db, open_, leads)

    async def drain(self) -> None:
        """No new claims; running calls had `drain_s` to finish, the others were released; then everything is closed."""
        left = await self.attempts.drain(self._settings.drain_s)
        if left:
            log.warning("spooled", endings=len(left), file=str(spool.write(spool.place(self._settings.data), left)))
        await cancel_surely(self._loops)
        with suppress(DBAPIError):  # Postgres is away: its jobs are rescued when the heartbeat is old
            await self._keeper.retire()
        await self._open.aclose()

    async def cancel_delivery(self, delivery_id: UUID) -> None:
        await cancel(self._db, delivery_id=delivery_id)

    async def tidy(self) -> int:
        async with self._db.connect() as connection:
            return (await connection.execute(_TIDY)).rowcount


def _announcer(redis: Redis) -> Callable[[Sequence[UUID]], Awaitable[None]]:
    return partial(announce, redis)


_TIDY = text("""
DELETE FROM workers w WHERE w.state IN ('gone', 'dead') AND w.seen_at < now() - interval '1 day'
    AND NOT EXISTS (SELECT FROM jobs j WHERE j.worker_id = w.id AND j.state = 'running')
""")
