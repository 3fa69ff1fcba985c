"""Server-sent events of jobs and batches: what is told, what is not told twice, and when it is over."""

import asyncio
import json
import threading
from uuid import UUID, uuid4

import pytest
from sqlalchemy import event

from api import follow
from worker.job import new_id


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch):
    monkeypatch.setattr(follow, "TICK_S", 0.01)


def told(text):
    """The events of a stream as (name, id, data); comments are left out."""
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if fields:
            found.append((fields["event"], fields["id"], json.loads(fields["data"])))
    return found


def move(stage, job_id, state, fence, code=None):
    """What a claim, or an attempt that ended without an answer, leaves behind."""
    stage.sql(
        """UPDATE jobs SET state = :state, fence = :fence, worker_id = CASE WHEN :state = 'running' THEN CAST(:worker AS uuid) END,
               error = CASE WHEN CAST(:code AS text) IS NOT NULL THEN jsonb_build_object('code', CAST(:code AS text)) END,
               finished_at = CASE WHEN :state IN ('failed', 'cancelled') THEN now() END WHERE id = :id""",
        id=UUID(job_id),
        state=state,
        fence=fence,
        worker=uuid4(),
        code=code,
    )


def a_batch(stage, *, total=10, state="open", **counts):
    batch_id = new_id()
    stage.sql(
        f"""INSERT INTO batches (id, name, state, fingerprint, total{"".join(f", {name}" for name in counts)})
            VALUES (:id, 'monday', :state, '', :total{"".join(f", :{name}" for name in counts)})""",
        id=batch_id,
        state=state,
        total=total,
        **counts,
    )
    return batch_id


class Script:
    """Steps of a story, each taken once the event before it was told."""

    def __init__(self, stage, *steps):
        self.stage, self.steps = stage, list(steps)

    def stream(self, look, seen=None):
        """What is told from the first look to the last event, a step taken after each event."""

        async def story():
            texts = []
            first = await look()
            async for said in follow.events(first, look, lambda: asyncio.sleep(0.001), seen):
                texts.append(said.decode())
                if self.steps:
                    await asyncio.to_thread(self.steps.pop(0))
            return "".join(texts)

        return self.stage.client.portal.call(story)


def test_a_job_is_told_of_state_by_state_and_the_last_event_is_the_whole_job(stage):
    job_id = stage.submit()["id"]
    script = Script(
        stage,
        lambda: move(stage, job_id, "running", 1),
        lambda: move(stage, job_id, "queued", 1, code="all_limited"),
        lambda: move(stage, job_id, "running", 2),
        lambda: stage.succeed(job_id),
    )
    events = told(script.stream(lambda: stage.client.app.state.parts.looks.job(UUID(job_id))))
    assert [(name, event_id) for name, event_id, _ in events] == [
        ("queued", "0.queued"),
        ("running", "1.running"),
        ("queued", "1.queued"),
        ("running", "2.running"),
        ("succeeded", "2.succeeded"),
    ]
    assert events[2][2] == {"state": "queued", "attempt": 1, "code": "all_limited"}
    assert events[-1][2] == stage.client.get(f"/v1/jobs/{job_id}").json()


def test_a_stream_ends_with_the_job(stage):
    job_id = stage.submit()["id"]
    threading.Timer(0.2, stage.succeed, [job_id]).start()
    response = stage.client.get(f"/v1/jobs/{job_id}/events")
    assert (response.status_code, response.headers["Content-Type"].partition(";")[0]) == (200, "text/event-stream")
    assert response.headers["Cache-Control"] == "no-cache"
    assert [name for name, _, _ in told(response.text)] == ["queued", "succeeded"]


