"""Batches of files: made once, however often they are asked for, and seen by their tenant alone."""

import asyncio
from dataclasses import replace

import pytest
from sqlalchemy import text
from stage import batch as ledger_batch
from stage import play, rows

from worker import file_batches, intervene, new_file_batch
from worker.errors import KeyReused, TooMany
from worker.file_batches import from_wire, listed, one, wire_id
from worker.job import new_id
from worker.new_file_batch import NewFileBatch, create

NEW = NewFileBatch(tenant="default", input_file_id=new_id(), completion_window="24h", window_s=86_400, fingerprint="f")
AGAIN = replace(NEW, is_retry=True)


def test_a_new_batch_is_validating_and_is_a_batch_of_ours_as_well(database_url):
    async def story(db):
        made = await create(db, replace(NEW, metadata={"week": "47"}, output_expires_s=3600, skips_bad_lines=True))
        assert (made.state, made.loaded, made.total, made.metadata, made.output_expires_s) == (
            "validating",
            "loading",
            0,
            {"week": "47"},
            3600,
        )
        assert made.skips_bad_lines
        assert 86_300 < made.remaining_s <= 86_400
        assert (await ledger_batch(db, made.batch_id)).name == made.wire_id
        assert await file_batches.unfinished(db) == [made.batch_id]

    play(database_url, story)


def test_asked_for_twice_there_are_two_and_asked_for_again_there_is_one(database_url):
    async def story(db):
        first, second = await create(db, NEW), await create(db, NEW)
        assert first.batch_id != second.batch_id
        assert (await create(db, AGAIN)).batch_id == second.batch_id
        for other in (replace(AGAIN, fingerprint="g"), replace(AGAIN, tenant="b")):
            assert (await create(db, other)).batch_id not in (first.batch_id, second.batch_id)
        assert len(await rows(db, "SELECT FROM file_batches")) == 4

    play(database_url, story)


def test_ten_minutes_later_it_is_a_new_wish(database_url):
    async def story(db):
        first = await create(db, NEW)
        await rows(db, "UPDATE file_batches SET created_at = now() - interval '9 minutes 59 seconds'")
        assert (await create(db, AGAIN)).batch_id == first.batch_id
        await rows(db, "UPDATE file_batches SET created_at = now() - interval '10 minutes'")
        assert (await create(db, AGAIN)).batch_id != first.batch_id

    play(database_url, story)


def test_fifty_retries_at_once_are_one_batch(database_url):
    async def story(db):
        made = await asyncio.gather(*(create(db, AGAIN) for _ in range(50)))
        assert len({batch.batch_id for batch in made}) == len(await rows(db, "SELECT FROM file_batches")) == 1

    play(database_url, story)


def test_a_key_is_one_batch_for_good_and_belongs_to_its_request_and_tenant(database_url):
    async def story(db):
        keyed = replace(NEW, idempotency_key="k")
        made = await asyncio.gather(*(create(db, keyed) for _ in range(20)))
        assert len({batch.batch_id for batch in made}) == 1
        await rows(db, "UPDATE file_batches SET created_at = now() - interval '1 year'")
        assert (await create(db, keyed)).batch_id == made[0].batch_id
        with pytest.raises(KeyReused, match=made[0].wire_id):
            await create(db, replace(keyed, fingerprint="g"))
        assert (await create(db, replace(keyed, tenant="b", fingerprint="g"))).batch_id != made[0].batch_id
        assert (await create(db, AGAIN)).batch_id != made[0].batch_id
        assert len(await rows(db, "SELECT FROM file_batches")) == 3

    play(database_url, story)


