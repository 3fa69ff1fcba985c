"""Who breaks things in a soak: a plan drawn from a seed, and the hands that carry it out.

A plan is a row of rounds. Into each round every deck deals one card at most: a fault of the workers, of Postgres, of Redis and of the
vendors may fall together, but nothing is broken twice at once. A round is over when all is mended and the jobs of the dead are free.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass

from crew import Crew
from lab import Lab
from redis.exceptions import RedisError
from sqlalchemy.exc import DBAPIError

TTL_S = 4.0  # a worker silent for so long is dead
FIRST_STRIKE_S = 1.5  # within so long from its beginning the strikes of a round fall
PAUSE_S = 0.4  # between blows of one strike

Deck = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Size:
    """Of a run: at least so many `jobs`, so many `workers` at a time, and how often each card is dealt in how many `rounds`."""

    jobs: int
    workers: int
    rounds: int
    decks: Mapping[str, Deck]


@dataclass(frozen=True, slots=True)
class Strike:
    """One fault, `after_s` from the beginning of its round, for `for_s`. `places`: workers that it befalls."""

    against: str
    fault: str
    after_s: float
    for_s: float
    places: tuple[int, ...]


FULL = Size(
    jobs=20_000,
    workers=4,
    rounds=40,
    decks={
        "workers": {
            "kill one worker": 10, "kill two workers": 8, "kill three workers": 5, "kill all workers": 2, "cut the power of all": 1,
            "freeze workers": 4, "bring a worker back from the dead": 2, "replace a worker": 3, "replace all workers": 2, "kill the API": 3,
        },
        "postgres": {
            "stop Postgres at once": 3, "kill Postgres": 3, "restart Postgres": 2, "kill Postgres for longer than the TTL": 2,
            "stop Postgres for longer than the TTL": 1, "end sessions of Postgres": 3, "reset the way to Postgres": 2,
            "silence the way to Postgres": 2,
        },
        "redis": {
            "flush Redis": 14, "flush Redis again and again": 3, "restart Redis": 3, "kill Redis": 2, "freeze Redis": 3,
            "cut clients of Redis off": 3, "silence the way to Redis": 2,
        },
        "vendors": {
            "errors of a vendor": 4, "a vendor hangs": 3, "a vendor drops connections": 3, "a vendor is full": 3, "all vendors are full": 1,
            "two vendors fail": 2,
        },
    },
)  # fmt: skip

SHORT = Size(
    jobs=1_500,
    workers=4,
    rounds=6,
    decks={
        "workers": {"kill one worker": 2, "kill two workers": 2, "bring a worker back from the dead": 1, "replace a worker": 1},
        "postgres": {"stop Postgres at once": 1, "kill Postgres for longer than the TTL": 1, "end sessions of Postgres": 1},
        "redis": {"flush Redis": 4, "restart Redis": 1, "cut clients of Redis off": 1},
        "vendors": {"errors of a vendor": 1, "a vendor hangs": 1, "a vendor is full": 1},
    },
)


def plan(seed: int, size: Size) -> list[list[Strike]]:
    """The rounds of a run: the same for the same seed."""
    rng = random.Random(seed)
    rounds: list[list[Strike]] = [[] for _ in range(size.rounds)]
    for against, deck in size.decks.items():
        cards = [fault for fault, times in deck.items() for _ in range(times)]
        rng.shuffle(cards)
        for place, fault in zip(rng.sample(range(size.rounds), len(cards)), cards, strict=True):
            few, most = FAULTS[fault].for_s
            many = FAULTS[fault].workers or rng.randint(1, size.workers // 2)
            places = rng.sample(range(size.workers), min(many, size.workers))
            rounds[place].append(Strike(against, fault, rng.uniform(0, FIRST_STRIKE_S), rng.uniform(few, most), tuple(places)))
    return rounds


class Nemesis:
    """Carries strikes out and mends what they broke."""

    def __init__(self, lab: Lab, crew: Crew) -> None:
        self.lab = lab
        self.crew = crew
        self._redis = asyncio.Lock()

    async def play(self, strikes: Sequence[Strike]) -> None:
        """One round, from the first strike until everything is mended."""
        async with asyncio.TaskGroup() as tasks:
            for strike in strikes:
                tasks.create_task(self._strike(strike))

    async def _strike(self, strike: Strike) -> None:
        await asyncio.sleep(strike.after_s)
        alone = self._redis if strike.against == "redis" else nullcontext()
        async with alone, self.lab.fault(strike.fault, against=strike.against, for_s=strike.for_s, places=strike.places):
            await FAULTS[strike.fault].befall(self, strike)

    # The workers and the API.

    async def kill(self, strike: Strike) -> None:
        await self.crew.kill(strike.places)

    async def cut_power(self, strike: Strike) -> None:
        """Everything is gone in the same moment."""

        async def servers() -> None:
            async with self._redis:
                self.lab.valkey.kill()
                await self._postgres_away(strike, self.lab.postgres.kill)
                await self.lab.valkey.start()

        await self.crew.kill(strike.places, beside=servers)

    async def freeze(self, strike: Strike) -> None:
        await self.crew.freeze(strike.places, strike.for_s)

    async def haunt(self, strike: Strike) -> None:
        await self.crew.haunt(strike.places)

    async def replace(self, strike: Strike) -> None:
        await self.crew.replace_politely(strike.places)

    async def kill_api(self, _: Strike) -> None:
        await self.crew.kill_api()

    # Postgres.

    async def stop_postgres(self, strike: Strike) -> None:
        await self._postgres_away(strike, lambda: self.lab.postgres.stop("immediate"))

    async def kill_postgres(self, strike: Strike) -> None:
        await self._postgres_away(strike, self.lab.postgres.kill)

    async def restart_postgres(self, strike: Strike) -> None:
        await self._postgres_away(strike, lambda: self.lab.postgres.stop("fast"))

    async def _postgres_away(self, strike: Strike, go: Callable[[], Awaitable[None] | None]) -> None:
        async with self.crew.ledger:
            if going := go():
                await going
            await asyncio.sleep(strike.for_s)
            await self.lab.postgres.start()
            self.lab.history.note("postgres restarted", away_s=strike.for_s)

    async def end_sessions(self, strike: Strike) -> None:
        """Every second one, once and again."""
        async with self.crew.ledger:
            for _ in range(int(strike.for_s / PAUSE_S)):
                with suppress(DBAPIError):
                    await self.lab.rows(_END_SESSIONS)
                await asyncio.sleep(PAUSE_S)

    async def reset_postgres(self, strike: Strike) -> None:
        for _ in range(int(strike.for_s / PAUSE_S)):
            self.lab.postgres.proxy.reset()
            await asyncio.sleep(PAUSE_S)

    async def silence_postgres(self, strike: Strike) -> None:
        self.lab.postgres.proxy.blackhole()
        await asyncio.sleep(strike.for_s)
        await self.lab.postgres.proxy.thaw()

    # Redis.

    async def flush(self, strike: Strike) -> None:
        """Once, or every `PAUSE_S` for as long as the strike takes."""
        for turn in range(1 + int(strike.for_s / PAUSE_S)):
            if turn:
                await asyncio.sleep(PAUSE_S)
            await self.lab.redis.flushall()
            self.lab.history.note("flushed")

    async def restart_redis(self, strike: Strike) -> None:
        await self.lab.valkey.stop()
        await asyncio.sleep(strike.for_s)
        await self.lab.valkey.start()

    async def kill_redis(self, strike: Strike) -> None:
        self.lab.valkey.kill()
        await asyncio.sleep(strike.for_s)
        await self.lab.valkey.start()

    async def freeze_redis(self, strike: Strike) -> None:
        self.lab.valkey.freeze()
        await asyncio.sleep(strike.for_s)
        self.lab.valkey.thaw()

    async def cut_off_clients(self, strike: Strike) -> None:
        for _ in range(int(strike.for_s / PAUSE_S)):
            for kind in ("normal", "pubsub"):
                with suppress(RedisError, OSError):
                    await self.lab.redis.execute_command("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")
            await asyncio.sleep(PAUSE_S)

    async def silence_redis(self, strike: Strike) -> None:
        self.lab.valkey.proxy.blackhole()
        await asyncio.sleep(strike.for_s)
        await self.lab.valkey.proxy.thaw()

    # The vendors. The last in the chain never fails altogether: a soak is to have load.

    async def vendor_errors(self, strike: Strike) -> None:
        await self._ill(strike, ["first"], kind="status", status=500)

    async def vendor_hangs(self, strike: Strike) -> None:
        await self._ill(strike, ["first"], kind="hang", seconds=6)

    async def vendor_drops(self, strike: Strike) -> None:
        await self._ill(strike, ["first"], kind="reset")

    async def vendor_full(self, strike: Strike) -> None:
        await self._ill(strike, ["first"], kind="status", status=429, retry_after_s=1)

    async def vendors_full(self, strike: Strike) -> None:
        await self._ill(strike, ["first", "second", "third"], kind="status", status=429, retry_after_s=1)

    async def two_vendors_fail(self, strike: Strike) -> None:
        await self._ill(strike, ["first", "second"], kind="status", status=503)

    async def _ill(self, strike: Strike, vendors: Sequence[str], **illness: object) -> None:
        for vendor in vendors:
            await self.lab.simulator.change(vendor, outages=[{"from_s": 0, **illness}])
        await asyncio.sleep(strike.for_s)
        for vendor in vendors:
            await self.lab.simulator.change(vendor, outages=[])


_END_SESSIONS = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND random() < 0.5
"""


