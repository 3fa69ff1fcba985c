"""The oracle sees each thing that can go wrong, and only that: a sound story is broken in one place at a time."""

import asyncio
import json
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from decimal import Decimal
from uuid import UUID

import pytest
from checker import check, table, to_json
from history import History
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine
from stage import a_batch, a_call, a_job, a_worker, an_answer, ending, play, rows, take

from worker.calls import NewCall, open_calls
from worker.intervene import cancel
from worker.job import JobState, new_id
from worker.ledger import settle
from worker.rescue import MAX_DEATHS, rescue
from worker.settlement import MAX_ATTEMPTS
from worker.signals import Billing, Signal
from worker.simulator.bill import Line

NAMES = [f"I{number}" for number in range(1, 13)]
BOUNDS = {"redis_depth": 100, "rss": 1_000}


@dataclass
class Story:
    """A ledger, what the vendors say, and what was done. `ids` names jobs and calls by the part they play."""

    db: AsyncEngine
    history: History
    bill: list[Line] = field(default_factory=list)
    ids: dict[str, UUID] = field(default_factory=dict)

    def charge(self, call_id, outcome="answered", cost="0.25", provider="first"):
        line = Line(
            seq=len(self.bill) + 1, provider=provider, call_id=call_id and str(call_id), prompt="0" * 16, received_at=time.time(),
            outcome=outcome, status=200, input_tokens=3, output_tokens=5, cost=Decimal(cost), written=True,
        )  # fmt: skip
        self.bill.append(line)

    def line(self, call, **fields):
        """The bill's line of this call says something else."""
        self.bill = [replace(line, **fields) if line.call_id == str(self.ids[call]) else line for line in self.bill]

    def forget(self, *whats):
        """These events were never noted."""
        kept = [line for line in self.history.path.read_text().splitlines() if json.loads(line)["what"] not in whats]
        self.history.path.write_text("".join(f"{line}\n" for line in kept))

    async def sql(self, *statements):
        for statement in statements:
            await rows(self.db, statement, **{name: value for name, value in self.ids.items() if f":{name}" in statement})

    async def call(self, claimed, name, provider="first"):
        """One more call of the attempt is on the books."""
        self.ids[name] = new_id()
        call = NewCall(id=self.ids[name], job_id=claimed.job_id, fence=claimed.fence, provider=provider, model="m")
        await open_calls(self.db, [call])

    async def verdicts(self, **limits):
        return await check(self.db, self.bill, self.history, **{"bounds": BOUNDS, **limits})

    async def violated(self, **limits):
        return {verdict.name for verdict in await self.verdicts(**limits) if not verdict.ok}


async def a_story(db, directory):
    """A batch of five and two jobs alone, and one of a producer who never heard that it was accepted.

    `cancelled` was cancelled while it was queued. A worker died over `killed`, whose request had arrived, and `unheard`, whose had
    not. The first call of `late` timed out. `failed` met a server error. The rest was answered, after a fault had healed.
    """
    story = Story(db, History(directory / "history.jsonl"))
    _, ids = await a_batch(db, 5)
    story.ids = dict(zip(("plain", "killed", "unheard", "late", "cancelled"), ids, strict=True))
    story.ids |= {"alone": await a_job(db), "failed": await a_job(db)}
    story.history.note("accepted", job_ids=list(story.ids.values()))
    story.ids["stranger"] = await a_job(db)
    assert (await cancel(db, job_ids=[story.ids["cancelled"]])).cancelled == 1
    story.history.note("cancel_acknowledged", job_ids=[story.ids["cancelled"]])
    story.history.note("fault", name="redis frozen")
    await _a_worker_dies(story)
    story.history.note("sample", redis_depth=7, redis_bytes=5_000, rss={"one": 900, "two": 800})
    story.history.note("healed", name="redis frozen")
    await _the_rest_ends(story)
    return story


async def _a_worker_dies(story):
    held = await take(story.db, [story.ids["killed"], story.ids["unheard"]], await a_worker(story.db))
    story.ids |= {"orphan": held[0].opened_id, "never_sent": held[1].opened_id}
    story.charge(held[0].opened_id)
    story.history.note("killed", worker="one", held=[claimed.job_id for claimed in held], open_calls=2)
    await story.sql("UPDATE workers SET state = 'dead'")
    async with story.db.connect() as leader:
        assert len(await rescue(leader)) == 2


