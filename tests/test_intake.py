"""From a file of lines to a file of answers, whoever dies on the way."""

import asyncio
import json
import tracemalloc
from codecs import BOM_UTF8
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import event
from stage import answered, counters_are_exact, ending, play, rows, take
from structlog.testing import capture_logs
from test_files import a_file, content

from worker import file_batches, files, intake, intervene, new_file_batch, webhooks
from worker.config import parse
from worker.errors import UsageError
from worker.intake import LONGEST_LINE, Lines, tend
from worker.job import JobState
from worker.ledger import settle
from worker.new_file_batch import NewFileBatch
from worker.rescue import expire
from worker.selection import Selection

CONFIG = parse(
    {
        "providers": {"first": {"base_url": "http://127.0.0.1:1", "model": "m-first"}},
        "chains": {"default": {"providers": ["first"]}, "careful": {"providers": ["first"]}},
    },
    "test",
)
HELLO = [{"role": "user", "content": "hello"}]


def line(custom_id, **body):
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": {"messages": HELLO, **body}}


def written(*lines):
    return b"".join((given if isinstance(given, bytes) else json.dumps(given).encode()) + b"\n" for given in lines)


def good(count):
    return written(*(line(f"T-{n}", model="m-first") for n in range(1, count + 1)))


async def a_file_batch(db, text, **fields):
    file = await a_file(db, text)
    new = {"tenant": "default", "completion_window": "24h", "window_s": 86_400, "fingerprint": "f", **fields}
    return (await new_file_batch.create(db, NewFileBatch(input_file_id=file.id, **new))).batch_id


async def now(db, batch_id):
    return await file_batches.one(db, batch_id)


async def jobs(db, batch_id):
    return await rows(db, "SELECT * FROM jobs WHERE batch_id = :id ORDER BY ordinal", id=batch_id)


async def answer(db, batch_id, *failing):
    """All its jobs have ended: those of these custom ids as failed, the others with an answer that says `custom_id`."""
    waiting = [job for job in await jobs(db, batch_id) if job.state == "queued"]
    names = {job.id: job.custom_id for job in waiting}
    claims = await take(db, [job.id for job in waiting])
    for claimed in claims:
        name = names[claimed.job_id]
        error = {"code": "exhausted", "message": "nobody answered", "providers": []}
        over = ending(claimed, JobState.FAILED, error=error) if name in failing else answered(claimed, f"to {name}")
        await settle(db, [over])


async def lines_of(db, file_id):
    if file_id is None:
        return []
    file = await files.one(db, file_id, "default")
    return [json.loads(one) for one in (await content(db, file)).decode().splitlines()]


async def outcome(db, batch_id):
    """Custom ids in the output file, and codes by custom id in the error file."""
    batch = await now(db, batch_id)
    said = {
        one["custom_id"]: one["response"]["body"]["choices"][0]["message"]["content"] for one in await lines_of(db, batch.output_file_id)
    }
    return said, {one["custom_id"]: one["error"]["code"] for one in await lines_of(db, batch.error_file_id)}


def test_a_file_of_lines_becomes_a_file_of_answers(database_url):
    async def story(db):
        batch_id = await a_file_batch(db, good(3))
        assert (await now(db, batch_id)).state == "validating"
        await tend(db, CONFIG)
        batch = await now(db, batch_id)
        assert (batch.state, batch.loaded, batch.total, batch.in_progress_at is not None) == ("in_progress", "open", 3, True)
        assert [(job.ordinal, job.custom_id, job.chain, job.lane) for job in await jobs(db, batch_id)] == [
            (n, f"T-{n}", "m-first", "bulk") for n in (1, 2, 3)
        ]
        await tend(db, CONFIG)
        assert (await now(db, batch_id)).state == "in_progress"
        await answer(db, batch_id, "T-2")
        await tend(db, CONFIG)
        batch = await now(db, batch_id)
        assert (batch.state, batch.succeeded, batch.failed) == ("completed", 2, 1)
        assert batch.finalizing_at <= batch.completed_at
        assert await outcome(db, batch_id) == ({"T-1": "to T-1", "T-3": "to T-3"}, {"T-2": "exhausted"})
        assert batch.usage["total_tokens"] == 16
        output = await files.one(db, batch.output_file_id, "default")
        assert (output.purpose, output.filename, output.expires_at) == ("batch_output", f"{batch.wire_id}_output.jsonl", None)
        await counters_are_exact(db)

    play(database_url, story)


