"""The workers of a soak at their places, and its API: whoever is lost is replaced at once, as a supervisor would."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, Self
from uuid import UUID

import httpx
from fleet import Api, Worker
from lab import SAMPLE_S, Lab
from sqlalchemy.exc import DBAPIError

LOOK_S = 0.02
STARTS = 6
START_LOOK_S = 0.1  # a worker takes seconds to start, all of the machine's
BUSY_S = 5.0
_REGISTERED = "SELECT FROM workers WHERE pid = :pid AND state = 'live'"
_STILL_HELD = "SELECT FROM jobs WHERE worker_id = ANY(CAST(:ids AS uuid[])) AND state = 'running' LIMIT 1"


class Crew:
    """Inside `async with`: `size` live workers and an API.

    `hands` is held by who lays hands on workers, `ledger` by who breaks Postgres: what a dead worker held is noted while it stands.
    """

    def __init__(self, lab: Lab, size: int) -> None:
        self.lab = lab
        self.size = size
        self.workers: list[Worker] = []
        self.api: Api
        self.http: httpx.AsyncClient
        self.hands = asyncio.Lock()
        self.ledger = asyncio.Lock()
        self._numbers = count(1)
        self._clients: list[httpx.AsyncClient] = []

    async def __aenter__(self) -> Self:
        self.workers = list(await asyncio.gather(*(self._hired() for _ in range(self.size))))
        await self.open_api()
        return self

    async def __aexit__(self, *_: object) -> None:
        for client in self._clients:
            await client.aclose()

    async def kill(self, places: Sequence[int], *, beside: Callable[[], Awaitable[None]] | None = None) -> None:
        """SIGKILL at work, and `beside` in the same moment. Afterwards all places are taken and the jobs of the dead are free again.

        From that moment on they stand still, as the dead do. What they held is noted when Postgres stands, and then they are killed.
        """
        async with self.hands:
            victims = await self._standing(places)
            await self._at_work(victims)
            for victim in victims:
                victim.freeze()
            if beside:
                await beside()
            async with self.ledger:
                ids = [await victim.ids() for victim in victims]
                await asyncio.gather(*(victim.kill() for victim in victims))
            names = {victim.name: of for victim, of in zip(victims, ids, strict=True)}
            notes = [note for note in self.lab.history.events("killed") if note["worker"] in names]
            rescues = [self._rescued(note, names[note["worker"]]) for note in notes]
            await asyncio.gather(*rescues, *(self._replace(place) for place in places))

    async def freeze(self, places: Sequence[int], for_s: float) -> None:
        """SIGSTOP and SIGCONT: shorter than the TTL, nobody may notice."""
        async with self.hands:
            frozen = await self._standing(places)
            for worker in frozen:
                worker.freeze()
            await asyncio.sleep(for_s)
            for worker in frozen:
                worker.thaw()

    async def haunt(self, places: Sequence[int]) -> None:
        """Frozen until others held them dead, then thawed: a ghost with old claims, which is to take a new name."""
        async with self.hands:
            for worker in await self._standing(places):
                await self._at_work([worker])
                async with self.ledger:
                    await worker.freeze_until_dead()
                self.lab.history.note("haunted", worker=worker.name)
                worker.thaw()
                await worker.live()

    async def replace_politely(self, places: Iterable[int]) -> None:
        """One after the other: the new one is live, then SIGTERM, and the old one has drained. Raises AssertionError if it did not."""
        async with self.hands:
            for place in places:
                (old,) = await self._standing([place])
                await self._replace(place)
                old.terminate()
                code = await old.ended()
                self.lab.history.note("drained", worker=old.name, code=code)
                assert code == 0, f"worker {old.name} was to drain and ended with {code}: {old.last_words()}"

    async def open_api(self) -> None:
        """A live API, which everybody asks from now on. Without Postgres none comes up, and it is started again."""
        while True:
            try:
                self.api = await self.lab.api()
                break
            except DBAPIError:  # its key could not be made
                await asyncio.sleep(START_LOOK_S)
            except AssertionError as error:
                self.lab.history.note("did not start", worker="api", words=str(error)[-2000:])
        self.http = self.api.client()
        self._clients.append(self.http)

    async def kill_api(self) -> None:
        """SIGKILL; another takes its place at another port."""
        await self.api.gone()
        await self.open_api()

    async def look_after(self) -> None:
        """For ever: who fell is replaced, and what the API holds goes into the history. The lab notes it of workers and Redis."""
        while True:
            self.lab.history.note("sample", api_rss=_rss_bytes(self.api.process.pid))
            if not self.hands.locked():
                async with self.hands:
                    await self._standing(range(self.size))
            await asyncio.sleep(SAMPLE_S)

    async def _standing(self, places: Iterable[int]) -> list[Worker]:
        """The workers at these places. That one had ended although nobody touched it stands in the history, and another in its place."""
        places = list(places)
        for place in places:
            if not (worker := self.workers[place]).alive():
                self.lab.history.note("fell", worker=worker.name, code=await worker.ended(), words=worker.last_words()[-2000:])
                await self._replace(place)
        return [self.workers[place] for place in places]

    async def _hired(self) -> Worker:
        """Started again if Postgres goes away meanwhile. Raises AssertionError with its last words when that does not help."""
        for _ in range(STARTS):
            worker = await self.lab.worker(f"worker-{next(self._numbers)}")
            while worker.alive():
                if await self._found(_REGISTERED, pid=worker.pid):
                    return worker
                await asyncio.sleep(START_LOOK_S)
            self.lab.history.note("did not start", worker=worker.name, code=await worker.ended(), words=worker.last_words()[-2000:])
        raise AssertionError(f"no worker starts: {worker.last_words()}")

    async def _replace(self, place: int) -> None:
        self.workers[place] = await self._hired()

    async def _at_work(self, workers: Sequence[Worker]) -> None:
        """Each of them runs a job, unless there is none to be had for `BUSY_S`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(BUSY_S):
                for worker in workers:
                    while not await self._still_held(await self._ids(worker)):  # noqa: ASYNC110 - the event is another process's
                        await asyncio.sleep(LOOK_S)

    async def _ids(self, worker: Worker) -> list[UUID]:
        try:
            return await worker.ids()
        except DBAPIError:
            return []

    async def _rescued(self, death: Mapping[str, Any], ids: list[UUID]) -> None:
        """The history says how long after its death the jobs it held were free again."""
        while await self._still_held(ids):  # noqa: ASYNC110 - as above
            await asyncio.sleep(LOOK_S)
        took_s = time.time() - death["wall_s"]
        self.lab.history.note("rescued", worker=death["worker"], died_s=death["wall_s"], took_s=took_s, held=len(death["held"]))

    async def _still_held(self, ids: list[UUID]) -> bool:
        return await self._found(_STILL_HELD, ids=ids, otherwise=True)

    async def _found(self, sql: str, *, otherwise: bool = False, **values: Any) -> bool:
        """Whether the query has rows; `otherwise` while Postgres is away."""
        try:
            return bool(await self.lab.rows(sql, **values))
        except DBAPIError:
            return otherwise


def _rss_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
    except OSError:
        return 0