async def _the_rest_ends(story):
    names = ("plain", "killed", "unheard", "late", "failed", "alone")
    claims = dict(zip(names, await take(story.db, [story.ids[name] for name in names]), strict=True))
    late, failed = claims.pop("late"), claims.pop("failed")
    story.ids |= {"late_call": late.opened_id, "failed_call": failed.opened_id}
    await story.call(late, "again", "second")
    timed_out = replace(a_call(late.opened_id, Signal.TIMED_OUT), billing=Billing.UNKNOWN, cost_usd=None)
    refused = replace(a_call(failed.opened_id, Signal.SERVER_ERROR), billing=Billing.FREE, cost_usd=Decimal(0))
    settlements = [_answered(late, story.ids["again"], timed_out), ending(failed, calls=(refused,), counted=True)]
    for name, claimed in claims.items():
        await story.call(claimed, f"{name}_call")
        unsent = (claimed.opened_id,) if claimed.opened_id else ()
        settlements.append(replace(_answered(claimed, story.ids[f"{name}_call"]), unsent=unsent))
        story.charge(story.ids[f"{name}_call"])
    assert all(await settle(story.db, settlements))
    story.charge(late.opened_id, "slow")
    story.charge(story.ids["again"], provider="second")
    story.charge(failed.opened_id, "status", "0")


def _answered(claimed, call_id, *earlier):
    answer = an_answer()
    return ending(claimed, JobState.SUCCEEDED, answer=answer, calls=(*earlier, a_call(call_id, answer=answer)))


def told(database_url, directory, then):
    async def story(db):
        await then(await a_story(db, directory))

    play(database_url, story)


def test_a_sound_story_satisfies_every_invariant(database_url, tmp_path):
    async def then(story):
        verdicts = await story.verdicts()
        assert [(verdict.name, verdict.ok) for verdict in verdicts] == [(name, True) for name in NAMES], verdicts
        figures = {verdict.name: verdict.figure for verdict in verdicts}
        assert all(verdict.detail for verdict in verdicts)
        assert figures["I5"] == 1
        assert figures["I6"] == Decimal("1.25")
        assert 0 < figures["I12"] < 30

    told(database_url, tmp_path, then)