def test_a_file_without_lines_is_not_written(database_url):
    async def story(db):
        batch_id = await a_file_batch(db, good(2))
        await tend(db, CONFIG)
        await answer(db, batch_id)
        await tend(db, CONFIG)
        batch = await now(db, batch_id)
        assert (batch.output_file_id is not None, batch.error_file_id) == (True, None)
        other = await a_file_batch(db, good(1))
        await tend(db, CONFIG)
        await answer(db, other, "T-1")
        await tend(db, CONFIG)
        assert (await now(db, other)).output_file_id is None
        assert await outcome(db, other) == ({}, {"T-1": "exhausted"})

    play(database_url, story)


def test_written_files_are_kept_as_long_as_was_asked(database_url):
    async def story(db):
        batch_id = await a_file_batch(db, good(1), output_expires_s=3600)
        await tend(db, CONFIG)
        await answer(db, batch_id)
        await tend(db, CONFIG)
        (kept,) = await rows(db, "SELECT expires_at - now() AS left FROM files WHERE purpose = 'batch_output'")
        assert 3500 < kept.left.total_seconds() <= 3600

    play(database_url, story)


BAD = {
    "not JSON": (b'{"custom_id": ', "invalid_json_line", None),
    "a list": (b"[]", "invalid_json_line", None),
    "NaN": (b'{"custom_id": NaN}', "invalid_json_line", None),
    "a key twice": (b'{"custom_id": "a", "custom_id": "b"}', "invalid_json_line", None),
    "deep": (b'{"a": ' + b"[" * 100_000, "invalid_json_line", None),
    "not UTF-8": (b'{"custom_id": "\xff"}', "invalid_json_line", None),
    "UTF-16": ('{"custom_id": "a"}'.encode("utf-16"), "invalid_json_line", None),
    "gzip": (b"\x1f\x8b\x08", "invalid_json_line", None),
    "too long": (b" " * LONGEST_LINE + b"{}", "line_too_long", None),
    "no custom_id": ({"body": {"messages": HELLO}}, "invalid_request", "custom_id"),
    "no messages": (line("x", messages=[]), "invalid_request", "messages"),
    "no role": (line("x", messages=[{"content": "hi"}]), "invalid_request", "messages[0].role"),
    "an unknown parameter": (line("x", temperatur=1), "invalid_request", "temperatur"),
    "another endpoint": ({**line("x"), "url": "/v1/embeddings"}, "invalid_request", "url"),
    "another method": ({**line("x"), "method": "GET"}, "invalid_request", "method"),
    "an unknown model": (line("x", model="gpt-99"), "model_not_found", "body.model"),
    "a known custom_id": (line("T-1"), "duplicate_custom_id", "custom_id"),
}


@pytest.mark.parametrize("name", BAD)
def test_one_bad_line_fails_the_batch_and_nothing_is_run(database_url, name):
    bad, code, param = BAD[name]

    async def story(db):
        batch_id = await a_file_batch(db, good(2) + b"\n" + written(bad, line("last")))
        await tend(db, CONFIG)
        batch = await now(db, batch_id)
        assert (batch.state, batch.loaded, batch.total, batch.failed_at is not None) == ("failed", "finished", 0, True)
        (error,) = batch.errors
        assert (error["code"], error["line"], error["param"]) == (code, 4, param)
        assert error["message"]
        assert "hello" not in error["message"]
        assert (batch.output_file_id, batch.error_file_id) == (None, None)
        await counters_are_exact(db)

    play(database_url, story)


