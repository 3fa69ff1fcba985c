"""Those for whom it all is done: batches that never let the queue run dry, people who ask over HTTP, and people who change their minds."""

from __future__ import annotations

import asyncio
import json
import random
import time
from typing import Any
from uuid import UUID, uuid4

import httpx
from crew import Crew
from fleet import start
from lab import DEADLINE_S, Lab
from sqlalchemy.exc import DBAPIError

from worker import intervene

AGAIN_S = 0.3
LOOK_S = 0.2
FULL_ROWS = 400  # a backlog that is not added to
BATCH_ROWS = (50, 250)
FILE_ROWS = 200
BAD_ROW_EACH = 20
WAIT_S = 5
ASKERS = 3
CHANGE_S = (0.2, 1.0)


class Crowd:
    """What it was told goes into the history. `calm` is set by whoever breaks nothing more."""

    def __init__(self, lab: Lab, crew: Crew, seed: int, *, stops_s: float) -> None:
        self.lab = lab
        self.crew = crew
        self.accepted = 0
        self._rng = random.Random(seed)
        self.calm = asyncio.Event()
        self._stops_s = stops_s
        self._over = asyncio.Event()

    async def work(self, jobs: int) -> None:
        """Keeps the fleet busy until all is calm and so many jobs were accepted, or the time is up; then all have gone home."""
        async with asyncio.TaskGroup() as tasks:
            for number in range(ASKERS):
                tasks.create_task(self._asks(f"person {number}"))
            tasks.create_task(self._changes_minds())
            for number in (1, 2):
                tasks.create_task(self._hands_in_a_file(f"file {number}", when=jobs * number // 3))
            await self._load(jobs)
            self._over.set()

    async def _load(self, jobs: int) -> None:
        """A batch whenever little is left to do."""
        while not (self.calm.is_set() and (self.accepted >= jobs or time.monotonic() > self._stops_s)):
            if await self._waiting() < FULL_ROWS:
                _, ids = await self.lab.submit_batch(self._rng.randint(*BATCH_ROWS))
                self.accepted += len(ids)
            else:
                await asyncio.sleep(LOOK_S)

    async def _waiting(self) -> int:
        try:
            (row,) = await self.lab.rows("SELECT count(*) AS n FROM jobs WHERE state IN ('queued', 'running')")
        except DBAPIError:
            return FULL_ROWS
        return int(row.n)

    async def _asks(self, name: str) -> None:
        """One question after the other over HTTP, each until its answer is here."""
        number = 0
        while not self._over.is_set():
            number += 1
            body = {"messages": [{"role": "user", "content": f"{name} asks {number}"}], "deadline_s": DEADLINE_S}
            reply = await self._surely("POST", "/v1/jobs", json=body, headers={"Idempotency-Key": str(uuid4())})
            job_id = reply.json()["id"]
            self.lab.history.note("accepted", job_ids=[job_id])
            self.accepted += 1
            while not (job := reply.json())["finished_at"]:
                reply = await self._surely("GET", f"/v1/jobs/{job_id}", params={"wait": WAIT_S})
            self.lab.history.note("told", job_id=job_id, state=job["state"], answered=job["result"] is not None)

    async def _surely(self, method: str, path: str, **how: Any) -> httpx.Response:
        """What the API answers, once it does: who is refused, or cut off, asks again. What no API may answer goes into the history."""
        while True:
            try:
                reply = await self.crew.http.request(method, path, **how)
            except httpx.TransportError:
                reply = None
            if reply is not None and reply.is_success:
                return reply
            if reply is not None and reply.status_code != 503:
                self.lab.history.note("odd reply", status=reply.status_code, asked=f"{method} {path}")
            await asyncio.sleep(AGAIN_S)

    async def _changes_minds(self) -> None:
        """Now and then somebody does not want a job any more: of those that run, mostly."""
        while not self._over.is_set():
            await asyncio.sleep(self._rng.uniform(*CHANGE_S))
            state = self._rng.choice(["running", "running", "queued"])
            try:
                found = await self.lab.rows(_SOME, state=state)
                for row in found:
                    await (self._cancel_over_http if self._rng.random() < 0.3 else self._cancel)(row.id)
            except DBAPIError:
                continue  # he will live with it

    async def _cancel(self, job_id: UUID) -> None:
        done = await intervene.cancel(self.lab.db, job_ids=[job_id])
        self._noted(job_id, "acknowledged" if done.cancelled else "flagged" if done.flagged else "late")

    async def _cancel_over_http(self, job_id: UUID) -> None:
        reply = await self._surely("POST", f"/v1/jobs/{job_id}/cancel")
        state = reply.json()["state"]
        self._noted(job_id, "flagged" if reply.status_code == 202 else "acknowledged" if state == "cancelled" else "late")

    def _noted(self, job_id: UUID, what: str) -> None:
        self.lab.history.note("cancel", job_id=job_id, reply=what)
        if what == "acknowledged":
            self.lab.history.note("cancel_acknowledged", job_ids=[job_id])

    async def _hands_in_a_file(self, name: str, when: int) -> None:
        """By the command that people use, bad rows and all, after so many jobs; broken off, it is run again until all rows are in."""
        while self.accepted < when and not self._over.is_set():  # noqa: ASYNC110 - a count, not an event
            await asyncio.sleep(LOOK_S)
        file = self.lab.directory / f"{name}.jsonl"
        file.write_text("".join(map(_line, range(1, FILE_ROWS + 1))))
        log = self.lab.directory / "enqueue.log"
        while code := await (await start(["-m", "worker", "enqueue", str(file), "--batch", name], self.lab.environment, log)).wait():
            self.lab.history.note("enqueue broke off", code=code)
            await asyncio.sleep(AGAIN_S)
        while True:
            try:
                found = await self.lab.rows("SELECT j.id FROM jobs j JOIN batches b ON b.id = j.batch_id WHERE b.name = :name", name=name)
                break
            except DBAPIError:
                await asyncio.sleep(AGAIN_S)
        self.lab.history.note("accepted", job_ids=[row.id for row in found])
        self.accepted += len(found)
        assert len(found) == FILE_ROWS


def _line(number: int) -> str:
    """A ticket, or a line that is none."""
    if number % BAD_ROW_EACH == 0:
        return f'{{"ticket": "number {number}\n'
    return json.dumps({"ticket": f"number {number}"}) + "\n"


_SOME = "SELECT id FROM jobs WHERE state = :state ORDER BY random() LIMIT 2"