@dataclass(frozen=True, slots=True)
class Fault:
    """`for_s`: how long it takes, from and to. `workers`: how many it befalls; 0: one, up to half of them."""

    befall: Callable[[Nemesis, Strike], Awaitable[None]]
    for_s: tuple[float, float] = (0, 0)
    workers: int = 0


_LONG_S = (TTL_S + 1, TTL_S + 2)

FAULTS: Mapping[str, Fault] = {
    "kill one worker": Fault(Nemesis.kill, workers=1),
    "kill two workers": Fault(Nemesis.kill, workers=2),
    "kill three workers": Fault(Nemesis.kill, workers=3),
    "kill all workers": Fault(Nemesis.kill, workers=100),
    "cut the power of all": Fault(Nemesis.cut_power, (0.5, 2), workers=100),
    "freeze workers": Fault(Nemesis.freeze, (0.3, TTL_S / 3)),
    "bring a worker back from the dead": Fault(Nemesis.haunt, workers=1),
    "replace a worker": Fault(Nemesis.replace, workers=1),
    "replace all workers": Fault(Nemesis.replace, workers=100),
    "kill the API": Fault(Nemesis.kill_api),
    "stop Postgres at once": Fault(Nemesis.stop_postgres, (0, 2)),
    "kill Postgres": Fault(Nemesis.kill_postgres, (0, 2)),
    "restart Postgres": Fault(Nemesis.restart_postgres, (0, 2)),
    "kill Postgres for longer than the TTL": Fault(Nemesis.kill_postgres, _LONG_S),
    "stop Postgres for longer than the TTL": Fault(Nemesis.stop_postgres, _LONG_S),
    "end sessions of Postgres": Fault(Nemesis.end_sessions, (0.8, 2.5)),
    "reset the way to Postgres": Fault(Nemesis.reset_postgres, (0.8, 2.5)),
    "silence the way to Postgres": Fault(Nemesis.silence_postgres, (0.5, TTL_S / 3)),
    "flush Redis": Fault(Nemesis.flush),
    "flush Redis again and again": Fault(Nemesis.flush, (1.3, 2.5)),
    "restart Redis": Fault(Nemesis.restart_redis, (0, 2)),
    "kill Redis": Fault(Nemesis.kill_redis, (0, 2)),
    "freeze Redis": Fault(Nemesis.freeze_redis, (0.5, 3)),
    "cut clients of Redis off": Fault(Nemesis.cut_off_clients, (0.8, 2.5)),
    "silence the way to Redis": Fault(Nemesis.silence_redis, (0.5, 3)),
    "errors of a vendor": Fault(Nemesis.vendor_errors, (2, 5)),
    "a vendor hangs": Fault(Nemesis.vendor_hangs, (2, 5)),
    "a vendor drops connections": Fault(Nemesis.vendor_drops, (2, 5)),
    "a vendor is full": Fault(Nemesis.vendor_full, (2, 5)),
    "all vendors are full": Fault(Nemesis.vendors_full, (1, 2)),
    "two vendors fail": Fault(Nemesis.two_vendors_fail, (2, 4)),
}