BY_SQL = [
    ("I1", "DELETE FROM jobs WHERE id = :alone"),
    ("I1", "UPDATE jobs SET state = 'queued', finished_at = NULL WHERE id = :failed"),
    ("I1", "UPDATE jobs SET state = 'running', finished_at = NULL, worker_id = id WHERE id = :failed"),
    ("I2", "DELETE FROM results WHERE job_id = :alone"),
    ("I2", "INSERT INTO results VALUES (:failed, 1, '{}')"),
    ("I2", "ALTER TABLE results DROP CONSTRAINT pk_results", "INSERT INTO results SELECT * FROM results WHERE job_id = :alone"),
    ("I2", "ALTER TABLE results DROP CONSTRAINT fk_results_job_id", "INSERT INTO results VALUES (gen_random_uuid(), 1, '{}')"),
    ("I3", "UPDATE results SET fence = fence - 1 WHERE job_id = :alone"),
    ("I3", "UPDATE results SET fence = fence + 1 WHERE job_id = :killed"),
    ("I4", "DELETE FROM provider_calls WHERE id = :late_call"),
    ("I4", "UPDATE provider_calls SET billing = 'billed' WHERE id = :never_sent"),
    ("I4", "UPDATE provider_calls SET outcome = 'server_error', billing = 'free' WHERE id = :never_sent"),
    ("I5", "UPDATE provider_calls SET outcome = 'cancelled' WHERE id = :late_call"),
    ("I6", "UPDATE provider_calls SET cost_usd = cost_usd + 0.000000000001 WHERE id = :plain_call"),
    ("I6", "UPDATE provider_calls SET cost_usd = NULL WHERE id = :plain_call"),
    ("I6", "UPDATE provider_calls SET cost_usd = 0 WHERE id = :never_sent"),
    ("I6", "UPDATE provider_calls SET provider = 'second' WHERE id = :plain_call"),
    ("I7", f"UPDATE jobs SET attempts = {MAX_ATTEMPTS + 1} WHERE id = :failed"),
    ("I7", f"UPDATE jobs SET deaths = {MAX_DEATHS + 1} WHERE id = :killed"),
    ("I2 I8", "INSERT INTO results VALUES (:cancelled, 0, '{}')"),
    *(("I9", f"UPDATE batches SET {name} = {name} + 1") for name in ("total", "succeeded", "degraded", "failed", "cancelled", "expired")),
    ("I9", "UPDATE batches SET succeeded = succeeded - 1, failed = failed + 1"),
    ("I9", "UPDATE batches SET state = 'open', finished_at = NULL"),
    ("I9", "UPDATE batches SET state = 'open'"),
    ("I9", "UPDATE batches SET state = 'loading'"),
    ("I9", "UPDATE batches SET finished_at = NULL"),
    ("I11", "UPDATE jobs SET fence = 0 WHERE id = :failed"),
    ("I11", "UPDATE provider_calls SET opened_at = opened_at + interval '1 hour' WHERE id = :orphan"),
    ("I11", "UPDATE provider_calls SET ended_at = ended_at + interval '1 minute' WHERE id = :late_call"),
    ("I11", "UPDATE provider_calls SET outcome = NULL WHERE id = :never_sent"),
    ("I11", "UPDATE provider_calls SET outcome = NULL, job_id = id WHERE id = :never_sent"),
    ("I11", "UPDATE provider_calls SET outcome = NULL, job_id = :stranger, fence = 0 WHERE id = :never_sent"),
    ("I11", "UPDATE jobs SET state = 'running', worker_id = id, fence = 2 WHERE id = :stranger",
     "UPDATE provider_calls SET outcome = NULL, job_id = :stranger WHERE id = :never_sent"),
    ("I11", "ALTER TABLE jobs DROP CONSTRAINT ck_jobs_state", "UPDATE jobs SET state = 'done' WHERE id = :stranger"),
    ("I11", "ALTER TABLE jobs DROP CONSTRAINT ck_jobs_held_while_running", "UPDATE jobs SET worker_id = id WHERE id = :failed"),
    ("I11", "ALTER TABLE jobs DROP CONSTRAINT ck_jobs_finished_when_ended", "UPDATE jobs SET finished_at = NULL WHERE id = :failed"),
    ("I12", "UPDATE jobs SET finished_at = finished_at + interval '1 hour'"),
]  # fmt: skip


@pytest.mark.parametrize(("violated", "statements"), [(names, statements) for names, *statements in BY_SQL])
def test_what_is_broken_in_the_ledger_is_seen(database_url, tmp_path, violated, statements):
    async def then(story):
        await story.sql(*statements)
        assert await story.violated() == set(violated.split())

    told(database_url, tmp_path, then)


def a_line_is_missing(story):
    story.bill = [line for line in story.bill if line.call_id != str(story.ids["plain_call"])]


def both_requests_had_arrived_but_one_call_was_open(story):
    story.charge(story.ids["never_sent"])
    story.history.path.write_text(story.history.path.read_text().replace('"open_calls": 2', '"open_calls": 1'))


def nothing_waits_but_what_never_ends(story):
    story.history.note("accepted", job_ids=[story.ids["stranger"]])
    story.history.note("healed", name="postgres stopped")


BY_WITNESS = [
    ("I4", lambda story: story.charge(None)),
    ("I4", lambda story: story.charge(new_id())),
    ("I4", lambda story: story.charge(story.ids["failed_call"], "status", "0")),
    ("I4", a_line_is_missing),
    ("I4 I5 I6", lambda story: story.charge(story.ids["plain_call"], "answered", "0.000001")),
    ("I5", lambda story: story.forget("killed")),
    ("I5", both_requests_had_arrived_but_one_call_was_open),
    ("I6", lambda story: story.line("plain_call", cost=Decimal("0.250000000001"))),
    ("I6", lambda story: story.line("plain_call", provider="second")),
    ("I6", lambda story: story.line("failed_call", cost=Decimal("0.25"))),
    ("I1", lambda story: story.history.note("accepted", job_ids=[new_id()])),
    ("I8", lambda story: story.history.note("cancel_acknowledged", job_ids=[story.ids["plain"]])),
    ("I10", lambda story: story.history.note("sample", redis_depth=101)),
    ("I10", lambda story: story.history.note("sample", rss={"one": 3, "two": 1_001})),
    ("I10", lambda story: story.history.note("sample", redis_bytes=5_000, bounds={"redis_bytes": 4_999})),
    ("I10", lambda story: story.forget("sample")),
    ("I1 I12", nothing_waits_but_what_never_ends),
]