@pytest.mark.parametrize("name", BAD)
def test_told_to_skip_a_bad_line_ends_in_the_error_file_and_the_others_are_run(database_url, name):
    bad, *_ = BAD[name]

    async def story(db):
        batch_id = await a_file_batch(db, good(2) + written(bad, line("last")), skips_bad_lines=True)
        await tend(db, CONFIG)
        assert (await now(db, batch_id)).state == "in_progress"
        await answer(db, batch_id)
        await tend(db, CONFIG)
        batch = await now(db, batch_id)
        assert (batch.state, batch.total, batch.succeeded, batch.failed) == ("completed", 4, 3, 1)
        said, errors = await outcome(db, batch_id)
        assert said == {"T-1": "to T-1", "T-2": "to T-2", "last": "to last"}
        assert list(errors.values()) == ["unusable_row"]
        (error,) = await lines_of(db, batch.error_file_id)
        assert (error["custom_id"], error["error"]["line"]) == ("x" if b'"x"' in written(bad) else None, 3)

    play(database_url, story)


def test_a_bad_line_never_bears_the_custom_id_of_one_that_is_answered(database_url):
    async def story(db):
        text = written(line("2"), {"body": {"messages": HELLO}}, line("2"), b"{", line("4"))
        batch_id = await a_file_batch(db, text, skips_bad_lines=True)
        await tend(db, CONFIG)
        await answer(db, batch_id)
        await tend(db, CONFIG)
        batch = await now(db, batch_id)
        assert [one["custom_id"] for one in await lines_of(db, batch.output_file_id)] == ["2", "4"]
        errors = await lines_of(db, batch.error_file_id)
        assert [(one["custom_id"], one["error"]["line"]) for one in errors] == [(None, 2), (None, 3), (None, 4)]

    play(database_url, story)


def test_a_hundred_bad_lines_are_named_and_the_others_counted(database_url):
    async def story(db):
        batch_id = await a_file_batch(db, written(*[b"{"] * 250, line("good")))
        await tend(db, CONFIG)
        batch = await now(db, batch_id)
        assert [error["line"] for error in batch.errors] == [*range(1, 101), None]
        assert batch.errors[-1]["message"] == "150 more lines cannot be used"

    play(database_url, story)