def test_so_many_of_a_tenant_are_unfinished_at_most_also_when_asked_for_at_once(database_url, monkeypatch):
    sql = str(new_file_batch._CREATE.text)
    assert f"< {new_file_batch.MOST_UNFINISHED}" in sql
    monkeypatch.setattr(new_file_batch, "_CREATE", text(sql.replace(f"< {new_file_batch.MOST_UNFINISHED}", "< 3")))

    async def story(db):
        made = await asyncio.gather(*(create(db, replace(NEW, fingerprint=str(n))) for n in range(6)), return_exceptions=True)
        assert [type(one) for one in made if isinstance(one, Exception)] == [TooMany] * 3
        first, *_ = [one for one in made if not isinstance(one, Exception)]
        assert (await create(db, replace(AGAIN, fingerprint=await fingerprint(db, first)))).batch_id == first.batch_id
        await create(db, replace(NEW, tenant="b"))
        await file_batches.failed(db, first.batch_id, [{"code": "x", "line": 1, "message": "x", "param": None}])
        await create(db, NEW)
        with pytest.raises(TooMany, match="have not ended"):
            await create(db, NEW)

    async def fingerprint(db, batch):
        (row,) = await rows(db, "SELECT fingerprint FROM file_batches WHERE batch_id = :id", id=batch.batch_id)
        return row.fingerprint

    play(database_url, story)


def test_batches_are_listed_newest_first_and_are_their_tenants_alone(database_url):
    async def story(db):
        made = [(await create(db, NEW)).batch_id for _ in range(3)]
        theirs = await create(db, replace(NEW, tenant="b"))
        assert [batch.batch_id for batch in await listed(db, "default", limit=10)] == made[::-1]
        assert [batch.batch_id for batch in await listed(db, "default", limit=1, after=made[2])] == [made[1]]
        assert await one(db, theirs.batch_id, "default") is None
        assert (await one(db, theirs.batch_id)).tenant == "b"

    play(database_url, story)


def test_each_step_is_taken_from_the_state_before_it_only(database_url):
    async def story(db):
        made = await create(db, NEW)
        await file_batches.finalizing(db, made.batch_id)
        assert (await one(db, made.batch_id)).state == "validating"
        await file_batches.ended(db, made, None, None, {})
        assert (await one(db, made.batch_id)).state == "validating"
        await file_batches.failed(db, made.batch_id, [{"code": "x", "line": 1, "message": "x", "param": None}])
        for step in (file_batches.validated, file_batches.finalizing, file_batches.cancel):
            assert not await step(db, made.batch_id)
        await file_batches.ended(db, made, None, None, {})
        over = await one(db, made.batch_id)
        assert (over.state, over.loaded, over.in_progress_at, over.cancelling_at) == ("failed", "finished", None, None)
        assert await file_batches.unfinished(db) == []

    play(database_url, story)


def test_cancelling_takes_no_more_rows(database_url):
    async def story(db):
        made = await create(db, NEW)
        assert await file_batches.cancel(db, made.batch_id)
        cancelling = await one(db, made.batch_id)
        assert (cancelling.state, cancelling.loaded, cancelling.cancelling_at is not None) == ("cancelling", "finished", True)
        assert not await file_batches.cancel(db, made.batch_id)
        await intervene.cancel(db, batch_id=made.batch_id)

    play(database_url, story)


def test_a_batch_ends_only_with_all_of_its_files(database_url):
    async def story(db):
        made = await create(db, NEW)
        await file_batches.cancel(db, made.batch_id)
        cancelling = await one(db, made.batch_id)
        await file_batches.ended(db, cancelling, new_id(), None, {})  # a file that was purged meanwhile
        assert (await one(db, made.batch_id)).state == "cancelling"
        await file_batches.ended(db, cancelling, None, None, {})
        assert (await one(db, made.batch_id)).state == "cancelled"
        await file_batches.failed(db, made.batch_id, [{"code": "x", "line": 1, "message": "x", "param": None}])
        over = await one(db, made.batch_id)
        assert (over.state, over.errors, over.failed_at) == ("cancelled", None, None)

    play(database_url, story)


def test_ids_on_the_wire_are_read_back_and_nothing_else_is():
    batch_id = new_id()
    assert from_wire(wire_id(batch_id)) == batch_id
    for other in (
        "",
        "batch_",
        batch_id.hex,
        f"file-{batch_id.hex}",
        f"batch_{batch_id.hex}0",
        f"batch_{batch_id.hex}\n",
        f"batch_{batch_id}",
    ):
        assert from_wire(other) is None