@pytest.mark.parametrize(("violated", "breaking"), BY_WITNESS)
def test_what_bill_and_history_hold_against_the_ledger_is_seen(database_url, tmp_path, violated, breaking):
    async def then(story):
        breaking(story)
        assert await story.violated() == set(violated.split())

    told(database_url, tmp_path, then)


@pytest.mark.parametrize(
    ("violated", "limits"),
    [
        ("I7", {"max_attempts": 0}),
        ("I7", {"max_deaths": 0}),
        ("I10", {"bounds": {"redis_depth": 6}}),
        ("I10", {"bounds": {"disk": 1}}),
        ("I12", {"recovery_s": 0}),
    ],
)
def test_limits_are_those_the_caller_names(database_url, tmp_path, violated, limits):
    async def then(story):
        assert await story.violated(**limits) == {violated}

    told(database_url, tmp_path, then)


def test_a_batch_is_not_finished_before_its_jobs(database_url, tmp_path):
    async def then(story):
        await a_batch(story.db, 2, "tuesday")
        assert await story.violated() == set()
        await story.sql("UPDATE batches SET state = 'finished', finished_at = now() WHERE name = 'tuesday'")
        assert await story.violated() == {"I9"}

    told(database_url, tmp_path, then)


def test_a_batch_that_takes_more_rows_is_not_over_although_its_jobs_are(database_url, tmp_path):
    async def then(story):
        await story.sql("UPDATE batches SET state = 'loading', finished_at = NULL")
        assert await story.violated() == set()

    told(database_url, tmp_path, then)


def test_a_call_may_be_open_while_its_attempt_runs(database_url, tmp_path):
    async def then(story):
        await take(story.db, [story.ids["stranger"]])
        assert await rows(story.db, "SELECT FROM provider_calls WHERE outcome IS NULL")
        assert await story.violated() == set()

    told(database_url, tmp_path, then)


def test_a_death_explains_one_further_answer_for_each_job_it_held(database_url, tmp_path):
    async def then(story):
        story.charge(story.ids["never_sent"])
        assert await story.violated() == set()
        a_second = "INSERT INTO provider_calls (id, job_id, fence, provider, model, opened_at, outcome) VALUES "
        await story.sql(f"{a_second} (:cancelled, :killed, 1, 'first', 'm', 'epoch', 'orphaned')")
        assert await story.violated() == set()
        story.line("never_sent", outcome="hang", cost=Decimal(0))
        story.charge(story.ids["cancelled"])
        assert await story.violated() == {"I5"}

    told(database_url, tmp_path, then)


@pytest.mark.parametrize(("outcome", "cost"), [("malformed", Decimal("0.25")), ("answered", Decimal(0))])
def test_only_an_answer_that_was_charged_is_paid_twice(database_url, tmp_path, outcome, cost):
    async def then(story):
        await story.sql("UPDATE provider_calls SET outcome = 'cancelled' WHERE id = :late_call")
        story.line("late_call", outcome=outcome, cost=cost)
        assert await story.violated() == set()

    told(database_url, tmp_path, then)


def test_where_the_ledger_was_away_at_a_death_the_orphaned_rows_tell_what_was_open(database_url, tmp_path):
    async def then(story):
        story.forget("killed")
        story.history.note("killed", worker="one", held=[], open_calls=None)
        assert await story.violated() == set()
        await story.sql("UPDATE provider_calls SET outcome = 'cancelled' WHERE id = :late_call")
        assert await story.violated() == {"I5"}

    told(database_url, tmp_path, then)


