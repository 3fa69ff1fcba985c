"""How many interactive jobs a tenant may have queued, against a real Postgres."""

import asyncio
from collections.abc import Awaitable

import pytest
from fastapi import HTTPException
from sqlalchemy import event
from stage import a_job, blocked, play, rows, transaction

from api import admission
from api.admission import Admission
from worker.job import Lane


async def refused(admitted: Awaitable[None]) -> bool:
    (found,) = await asyncio.gather(admitted, return_exceptions=True)
    assert found is None or isinstance(found, HTTPException)
    return found is not None and found.status_code == 429


def test_postgres_is_asked_once_a_span_and_tenant_and_what_is_let_in_between_is_counted(database_url, monkeypatch):
    monkeypatch.setattr(admission, "LOOK_S", 3600)

    async def story(db):
        asked = []
        event.listen(db.sync_engine, "before_cursor_execute", lambda *given: asked.append(given[2]))
        door = Admission(db, 3)
        for tenant in ("a", "b"):
            assert [await refused(door.admit(tenant)) for _ in range(5)] == [False, False, False, True, True]
        assert len(asked) == 2

    play(database_url, story)


def test_while_postgres_is_asked_what_was_known_before_counts(database_url, monkeypatch):
    monkeypatch.setattr(admission, "LOOK_S", 3600)

    async def story(db):
        await a_job(db, lane=Lane.INTERACTIVE)
        door = Admission(db, 1)
        assert await refused(door.admit("default"))
        door._looks["default"].at = float("-inf")
        async with transaction(db) as other:
            await rows(other, "LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE")
            looking = asyncio.create_task(refused(door.admit("default")))
            await blocked(db, 1)
            assert await asyncio.wait_for(refused(door.admit("default")), 20)
        assert await looking

    play(database_url, story)


@pytest.mark.parametrize("lane", [Lane.INTERACTIVE, Lane.BULK])
def test_bulk_jobs_fill_no_queue(database_url, lane):
    async def story(db):
        await a_job(db, lane=lane)
        assert await refused(Admission(db, 1).admit("default")) == (lane is Lane.INTERACTIVE)
        assert not await refused(Admission(db, 1).admit("another"))

    play(database_url, story)