@pytest.mark.parametrize("text", [b"", b"\n\r\n  \n", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("skips", [False, True])
def test_a_file_without_a_request_fails(database_url, text, skips):
    async def story(db):
        batch_id = await a_file_batch(db, text, skips_bad_lines=skips)
        await tend(db, CONFIG)
        batch = await now(db, batch_id)
        assert (batch.state, batch.total) == ("failed", 0)

    play(database_url, story)


def test_a_file_of_too_many_lines_fails_even_when_bad_lines_are_skipped(database_url, monkeypatch):
    monkeypatch.setattr(intake, "MOST_LINES", 3)

    async def story(db):
        for count, state in ((3, "in_progress"), (4, "failed")):
            batch_id = await a_file_batch(db, good(count), skips_bad_lines=True)
            await tend(db, CONFIG)
            assert (await now(db, batch_id)).state == state
        (error,) = (await now(db, batch_id)).errors
        assert (error["code"], error["line"]) == ("invalid_file", None)
        assert "more than 3 lines" in error["message"]

    play(database_url, story)


@pytest.mark.parametrize("ends", [b"\n", b"\r\n"])
@pytest.mark.parametrize("size", [1, 2, 7, 10_000])
def test_lines_are_the_same_however_the_file_is_cut(ends, size):
    text = b"\xef\xbb\xbf" + ends.join([json.dumps(line("Ü ✓", model="careful")).encode(), b"", json.dumps(line("b")).encode()])
    lines = Lines(CONFIG)
    found = [one for start in range(0, len(text), size) for one in lines.feed(text[start : start + size])] + lines.end()
    assert [(one.row.ordinal, one.row.custom_id, one.row.chain, one.code) for one in found] == [
        (1, "Ü ✓", "careful", None),
        (3, "b", "default", None),
    ]
    assert lines.count == 2


@given(text=st.lists(st.one_of(st.binary(max_size=30), st.sampled_from([good(1), b"\n", b"\r", b"{}", b"\xef\xbb\xbf"]))).map(b"".join))
def test_whatever_stands_in_a_file_each_line_of_it_can_be_sent_or_says_why_not(text):
    lines = Lines(CONFIG)
    found = lines.feed(text) + lines.end()
    assert [one.row.ordinal for one in found] == [n for n, one in enumerate(text.removeprefix(BOM_UTF8).split(b"\n"), 1) if one.strip()]
    for one in found:
        assert (one.code is None) == (one.row.request is not None) == (one.row.problem is None)
        json.dumps(one.error())


def test_a_line_may_be_a_mebibyte_long_and_of_a_longer_one_no_more_is_kept():
    fits = json.dumps(line("a")).encode()
    fits += b" " * (LONGEST_LINE - len(fits))
    lines = Lines(CONFIG)
    assert [one.code for one in lines.feed(fits + b"\n")] == [None]
    tracemalloc.start()
    try:
        for _ in range(20):
            assert lines.feed(bytes(LONGEST_LINE)) == []
        assert tracemalloc.get_traced_memory()[0] < 2.5 * LONGEST_LINE
    finally:
        tracemalloc.stop()
    assert [one.code for one in lines.feed(b"\n")] == ["line_too_long"]


def test_a_file_deleted_before_it_is_checked_fails_the_batch(database_url):
    async def story(db):
        batch_id = await a_file_batch(db, good(2))
        await files.delete(db, (await now(db, batch_id)).input_file_id, "default")
        await tend(db, CONFIG)
        batch = await now(db, batch_id)
        assert (batch.state, [error["code"] for error in batch.errors]) == ("failed", ["file_deleted"])

    play(database_url, story)


def deleting(monkeypatch, after_pieces):
    """The input file is deleted when so many of its pieces were read."""
    read = 0

    async def cut_short(db, file):
        nonlocal read
        async for piece in pieces(db, file):
            yield piece
            read += 1
            if read == after_pieces:
                await files.delete(db, file.id, "default")

    pieces = files.pieces
    monkeypatch.setattr(files, "pieces", cut_short)


def test_a_file_deleted_while_it_is_checked_fails_the_batch(database_url, monkeypatch):
    monkeypatch.setattr(files, "PIECE_BYTES", 200)
    deleting(monkeypatch, 2)

    async def story(db):
        batch_id = await a_file_batch(db, good(10))
        await tend(db, CONFIG)
        batch = await now(db, batch_id)
        assert (batch.state, batch.total, [error["code"] for error in batch.errors]) == ("failed", 0, ["file_deleted"])

    play(database_url, story)


def test_a_file_deleted_while_it_is_submitted_cancels_the_batch_and_says_why(database_url, monkeypatch):
    monkeypatch.setattr(files, "PIECE_BYTES", 500)
    pieces_in_all = -(-len(good(10)) // 500)
    deleting(monkeypatch, pieces_in_all + 2)

    async def story(db):
        batch_id = await a_file_batch(db, good(10))
        await tend(db, CONFIG)
        batch = await now(db, batch_id)
        assert (batch.state, [error["code"] for error in batch.errors]) == ("cancelled", ["file_deleted"])
        assert 0 < batch.total < 10
        said, errors = await outcome(db, batch_id)
        assert (said, set(errors.values()), len(errors)) == ({}, {"batch_cancelled"}, batch.total)
        await counters_are_exact(db)

    play(database_url, story)


def test_cancelled_before_it_is_checked_nothing_is_run(database_url):
    async def story(db):
        batch_id = await a_file_batch(db, good(2))
        assert await file_batches.cancel(db, batch_id)
        assert (await now(db, batch_id)).state == "cancelling"
        await tend(db, CONFIG)
        batch = await now(db, batch_id)
        assert (batch.state, batch.total, batch.output_file_id, batch.error_file_id) == ("cancelled", 0, None, None)
        assert not await file_batches.cancel(db, batch_id)

    play(database_url, story)


def test_cancelled_it_waits_for_what_runs_and_keeps_what_was_answered(database_url):
    async def story(db):
        batch_id = await a_file_batch(db, good(3))
        await tend(db, CONFIG)
        first, second, _ = [job.id for job in await jobs(db, batch_id)]
        await settle(db, [answered(claimed, "early") for claimed in await take(db, [first])])
        running = await take(db, [second])
        await file_batches.cancel(db, batch_id)
        await tend(db, CONFIG)
        assert (await now(db, batch_id)).state == "cancelling"
        await settle(db, [answered(claimed, "late") for claimed in running])
        await tend(db, CONFIG)
        batch = await now(db, batch_id)
        assert (batch.state, batch.cancelled_at is not None, batch.errors) == ("cancelled", True, None)
        assert await outcome(db, batch_id) == ({"T-1": "early", "T-2": "late"}, {"T-3": "batch_cancelled"})

    play(database_url, story)


def test_a_cancel_that_died_halfway_is_carried_out_by_the_leader(database_url):
    async def story(db):
        batch_id = await a_file_batch(db, good(2))
        await tend(db, CONFIG)
        await rows(db, "UPDATE file_batches SET state = 'cancelling', cancelling_at = now()")
        await tend(db, CONFIG)
        assert [job.state for job in await jobs(db, batch_id)] == ["cancelled", "cancelled"]
        assert (await now(db, batch_id)).state == "cancelled"

    play(database_url, story)


@pytest.mark.parametrize("loaded", [False, True])
def test_a_batch_that_an_operator_cancels_ends_as_well(database_url, loaded):
    async def story(db):
        batch_id = await a_file_batch(db, good(2))
        if loaded:
            await tend(db, CONFIG)
        await intervene.cancel(db, batch_id=batch_id)
        await tend(db, CONFIG)
        assert (await now(db, batch_id)).state == ("completed" if loaded else "cancelled")

    play(database_url, story)


def test_a_batch_whose_window_closed_is_expired_and_keeps_what_was_answered(database_url):
    async def story(db):
        batch_id = await a_file_batch(db, good(2), window_s=60)
        await tend(db, CONFIG)
        first, second = await jobs(db, batch_id)
        assert 0 < first.deadline_s <= 60
        await settle(db, [answered(claimed) for claimed in await take(db, [first.id])])
        await rows(db, "UPDATE jobs SET deadline_at = now() WHERE id = :id", id=second.id)
        await rows(db, "UPDATE file_batches SET expires_at = now()")
        async with db.connect() as connection:
            await expire(connection)
        await tend(db, CONFIG)
        batch = await now(db, batch_id)
        assert (batch.state, batch.expired_at is not None, batch.completed_at) == ("expired", True, None)
        assert await outcome(db, batch_id) == ({"T-1": "hi"}, {"T-2": "batch_expired"})

    play(database_url, story)


def test_a_batch_that_nobody_looked_at_in_time_expires(database_url):
    async def story(db):
        batch_id = await a_file_batch(db, good(2), window_s=0)
        await tend(db, CONFIG)
        async with db.connect() as connection:
            await expire(connection)
        await tend(db, CONFIG)
        assert (await now(db, batch_id)).state == "expired"

    play(database_url, story)


def test_a_model_that_left_the_configuration_meanwhile_costs_its_lines_alone(database_url):
    async def story(db):
        batch_id = await a_file_batch(db, written(line("a", model="careful"), line("b", model="m-first")))
        await rows(db, "UPDATE file_batches SET state = 'in_progress', in_progress_at = now()")
        without = CONFIG.model_copy(update={"chains": {"default": CONFIG.chains["default"]}})
        await tend(db, without)
        await answer(db, batch_id)
        await tend(db, without)
        assert (await now(db, batch_id)).state == "completed"
        assert await outcome(db, batch_id) == ({"b": "to b"}, {"a": "unusable_row"})

    play(database_url, story)


def test_the_trouble_of_one_batch_is_not_that_of_the_others(database_url, monkeypatch):
    async def story(db):
        first, second = [await a_file_batch(db, good(1)) for _ in range(2)]
        original = intake._validate

        async def validate(db, config, batch):
            if batch.batch_id == first:
                raise RuntimeError
            await original(db, config, batch)

        with monkeypatch.context() as broken:
            broken.setattr(intake, "_validate", validate)
            await tend(db, CONFIG)
        assert [(await now(db, one)).state for one in (first, second)] == ["validating", "in_progress"]
        await tend(db, CONFIG)
        assert (await now(db, first)).state == "in_progress"

    play(database_url, story)


def test_the_same_trouble_is_logged_ever_more_seldom_and_another_at_once(database_url, monkeypatch):
    async def story(db):
        await a_file_batch(db, good(1))
        original, raised = intake._validate, KeyError

        async def validate(*_):
            raise raised

        monkeypatch.setattr(intake, "_validate", validate)
        with capture_logs() as logged:
            for _ in range(9):
                await tend(db, CONFIG)
            raised = IndexError
            await tend(db, CONFIG)
            monkeypatch.setattr(intake, "_validate", original)
            await tend(db, CONFIG)
        assert [(entry["error"], entry["times"]) for entry in logged] == [*(("KeyError", n) for n in (1, 2, 4, 8)), ("IndexError", 1)]
        assert intake._troubles == {}

    play(database_url, story)


async def over(db):
    """A batch of a file that is completed: of two jobs one has failed."""
    batch_id = await a_file_batch(db, good(2))
    await tend(db, CONFIG)
    await answer(db, batch_id, "T-2")
    await tend(db, CONFIG)
    return batch_id, (await jobs(db, batch_id))[1].id


def test_what_ended_in_a_batch_whose_files_are_written_is_not_queued_again(database_url):
    async def story(db):
        batch_id, failed = await over(db)
        for wanted in ({"batch_id": batch_id}, {"job_ids": [failed]}):
            with pytest.raises(UsageError, match=f"{file_batches.wire_id(batch_id)} is completed"):
                await intervene.requeue(db, **wanted)
            with pytest.raises(UsageError, match="send those lines as another batch"):
                await intervene.requeueable(db, **wanted)
        assert await intervene.requeueable(db, which=Selection(state=JobState.FAILED)) == {}
        assert await intervene.requeue(db, which=Selection(state=JobState.FAILED)) == 0
        assert (await now(db, batch_id)).loaded == "finished"

    play(database_url, story)


def test_what_ended_in_a_batch_that_goes_on_is_queued_again(database_url):
    async def story(db):
        batch_id = await a_file_batch(db, good(2))
        await tend(db, CONFIG)
        first, _ = await jobs(db, batch_id)
        error = {"code": "exhausted", "message": "nobody answered", "providers": []}
        await settle(db, [ending(claimed, JobState.FAILED, error=error) for claimed in await take(db, [first.id])])
        assert await intervene.requeue(db, batch_id=batch_id) == 1
        await answer(db, batch_id)
        await tend(db, CONFIG)
        assert await outcome(db, batch_id) == ({"T-1": "to T-1", "T-2": "to T-2"}, {})

    play(database_url, story)


@pytest.mark.parametrize("state", ["in_progress", "finalizing", "cancelling"])
def test_a_job_that_is_queued_again_at_the_last_moment_is_waited_for(database_url, state):
    async def story(db):
        batch_id, failed = await over(db)
        await rows(db, "UPDATE file_batches SET state = 'in_progress', output_file_id = NULL, error_file_id = NULL")
        await intervene.requeue(db, job_ids=[failed])
        await rows(db, "UPDATE file_batches SET state = :state, cancelling_at = now()", state=state)
        batch = await now(db, batch_id)
        await file_batches.finalizing(db, batch_id)
        await file_batches.ended(db, batch, None, None, {})
        assert (await now(db, batch_id)).state == state
        await answer(db, batch_id)
        await tend(db, CONFIG)
        await tend(db, CONFIG)
        assert await outcome(db, batch_id) == ({"T-1": "to T-1", "T-2": "to T-2"}, {})

    play(database_url, story)


def test_while_one_is_at_a_batch_another_goes_on_to_the_next(database_url):
    async def story(db):
        held, free = [await a_file_batch(db, good(1)) for _ in range(2)]
        async with intake._alone(db, held) as alone:
            assert alone
            await tend(db, CONFIG)
            assert [(await now(db, one)).state for one in (held, free)] == ["validating", "in_progress"]
        await tend(db, CONFIG)
        assert (await now(db, held)).state == "in_progress"

    play(database_url, story)


async def to_the_end(db, batch_ids, rounds):
    """Rounds and answers until all of them are over."""
    for _ in range(rounds):
        await tend(db, CONFIG)
        for batch_id in batch_ids:
            await answer(db, batch_id, "T-2")
        if all((await now(db, one)).state == "completed" for one in batch_ids):
            return
    raise AssertionError


async def is_whole(db, batch_id, count):
    batch = await now(db, batch_id)
    assert (batch.state, batch.total, batch.succeeded, batch.failed) == ("completed", count, count - 1, 1)
    said, errors = await outcome(db, batch_id)
    assert said == {f"T-{n}": f"to T-{n}" for n in range(1, count + 1) if n != 2}
    assert errors == {"T-2": "exhausted"}
    assert len(await lines_of(db, batch.output_file_id)) == count - 1
    assert len(await jobs(db, batch_id)) == count
    await counters_are_exact(db)
    named = "SELECT FROM files WHERE state = 'ready' AND filename IN (:output, :error)"
    assert len(await rows(db, named, output=f"{batch.wire_id}_output.jsonl", error=f"{batch.wire_id}_error.jsonl")) == 2


@pytest.mark.parametrize("guarded", [True, False])
def test_several_at_it_at_once_do_everything_once(database_url, monkeypatch, guarded):
    """Also where the lock that only saves them work is not there."""
    monkeypatch.setattr(files, "PIECE_BYTES", 500)
    monkeypatch.setattr(intake, "PAGE", 3)
    if not guarded:
        monkeypatch.setattr(intake, "_LOCK", intake.text("SELECT CAST(:id AS text) IS NOT NULL"))

    async def story(db):
        batch_ids = [await a_file_batch(db, good(10)) for _ in range(2)]
        await asyncio.gather(*(tend(db, CONFIG) for _ in range(3)))
        for batch_id in batch_ids:
            await answer(db, batch_id, "T-2")
        await asyncio.gather(*(tend(db, CONFIG) for _ in range(3)))
        for batch_id in batch_ids:
            await is_whole(db, batch_id, 10)

    play(database_url, story)


def test_whoever_dies_at_any_statement_the_next_one_goes_on(database_url, monkeypatch):
    """A round is cut off before its n-th statement, for each n, until one gets through; then the batch is whole."""
    monkeypatch.setattr(files, "PIECE_BYTES", 500)
    monkeypatch.setattr(intake, "PAGE", 4)

    async def story(db):
        count, die_at = 0, 0

        async def dying_round():
            nonlocal count
            count = 0
            me = asyncio.current_task()

            def counts(*_):
                nonlocal count
                count += 1
                if count == die_at:
                    me.cancel()

            event.listen(db.sync_engine, "before_cursor_execute", counts)
            try:
                with suppress(asyncio.CancelledError):
                    await tend(db, CONFIG)
            finally:
                event.remove(db.sync_engine, "before_cursor_execute", counts)

        deaths = 0
        batch_id = await a_file_batch(db, good(10))
        for phase in ("submitted", "written"):
            for die_at in range(1, 1000):
                await asyncio.create_task(dying_round())
                if count < die_at:
                    break
                deaths += 1
            if phase == "submitted":
                assert (await now(db, batch_id)).loaded == "open"
                await answer(db, batch_id, "T-2")
        assert deaths > 15
        await is_whole(db, batch_id, 10)

    play(database_url, story)


def test_files_past_their_time_go_with_the_round(database_url):
    async def story(db):
        await a_file(db, expires_s=0)
        await tend(db, CONFIG)
        assert await rows(db, "SELECT FROM files") == []

    play(database_url, story)


def test_a_large_file_needs_no_more_memory_than_a_piece_of_it(database_url, monkeypatch):
    monkeypatch.setattr(files, "PIECE_BYTES", 100_000)
    monkeypatch.setattr(intake, "PAGE", 50)

    async def peak(db, count):
        filling = [{"role": "user", "content": "x" * 1000}]
        batch_id = await a_file_batch(db, written(*(line(f"T-{n}", messages=filling) for n in range(count))))
        tracemalloc.start()
        try:
            await tend(db, CONFIG)
            await intervene.cancel(db, batch_id=batch_id)
            await tend(db, CONFIG)
            assert (await now(db, batch_id)).state == "completed"
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    async def story(db):
        small = await peak(db, 500)
        assert await peak(db, 5_000) < 1.5 * small + 1_000_000

    play(database_url, story)


def test_a_batch_that_fails_its_check_is_told_as_finished(database_url):
    async def story(db):
        await webhooks.create(db, url="https://example.com/hook", events=["batch.finished"], tenant="default", private=False)
        batch_id = await a_file_batch(db, b"{oops\n")
        await tend(db, CONFIG)
        assert (await now(db, batch_id)).state == "failed"
        assert [row.subject_id for row in await rows(db, "SELECT subject_id FROM deliveries")] == [batch_id]

    play(database_url, story)
