"""Results of a batch: as they end, and on from where a client was cut off."""

import asyncio
import json
from array import array
from itertools import pairwise
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api import batches, follow, results
from api.results import Sent
from worker.job import new_id


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch):
    monkeypatch.setattr(results, "_FOLLOW_S", 0.01)


def a_batch(stage, rows, name="monday"):
    """A batch of queued jobs; their ids in the order of the file."""
    batch_id, ids = new_id(), [new_id() for _ in range(rows)]
    sql = "INSERT INTO batches (id, name, state, fingerprint, total) VALUES (:id, :name, 'open', '', :n)"
    stage.sql(sql, id=batch_id, name=name, n=rows)
    stage.sql(
        """INSERT INTO jobs (id, chain, lane, state, deadline_at, batch_id, ordinal)
           SELECT id, 'default', 'bulk', 'queued', now() + interval '1 hour', :batch, n
           FROM unnest(CAST(:ids AS uuid[])) WITH ORDINALITY AS t(id, n)""",
        batch=batch_id,
        ids=ids,
    )
    return batch_id, [str(job_id) for job_id in ids]


def finish(stage, ids, *ordinals):
    for ordinal in ordinals:
        stage.succeed(ids[ordinal - 1])
        stage.sql(
            "UPDATE batches b SET succeeded = succeeded + 1 FROM jobs j WHERE j.id = :id AND b.id = j.batch_id", id=UUID(ids[ordinal - 1])
        )


def read(stage, batch_id, cursor, most):
    """What a client reads that is cut off after `most` lines, spaces included."""

    async def story():
        lines = []
        stream = batches._lines(stage.client.app.state.parts.db, batch_id, Sent.until(cursor))
        async with asyncio.timeout(20):
            async for text in stream:
                lines.append(text)
                if sum(text.endswith("\n") for text in lines) == most:
                    break
        await stream.aclose()
        return "".join(lines)

    return stage.client.portal.call(story)


@pytest.mark.parametrize("cut_after", [1, 2, 3, 7])
def test_a_client_that_is_cut_off_again_and_again_gets_every_job(stage, cut_after, monkeypatch):
    monkeypatch.setattr(results, "_MARKS", 4)
    batch_id, ids = a_batch(stage, 20)
    orders = [(2, 3, 7), (1, 4, 8, 12), (5, 6, 9, 10, 11), (20, 19, 18, 17, 16, 15, 14, 13)]
    got, cursor = [], "0"
    for order in orders:
        finish(stage, ids, *order)
        wanted = len(order)
        while wanted > 0:
            part = [json.loads(line) for line in read(stage, batch_id, cursor, min(cut_after, wanted)).splitlines()]
            got += part
            wanted -= len(part)
            cursor = part[-1]["cursor"]
    rest = stage.client.get("/v1/batches/monday/results", params={"cursor": cursor})
    assert rest.text == ""
    assert {line["id"] for line in got} == set(ids)


def test_with_few_jobs_missing_nothing_is_sent_twice(stage):
    batch_id, ids = a_batch(stage, 30)
    finish(stage, ids, *(n for n in range(1, 31) if n not in (2, 9, 28)))
    first = [json.loads(line) for line in read(stage, batch_id, "0", 27).splitlines()]
    assert first[-1]["cursor"] == "30.2.9.28"
    finish(stage, ids, 2, 9, 28)
    second = stage.client.get("/v1/batches/monday/results", params={"cursor": first[-1]["cursor"]}).text.splitlines()
    assert [json.loads(line)["ordinal"] for line in second] == [2, 9, 28]


def test_with_many_jobs_missing_the_cursor_stays_short_and_only_later_rows_come_again(stage):
    batch_id, ids = a_batch(stage, 200)
    finish(stage, ids, *range(2, 201, 2))
    lines = [json.loads(line) for line in read(stage, batch_id, "0", 100).splitlines()]
    assert lines[-1]["cursor"] == "20.1.3.5.7.9.11.13.15.17.19"
    finish(stage, ids, *range(1, 201, 2))
    again = stage.client.get("/v1/batches/monday/results", params={"cursor": lines[-1]["cursor"]}).text.splitlines()
    ordinals = [json.loads(line)["ordinal"] for line in again]
    assert sorted(ordinals) == [*range(1, 20, 2), *range(21, 201)]


def test_it_goes_no_further_than_so_many_unfinished_jobs(stage, monkeypatch):
    monkeypatch.setattr(results, "_MARKS", 5)
    monkeypatch.setattr(results, "_MOST_MISSING", 8)
    batch_id, ids = a_batch(stage, 40)
    finish(stage, ids, 5, 10, 40)
    sent = Sent()

    left = [n for n in range(1, 41) if n not in (5, 10, 40)]

    async def story():
        seen = []
        async for row in results.as_they_end(stage.client.app.state.parts.db, batch_id, sent):
            assert len(sent.missing) < 8 + 5
            if row is not None:
                seen.append(row.ordinal)
            else:  # a second in which nothing more ended
                await asyncio.to_thread(finish, stage, ids, *left[:6])
                del left[:6]
        return seen

    seen = stage.client.portal.call(story)
    assert seen[:2] == [5, 10]
    assert sorted(seen) == list(range(1, 41))


def test_it_finds_what_ended_behind_any_number_of_jobs_that_have_not(stage, monkeypatch):
    monkeypatch.setattr(results, "_MARKS", 3)
    batch_id, ids = a_batch(stage, 50)
    finish(stage, ids, 49)
    (first,) = read(stage, batch_id, "0", 1).splitlines()
    assert json.loads(first)["ordinal"] == 49
    finish(stage, ids, 30, 50)
    rest = [json.loads(line)["ordinal"] for line in read(stage, batch_id, json.loads(first)["cursor"], 3).splitlines()]
    assert rest == [30, 49, 50]  # more than ten had not ended before it