def test_who_comes_back_is_told_only_of_what_differs(stage):
    job_id = stage.submit()["id"]
    threading.Timer(0.2, move, [stage, job_id, "failed", 1, "all_providers_failed"]).start()
    response = stage.client.get(f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": "0.queued"})
    ((name, event_id, data),) = told(response.text)
    assert (name, event_id, data["error"]["code"]) == ("failed", "1.failed", "all_providers_failed")
    over = stage.client.get(f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": event_id})
    assert (over.status_code, over.text) == (204, "")


def test_a_requeued_job_is_followed_again_by_who_saw_it_end(stage):
    job_id = stage.submit()["id"]
    move(stage, job_id, "failed", 1)
    assert stage.client.post(f"/v1/jobs/{job_id}/requeue").status_code == 202
    threading.Timer(0.2, stage.succeed, [job_id]).start()
    response = stage.client.get(f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": "1.failed"})
    assert [name for name, _, _ in told(response.text)] == ["queued", "succeeded"]


def test_a_batch_is_told_of_when_its_counts_change_and_when_it_is_finished(stage):
    batch_id = a_batch(stage)

    def now(change):
        return lambda: stage.sql(f"UPDATE batches SET {change} WHERE id = :id", id=batch_id)

    script = Script(stage, now("succeeded = 4, failed = 1"), now("succeeded = 9, state = 'finished', finished_at = now()"))
    events = told(script.stream(lambda: stage.client.app.state.parts.looks.batch(batch_id)))
    assert [(name, event_id) for name, event_id, _ in events] == [
        ("progress", "open.10.0.0.0.0"),
        ("progress", "open.10.4.1.0.0"),
        ("finished", "finished.10.9.1.0.0"),
    ]
    assert events[1][2]["succeeded"] == 4
    assert events[2][2]["finished_at"]


@pytest.mark.parametrize("by_id", [True, False])
def test_a_finished_batch_is_one_event_and_then_nothing(stage, by_id):
    batch_id = a_batch(stage, state="finished", succeeded=10)
    path = f"/v1/batches/{batch_id if by_id else 'monday'}/events"
    ((name, event_id, data),) = told(stage.client.get(path).text)
    assert (name, data["total"], data["succeeded"]) == ("finished", 10, 10)
    assert stage.client.get(path, headers={"Last-Event-ID": event_id}).status_code == 204
    earlier = stage.client.get(path, headers={"Last-Event-ID": "open.10.9.0.0.0"})
    assert [name for name, _, _ in told(earlier.text)] == ["finished"]


def test_a_silent_stream_shows_that_it_lives(stage, monkeypatch):
    monkeypatch.setattr(follow, "BEAT_S", 0.005)
    job_id = stage.submit()["id"]
    script = Script(stage, lambda: None, lambda: None, lambda: stage.succeed(job_id))
    text = script.stream(lambda: stage.client.app.state.parts.looks.job(UUID(job_id)))
    assert text.count(": still here\n\n") >= 2
    assert [name for name, _, _ in told(text)] == ["queued", "succeeded"]


class Clock(asyncio.SelectorEventLoop):
    """A loop whose time is what a story says."""

    now_s = 100.0

    def time(self):
        return self.now_s


def test_a_comment_comes_after_each_quarter_of_a_minute_without_an_event_and_no_sooner(monkeypatch):
    monkeypatch.setattr(follow, "TICK_S", 1.0)
    began_s = Clock.now_s

    async def story():
        clock = asyncio.get_running_loop()

        async def look():
            name = "queued" if clock.now_s < began_s + 40 else "running"
            return follow.Event(id=name, name=name, data="{}", last=clock.now_s >= began_s + 62)

        async def pause():
            clock.now_s += follow.until_next_look_s()

        told_of = follow.events(await look(), look, pause, "")
        return [(clock.now_s - began_s, said.split(b"\n")[0]) async for said in told_of]

    beat = b": still here"
    with asyncio.Runner(loop_factory=Clock) as runner:
        assert runner.run(story()) == [
            (0, b"event: queued"),
            (15, beat),
            (30, beat),
            (40, b"event: running"),
            (55, beat),
        ]


def test_all_who_follow_look_in_the_same_moment(monkeypatch):
    monkeypatch.setattr(follow, "TICK_S", 1.0)

    async def times():
        clock, found = asyncio.get_running_loop(), []
        for clock.now_s in (7.25, 7.5, 8.0):
            found.append(clock.now_s + follow.until_next_look_s())
        return found

    with asyncio.Runner(loop_factory=Clock) as runner:
        assert runner.run(times()) == [8.0, 8.0, 9.0]


def test_a_job_that_is_requeued_while_its_end_is_read_is_told_of_as_queued(stage, monkeypatch):
    job_id = stage.submit()["id"]
    move(stage, job_id, "failed", 1)
    read, reading = follow.reads.job, []

    async def read_late(db, wanted):
        if not reading:
            reading.append(wanted)
            await asyncio.to_thread(move, stage, job_id, "queued", 1)
        return await read(db, wanted)

    monkeypatch.setattr(follow.reads, "job", read_late)
    look = stage.client.app.state.parts.looks.job
    told_of = stage.client.portal.call(look, UUID(job_id))
    assert (reading, told_of.name, told_of.last) == ([UUID(job_id)], "queued", False)


def test_a_job_that_is_deleted_while_its_end_is_read_is_told_of_no_more(stage, monkeypatch):
    job_id = stage.submit()["id"]
    move(stage, job_id, "failed", 1)
    read = follow.reads.job

    async def read_late(db, wanted):
        await asyncio.to_thread(stage.sql, "DELETE FROM jobs WHERE id = :id", id=wanted)
        return await read(db, wanted)

    monkeypatch.setattr(follow.reads, "job", read_late)
    assert stage.client.portal.call(stage.client.app.state.parts.looks.job, UUID(job_id)) is None


def test_what_is_deleted_meanwhile_ends_its_stream(stage):
    job_id = stage.submit()["id"]
    script = Script(stage, lambda: stage.sql("DELETE FROM jobs WHERE id = :id", id=UUID(job_id)))
    text = script.stream(lambda: stage.client.app.state.parts.looks.job(UUID(job_id)))
    assert [name for name, _, _ in told(text)] == ["queued"]


def test_a_last_event_id_that_was_never_sent_is_a_422(stage):
    job_id = stage.submit()["id"]
    a_batch(stage)
    for path in (f"/v1/jobs/{job_id}/events", "/v1/batches/monday/events"):
        for sent in ("x", "1", "1.done", "open.1", "9" * 30 + ".queued", "1.queued.1"):
            response = stage.client.get(path, headers={"Last-Event-ID": sent})
            assert (response.status_code, "last-event-id" in response.json()["detail"]) == (422, True), sent


def test_another_tenants_job_and_batch_cannot_be_followed(stage):
    job_id = stage.submit()["id"]
    a_batch(stage)
    stranger = stage.key("other")
    for path in (f"/v1/jobs/{job_id}/events", "/v1/batches/monday/events", "/v1/batches/nothing/events", "/v1/jobs/%00/events"):
        assert stage.client.get(path, headers=stranger).status_code == 404


def test_a_thousand_followers_look_together(stage):
    ids = [new_id() for _ in range(1_000)]
    stage.sql(
        """INSERT INTO jobs (id, chain, lane, state, deadline_at) SELECT id, 'default', 'bulk', 'queued', now() + interval '1 hour'
           FROM unnest(CAST(:ids AS uuid[])) AS t(id)""",
        ids=ids,
    )
    parts = stage.client.app.state.parts
    statements = []
    event.listen(parts.db.sync_engine, "before_cursor_execute", lambda *given: statements.append(given[2]))

    async def story():
        return await asyncio.gather(*(parts.looks.job(job_id) for job_id in ids))

    assert {found.id for found in stage.client.portal.call(story)} == {"0.queued"}
    assert len([sql for sql in statements if "fence AS attempt" in sql]) <= 4
