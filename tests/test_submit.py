"""Jobs in: once per key, once per row, whatever breaks off in the middle."""

import asyncio
import tracemalloc
from dataclasses import replace

import psycopg
import pytest
from sqlalchemy import event
from stage import HELLO, Mailbox, a_batch, answered, batch, counters_are_exact, job, play, rows, take

from worker import submit as submitting
from worker.errors import KeyReused, UsageError
from worker.job import ChatRequest, Lane
from worker.ledger import settle
from worker.submit import NewJob, Row, add_rows, close_batch, open_batch, submit


def wanted(count, first=1):
    return (Row(ordinal=n, custom_id=str(n), request=HELLO, chain="default") for n in range(first, count + 1))


def test_fifty_submits_with_one_key_at_once_are_one_job(database_url):
    async def story(db):
        mailbox = Mailbox()
        told = await asyncio.gather(*(submit(db, mailbox.publish, NewJob(request=HELLO, idempotency_key="k")) for _ in range(50)))
        assert len({one.job_id for one in told}) == 1
        assert [one.replayed for one in told].count(False) == 1
        assert len(mailbox.messages) == len(await rows(db, "SELECT FROM jobs")) == 1

    play(database_url, story)


def test_a_key_belongs_to_its_request_and_its_tenant(database_url):
    async def story(db):
        publish = Mailbox().publish
        first = await submit(db, publish, NewJob(request=HELLO, idempotency_key="k"))
        other = ChatRequest([{"role": "user", "content": "something else"}])
        with pytest.raises(KeyReused, match=str(first.job_id)):
            await submit(db, publish, NewJob(request=other, idempotency_key="k"))
        theirs = await submit(db, publish, NewJob(request=other, idempotency_key="k", tenant="b"))
        assert not theirs.replayed
        assert len(await rows(db, "SELECT FROM jobs")) == 2

    play(database_url, story)


def test_a_key_belongs_to_the_chain_the_lane_and_the_metadata_as_well(database_url):
    async def story(db):
        publish = Mailbox().publish
        first = NewJob(request=HELLO, idempotency_key="k")
        await submit(db, publish, first)
        for other in ({"chain": "another"}, {"lane": Lane.BULK}, {"metadata": {"ticket": "T-1"}}):
            with pytest.raises(KeyReused):
                await submit(db, publish, replace(first, **other))
        assert (await submit(db, publish, replace(first, deadline_s=7))).replayed

    play(database_url, story)


def test_a_key_that_tenants_share_gives_each_its_own_job_again(database_url):
    async def story(db):
        publish = Mailbox().publish
        jobs = [NewJob(request=HELLO, idempotency_key="k", tenant=tenant) for tenant in ("a", "b", "c")]
        made, again = [[(await submit(db, publish, one)).job_id for one in jobs] for _ in range(2)]
        assert made == again
        assert len(set(made)) == 3

    play(database_url, story)


def test_a_key_whose_job_is_deleted_in_that_moment_makes_a_new_one(database_url):
    async def story(db):
        publish, wanted = Mailbox().publish, NewJob(request=HELLO, idempotency_key="k")
        first = await submit(db, publish, wanted)

        def deleted(*given):
            if "SELECT id, fingerprint FROM jobs" in given[2]:
                with psycopg.connect(database_url, autocommit=True) as other:
                    other.execute("DELETE FROM jobs")

        event.listen(db.sync_engine, "before_cursor_execute", deleted)
        second = await submit(db, publish, wanted)
        assert (second.replayed, second.job_id != first.job_id) == (False, True)

    play(database_url, story)


def test_an_interactive_job_is_published_at_once_and_a_bulk_job_waits_for_its_turn(database_url):
    async def story(db):
        mailbox = Mailbox()
        told = await submit(db, mailbox.publish, NewJob(request=HELLO))
        await submit(db, mailbox.publish, NewJob(request=HELLO, lane=Lane.BULK))
        assert mailbox.messages == [(Lane.INTERACTIVE, told.job_id, [told.job_id])]
        assert (await job(db, told.job_id)).delivery_id == told.job_id
        assert len(await rows(db, "SELECT FROM jobs WHERE dispatched_at IS NULL")) == 1

    play(database_url, story)


def test_a_job_that_could_not_be_published_is_accepted_and_left_to_the_leader(database_url):
    async def story(db):
        told = await submit(db, Mailbox(broken=True).publish, NewJob(request=HELLO))
        assert ((await job(db, told.job_id)).state, (await job(db, told.job_id)).dispatched_at) == ("queued", None)

    play(database_url, story)


def test_what_cannot_be_stored_in_a_request_is_replaced(database_url):
    async def story(db):
        nasty = ChatRequest([{"role": "user", "content": "a\x00b\ud800c"}])
        told = await submit(db, Mailbox().publish, NewJob(request=nasty, metadata={"\x00": "\udfff"}))
        (claimed,) = await take(db, [told.job_id])
        assert claimed.request.messages[0]["content"] == "a\ufffdb\ufffdc"
        assert (await job(db, told.job_id)).metadata == {"\ufffd": "\ufffd"}

    play(database_url, story)