@pytest.mark.parametrize(
    ("violated", "faults"),
    [
        (set(), [(1, 3_599)]),
        (set(), [(-5, 3_599)]),
        (set(), [(1, 2_000), (1_500, 3_599)]),
        ({"I12"}, [(1, 3_500)]),
        ({"I12"}, [(-5, -1)]),
        ({"I12"}, [(3_700, 7_300)]),
    ],
)
def test_time_under_another_fault_is_no_part_of_the_recovery(database_url, tmp_path, violated, faults):
    async def then(story):
        (healed,) = story.history.events("healed")
        await story.sql(f"UPDATE jobs SET finished_at = to_timestamp({healed['wall_s'] + 3_600}) WHERE finished_at IS NOT NULL")
        for number, (from_s, to_s) in enumerate(faults):
            story.history.note("fault", name=f"fault {number}", wall_s=healed["wall_s"] + from_s)
            story.history.note("healed", name=f"fault {number}", wall_s=healed["wall_s"] + to_s)
        assert await story.violated() == violated

    told(database_url, tmp_path, then)


def test_a_fault_that_heals_when_nobody_waits_asks_for_no_recovery(database_url, tmp_path):
    async def then(story):
        story.history.note("fault", name="redis emptied")
        story.history.note("healed", name="redis emptied")
        story.history.note("accepted", job_ids=[story.ids["stranger"]])
        await story.sql("UPDATE jobs SET state = 'expired', finished_at = now() + interval '1 hour' WHERE id = :stranger")
        assert await story.violated() == set()

    told(database_url, tmp_path, then)


def test_more_jobs_are_checked_by_no_more_statements(database_url, tmp_path):
    async def then(story):
        with counted(story.db) as few:
            await story.verdicts()
        _, ids = await a_batch(story.db, 300, "tuesday")
        story.history.note("accepted", job_ids=ids)
        with counted(story.db) as many:
            (lost, *rest) = await story.verdicts()
        assert (lost.ok, lost.figure, all(verdict.ok for verdict in rest)) == (False, 300, True)
        assert len(lost.detail) < 500
        assert len(many) == len(few) > 0

    told(database_url, tmp_path, then)


@contextmanager
def counted(db):
    statements = []

    def note(*arguments):
        statements.append(arguments[2])

    event.listen(db.sync_engine, "before_cursor_execute", note)
    try:
        yield statements
    finally:
        event.remove(db.sync_engine, "before_cursor_execute", note)


def test_verdicts_are_shown_to_people_and_as_json(database_url, tmp_path, capsys):
    async def then(story):
        await story.sql("DELETE FROM results WHERE job_id = :alone")
        verdicts = await story.verdicts()
        table(verdicts)
        header, *lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
        assert header[:3] == ["invariant", "verdict", "figure"]
        assert [line[:2] for line in lines] == [[name, "failed" if name == "I2" else "ok"] for name in NAMES]
        document = json.loads(json.dumps(to_json(verdicts), allow_nan=False))
        assert [one["name"] for one in document] == NAMES
        assert document[1]["ok"] is False
        assert str(story.ids["alone"]) in document[1]["detail"]
        assert document[5]["figure"] == "1.25"
        assert all(one["claim"] for one in document)

    told(database_url, tmp_path, then)


def test_a_history_is_on_the_file_at_once_and_goes_on_where_it_ended(tmp_path):
    path = tmp_path / "history.jsonl"
    history = History(path)
    job_id = new_id()
    history.note("accepted", job_ids=[job_id])
    assert json.loads(path.read_text())["job_ids"] == [str(job_id)]
    history.note("fault", name="ünusual\nname")
    again = History(path)
    again.note("healed", name="ünusual\nname")
    assert [(one["seq"], one["what"]) for one in again.events()] == [(1, "accepted"), (2, "fault"), (3, "healed")]
    assert [one["name"] for one in history.events("healed")] == ["ünusual\nname"]
    assert all(isinstance(one[name], float) for one in history.events() for name in ("wall_s", "monotonic_s"))


def test_events_noted_by_many_threads_are_all_there(tmp_path):
    history = History(tmp_path / "history.jsonl")

    async def noted():
        await asyncio.gather(*(asyncio.to_thread(history.note, "finished", count=count) for count in range(200)))

    asyncio.run(noted())
    assert {one["count"] for one in history.events("finished")} == set(range(200))
    assert sorted(one["seq"] for one in history.events()) == list(range(1, 201))
