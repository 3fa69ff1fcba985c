"""What Postgres could not take is kept on disk and settled once, however often and by however many it is found."""

import asyncio
import json

import pytest
from sqlalchemy.exc import DBAPIError
from stage import a_batch as a_batch_of
from stage import a_call, a_job, an_answer, answered, batch, calls, counters_are_exact, ending, job, play, results, rows, take

from worker import database, spool
from worker.job import JobState
from worker.signals import Signal


async def an_ending(db):
    """A claimed job and its answer, with odd characters in it."""
    (claimed,) = await take(db, [await a_job(db)])
    return claimed, answered(claimed, "na\u00efve \x00 \ud800 line\nbreak")


def test_what_was_written_is_settled_and_gone(database_url, tmp_path):
    async def story(db):
        opened, ids = await a_batch_of(db, 3)
        claims = await take(db, ids)
        failed = ending(claims[1], calls=(a_call(claims[1].opened_id, Signal.SERVER_ERROR),))
        unsent = ending(claims[2], JobState.QUEUED, unsent=(claims[2].opened_id,))
        path = spool.write(tmp_path / "spool", [answered(claims[0]), failed, unsent])
        assert spool.found(tmp_path / "spool") == [path]
        assert await spool.replay(db, tmp_path / "spool") == 3
        assert [(await job(db, job_id)).state for job_id in ids] == ["succeeded", "failed", "queued"]
        assert [[call.outcome for call in await calls(db, job_id)] for job_id in ids] == [["answered"], ["server_error"], []]
        assert (await batch(db, opened.id)).succeeded == 1
        await counters_are_exact(db)
        assert list((tmp_path / "spool").iterdir()) == []

    play(database_url, story)


def test_answers_are_for_the_eyes_of_their_user_only(database_url, tmp_path):
    async def story(db):
        path = spool.write(tmp_path / "spool", [(await an_ending(db))[1]])
        assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)

    play(database_url, story)


def test_an_ending_that_was_committed_before_or_is_found_by_two_counts_once(database_url, tmp_path):
    async def story(db):
        claimed, settlement = await an_ending(db)
        for _ in range(3):
            spool.write(tmp_path, [settlement])
        await asyncio.gather(*(spool.replay(db, tmp_path) for _ in range(3)))
        spool.write(tmp_path, [settlement])
        await spool.replay(db, tmp_path)
        assert [row.answer["content"] for row in await results(db, claimed.job_id)] == ["na\u00efve \ufffd \ufffd line\nbreak"]
        assert [call.outcome for call in await calls(db, claimed.job_id)] == ["answered"]
        assert list(tmp_path.iterdir()) == []

    play(database_url, story)


def test_an_ending_that_comes_too_late_keeps_its_cost_and_gives_its_answer_to_the_next_attempt(database_url, tmp_path):
    async def story(db):
        claimed, settlement = await an_ending(db)
        spool.write(tmp_path, [settlement])
        await rows(db, "UPDATE jobs SET state = 'queued', worker_id = NULL, fence = fence + 1 WHERE id = :id", id=claimed.job_id)
        assert await spool.replay(db, tmp_path) == 0
        (again,) = await take(db, [claimed.job_id])
        assert [asked.answer.content for asked in again.asked if asked.answer] == ["na\u00efve \ufffd \ufffd line\nbreak"]
        (call, *_) = await calls(db, claimed.job_id)
        assert str(call.cost_usd) == "0.250000000000"

    play(database_url, story)


def test_without_postgres_the_file_stays(database_url, tmp_path):
    async def story(db):
        path = spool.write(tmp_path, [(await an_ending(db))[1]])
        away = database.engine("postgresql://nobody@127.0.0.1:1/none")
        with pytest.raises(DBAPIError):
            await spool.replay(away, tmp_path)
        assert spool.found(tmp_path) == [path]

    play(database_url, story)


@pytest.mark.parametrize(
    "broken", ["{", "[]", '"text"', '{"ending": {}}', json.dumps({"ending": {"id": "x"}, "calls": [], "unsent": []}), "\x00"]
)
def test_what_can_never_be_settled_is_set_aside_and_the_others_are_settled(database_url, tmp_path, broken):
    async def story(db):
        claimed, settlement = await an_ending(db)
        path = spool.write(tmp_path, [settlement])
        path.write_text(broken + "\n" + path.read_text())
        assert await spool.replay(db, tmp_path) == 1
        assert (await job(db, claimed.job_id)).state == "succeeded"
        (refused,) = tmp_path.iterdir()
        assert (refused.suffix, refused.read_text()) == (".refused", broken + "\n")

    play(database_url, story)


def test_an_answer_that_breaks_a_rule_of_the_ledger_is_set_aside(database_url, tmp_path):
    async def story(db):
        claimed, _ = await an_ending(db)
        spool.write(tmp_path, [ending(claimed, JobState.RUNNING, answer=an_answer())])  # running, and held by nobody
        assert await spool.replay(db, tmp_path) == 0
        assert (await job(db, claimed.job_id)).state == "running"
        assert [path.suffix for path in tmp_path.iterdir()] == [".refused"]

    play(database_url, story)