def test_a_file_that_broke_off_goes_on_where_it_was(database_url, monkeypatch):
    monkeypatch.setattr(submitting, "CHUNK", 10)

    async def story(db):
        opened = await open_batch(db, "b", fingerprint=["f"], columns=["body"])
        assert (opened.resumed, opened.complete) == (False, False)
        async for added in add_rows(db, opened, wanted(25)):
            assert added == 10
            break  # the process dies here
        again = await open_batch(db, "b", fingerprint=["f"], columns=["body"])
        assert (again.id, again.resumed, again.complete) == (opened.id, True, False)
        assert [added async for added in add_rows(db, again, wanted(25))] == [0, 10, 5]
        await close_batch(db, again)
        stored = await rows(db, "SELECT ordinal, custom_id FROM jobs ORDER BY id")
        assert [tuple(row) for row in stored] == [(n, str(n)) for n in range(1, 26)]
        assert (await batch(db, opened.id)).total == 25
        assert (await open_batch(db, "b", fingerprint=["f"], columns=["body"])).complete
        await counters_are_exact(db)

    play(database_url, story)


def test_two_runs_of_the_same_file_at_once_submit_each_row_once(database_url, monkeypatch):
    monkeypatch.setattr(submitting, "CHUNK", 10)

    async def story(db):
        async def run():
            opened = await open_batch(db, "b", fingerprint=["f"], columns=None)
            return sum([added async for added in add_rows(db, opened, wanted(60))])

        assert sum(await asyncio.gather(run(), run(), run())) == 60
        await counters_are_exact(db)

    play(database_url, story)


def test_a_batch_name_belongs_to_its_file(database_url):
    async def story(db):
        await open_batch(db, "b", fingerprint=["one.csv"], columns=None)
        with pytest.raises(UsageError, match="choose another name"):
            await open_batch(db, "b", fingerprint=["two.csv"], columns=None)
        assert (await open_batch(db, "b", fingerprint=["two.csv"], columns=None, tenant="b")).resumed is False

    play(database_url, story)


def test_a_row_that_cannot_be_used_is_counted_as_failed_with_its_reason(database_url):
    async def story(db):
        opened = await open_batch(db, "b", fingerprint=[], columns=None)
        bad = Row(ordinal=3, custom_id=None, request=None, chain="default", problem="row 3: no column body", source={"a": "1"})
        async for _ in add_rows(db, opened, [*wanted(2), bad]):
            pass
        await close_batch(db, opened)
        stored = await batch(db, opened.id)
        assert (stored.total, stored.failed, stored.state) == (3, 1, "open")
        (failed,) = await rows(db, "SELECT j.*, r.* FROM jobs j JOIN job_requests r ON r.job_id = j.id WHERE state = 'failed'")
        assert failed.error == {"code": "unusable_row", "message": "row 3: no column body", "providers": []}
        assert (failed.request, failed.row) == (None, {"a": "1"})
        await counters_are_exact(db)

    play(database_url, story)


def test_a_batch_whose_rows_all_failed_or_that_has_none_is_finished_when_it_closes(database_url):
    async def story(db):
        for name, problem_rows in (("empty", []), ("bad", [Row(ordinal=1, custom_id=None, request=None, chain="c", problem="no")])):
            opened = await open_batch(db, name, fingerprint=[], columns=None)
            async for _ in add_rows(db, opened, problem_rows):
                pass
            await close_batch(db, opened)
            assert (await batch(db, opened.id)).state == "finished"

    play(database_url, story)


def test_rows_are_attempted_while_later_ones_are_still_read(database_url):
    async def story(db):
        opened, ids = await a_batch(db, 3, closed=False)
        claims = await take(db, ids)
        await settle(db, [answered(claimed) for claimed in claims])
        assert (await batch(db, opened.id)).state == "loading"
        async for _ in add_rows(db, opened, wanted(4)):
            pass
        await close_batch(db, opened)
        stored = await batch(db, opened.id)
        assert (stored.total, stored.succeeded, stored.state) == (4, 3, "open")

    play(database_url, story)


def test_a_large_file_needs_no_more_memory_than_a_chunk_of_it(database_url, monkeypatch):
    monkeypatch.setattr(submitting, "CHUNK", 500)

    async def story(db):
        opened = await open_batch(db, "b", fingerprint=[], columns=None)
        peaks = []
        tracemalloc.start()
        try:
            async for _ in add_rows(db, opened, wanted(6_000)):
                peaks.append(tracemalloc.get_traced_memory()[1])
                tracemalloc.reset_peak()
        finally:
            tracemalloc.stop()
        assert len(peaks) == 12
        assert max(peaks[6:]) < 1.2 * max(peaks[:6])

    play(database_url, story)


@pytest.mark.parametrize("name", ["", "x" * 201, "two\nlines", "nul\x00", "\x1b[2J", "lone \udcff"])
def test_a_name_that_no_batch_can_have_is_refused(database_url, name):
    async def story(db):
        with pytest.raises(UsageError, match="1 to 200 printable characters"):
            await open_batch(db, name, fingerprint=[], columns=None)
        assert await rows(db, "SELECT FROM batches") == []

    play(database_url, story)