def test_rows_that_nobody_asked_about_yet_are_not_remembered(stage, monkeypatch):
    monkeypatch.setattr(results, "_MARKS", 10)
    batch_id, ids = a_batch(stage, 50)
    finish(stage, ids, 1, 3)
    sent = Sent()

    async def story():
        async for row in results.as_they_end(stage.client.app.state.parts.db, batch_id, sent):
            if row is None:
                return

    stage.client.portal.call(story)
    assert (sent.front, list(sent.missing), sent.count) == (3, [2], 2)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    order=st.integers(1, 24).flatmap(lambda n: st.permutations(range(1, n + 1))),
    steps=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=6),
)
def test_in_whatever_order_jobs_end_and_wherever_it_is_cut_off_no_job_is_left_out(stage, order, steps):
    batch_id, ids = a_batch(stage, len(order), name=new_id().hex)
    ended, got, cursor = 0, [], "0"
    with pytest.MonkeyPatch.context() as small:
        small.setattr(results, "_MARKS", 3)
        small.setattr(results, "_PAGE", 2)
        for ends, most in [*steps, (len(order), 0)]:
            finish(stage, ids, *order[ended : ended + ends])
            ended = min(ended + ends, len(order))
            claims = Sent.until(cursor)
            due = [n for n in order[:ended] if n > claims.front or n in claims.missing]
            wanted = min(most, len(due))
            lines = [json.loads(line) for line in read(stage, batch_id, cursor, wanted).splitlines()] if wanted else []
            assert {line["ordinal"] for line in lines} <= set(due)
            got, cursor = got + [line["ordinal"] for line in lines], lines[-1]["cursor"] if lines else cursor
        stage.sql("UPDATE batches SET state = 'finished', finished_at = now() WHERE id = :id", id=batch_id)
        rest = stage.client.get(f"/v1/batches/{batch_id}/results", params={"cursor": cursor}).text.splitlines()
    got += [json.loads(line)["ordinal"] for line in rest]
    assert set(got) == set(order)
    if len(order) <= 11:
        assert len(got) == len(order)


def test_while_nothing_ends_spaces_keep_the_connection_and_each_line_stays_json(stage, monkeypatch):
    monkeypatch.setattr(follow, "BEAT_S", 0)
    batch_id, ids = a_batch(stage, 2)
    stage.succeed(ids[0])

    async def story():
        text = ""
        async for said in batches._lines(stage.client.app.state.parts.db, batch_id, Sent()):
            text += said
            if text.endswith("   "):
                await asyncio.to_thread(stage.succeed, ids[1])
        return text

    text = stage.client.portal.call(story)
    assert "\n   " in text
    assert [json.loads(line)["ordinal"] for line in text.splitlines()] == [1, 2]


def test_a_cursor_of_another_batch_ends_with_the_batch(stage):
    batch_id, ids = a_batch(stage, 2)
    finish(stage, ids, 1, 2)
    stage.sql("UPDATE batches SET state = 'finished', finished_at = now(), succeeded = 2 WHERE id = :id", id=batch_id)
    assert stage.client.get("/v1/batches/monday/results", params={"cursor": "900.3.800"}).text == ""


def test_a_cursor_that_was_made_up_sends_no_job_twice(stage):
    batch_id, ids = a_batch(stage, 5)
    finish(stage, ids, 1, 2, 3, 4, 5)
    stage.sql("UPDATE batches SET state = 'finished', finished_at = now() WHERE id = :id", id=batch_id)
    lines = stage.client.get("/v1/batches/monday/results", params={"cursor": "1.4.4.1.0"}).text.splitlines()
    assert [json.loads(line)["ordinal"] for line in lines] == [1, 2, 3, 4, 5]


def test_a_cursor_that_was_never_given_out_is_a_422(stage):
    a_batch(stage, 1)
    for cursor in ("", "x", "-1", "1.", "1..2", "1.2.x", ".".join(["1"] * 12), "9" * 19, "１"):
        response = stage.client.get("/v1/batches/monday/results", params={"cursor": cursor})
        assert (response.status_code, "cursor" in response.json()["detail"]) == (422, True), cursor


def test_an_answer_that_cannot_be_read_does_not_break_the_results_off(stage):
    _, ids = a_batch(stage, 3)
    finish(stage, ids, 1, 2, 3)
    stage.sql("UPDATE results SET answer = CAST('[]' AS jsonb) WHERE job_id = :id", id=UUID(ids[1]))
    lines = [json.loads(line) for line in stage.client.get("/v1/batches/monday/results").text.splitlines()]
    assert [(line["ordinal"], (line["error"] or {}).get("code")) for line in lines] == [(1, None), (2, "unreadable_answer"), (3, None)]
    assert lines[1]["result"] is None


@given(st.sets(st.integers(1, 60), max_size=40), st.integers(60, 80))
def test_a_cursor_never_claims_more_than_was_sent(missing, front):
    sent = Sent(front, array("q", sorted(missing)))
    again = Sent.until(sent.cursor)
    assert len(sent.cursor) < 200
    for ordinal in range(1, 81):
        claimed = ordinal <= again.front and ordinal not in again.missing
        assert not claimed or (ordinal <= front and ordinal not in missing)
    if len(missing) <= 10:
        assert again == sent
    assert all(one < other for one, other in pairwise(again.missing))
