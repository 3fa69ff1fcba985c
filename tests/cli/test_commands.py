"""Commands as people and scripts meet them: exit codes, one clear line on stderr, and stdout that holds the data alone."""

from __future__ import annotations

import csv
import io
import json
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import stage
from sqlalchemy.ext.asyncio import AsyncEngine

from worker import submit as submitting
from worker.job import JobState, new_id
from worker.ledger import settle

NOBODY = str(UUID(int=0))
TICKETS = "id,body\n7,printer on fire\n8,forgot my password\n"
OUTCOME = ["answer", "state", "provider", "model", "degraded", "cost_usd", "error"]
HEARTBEAT = "INSERT INTO workers (id, host, pid, lanes, slots, state) VALUES (:id, 'here', 1, 'interactive,bulk', 1, 'live')"


def sql(database_url: str, statement: str, **values: Any) -> list[Any]:
    found: list[Any] = []

    async def asked(db: AsyncEngine) -> None:
        found.extend(await stage.rows(db, statement, **values))

    stage.play(database_url, asked)
    return found


def a_batch(database_url: str, states: Sequence[JobState | None], name: str = "monday") -> list[str]:
    """Ids of the jobs of a batch that ended so, each after one call; None is still queued."""
    made: list[str] = []

    async def played(db: AsyncEngine) -> None:
        _, ids = await stage.a_batch(db, len(states), name)
        for job_id, state in zip(ids, states, strict=True):
            if state is None:
                continue
            (claimed,) = await stage.take(db, [job_id])
            assert claimed.opened_id is not None
            if state is JobState.SUCCEEDED:
                await settle(db, [stage.answered(claimed, "hi")])
            else:
                error = {"code": "all_failed", "message": "nobody answered", "providers": []}
                calls = (stage.a_call(claimed.opened_id, stage.Signal.OVERLOADED),)
                await settle(db, [stage.ending(claimed, state, calls=calls, error=error)])
        made.extend(map(str, ids))

    stage.play(database_url, played)
    return made


def states(database_url: str) -> list[str]:
    return [row.state for row in sql(database_url, "SELECT state FROM jobs ORDER BY ordinal")]


@pytest.fixture
def tickets(here: Path) -> Path:
    file = here / "tickets.csv"
    file.write_text(TICKETS)
    return file


# What a user's mistake looks like.


def check_complaint(ended: Any, code: int, complaint: str) -> None:
    assert (ended.code, ended.out) == (code, "")
    (line,) = [line for line in ended.err.splitlines() if complaint in line]
    assert line.startswith(("backstop: ", "Error: "))
    if line.startswith("backstop: "):
        assert ended.err == line + "\n"


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["enqueue", "nowhere.csv"], 5, "nowhere.csv"),
        (["enqueue", "tickets.csv", "--prompt", "wrong.toml"], 2, "the file has no column 'bodi', did you mean 'body'?"),
        (["enqueue", "tickets.csv", "--prompt", "nowhere.toml"], 2, "no template nowhere.toml"),
        (["enqueue", "tickets.csv", "--id-column", "nr"], 2, "no column 'nr'; there are: id, body"),
        (["enqueue", "tickets.csv", "--chain", "defualt"], 2, "no chain or provider 'defualt', did you mean 'default'?"),
        (["enqueue", "tickets.csv", "--out", "nowhere/out.csv"], 2, "there is no directory nowhere"),
        pytest.param(["enqueue", "tickets.csv", "--out", "."], 2, "--out"),
        (["enqueue", "-"], 2, "stdin is empty"),
        (["chat", "hello", "--chain", "nobody"], 2, "no chain or provider 'nobody'"),
        (["chat", "-"], 2, "there is nothing to ask"),
        (["costs", "--since", "yesterday"], 2, "write a number and m, h, d or w"),
        (["providers", "open", "nobody"], 5, "no provider 'nobody'; there are: steady, broken"),
        pytest.param(["providers", "open"], 2, "which provider? "),
        (["lanes", "pause"], 2, "pause which lane?"),
        (["jobs", "--state", "lost"], 2, "'lost' is not one of"),
        (["jobs", "--since", "yesterday"], 2, "write a number and m, h, d or w"),
        (["jobs", "--since", ""], 2, "write a number and m, h, d or w"),
        (["retry"], 2, "retry what? Name a batch or a job, or select jobs: --state, --code, --batch, --chain, --since"),
        (["retry", "--dry-run"], 2, "retry what?"),
        (["retry", "--state", "succeeded"], 2, "'succeeded' is not one of"),
        (["retry", "--since", "2"], 2, "write a number and m, h, d or w"),
        (["retry", "monday", "--batch", "tuesday"], 2, "retry monday or --batch tuesday? Name one of them"),
        (["no-such-command"], 2, "no-such-command"),
    ],
)
def test_what_was_typed_wrong_is_told_in_one_line_before_any_server_is_asked(
    arguments, code, complaint, command, tickets, here, monkeypatch
):
    monkeypatch.setenv("DATABASE_URL", "postgresql://127.0.0.1:1/nothing")
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1/0")
    (here / "wrong.toml").write_text('user = "{{ bodi }}"\n')
    check_complaint(command(*arguments), code, complaint)


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["watch", "nothing"], 5, "no batch or job 'nothing'"),
        (["watch", "\udcff"], 5, "no batch"),
        (["results", "nothing"], 5, "no batch or job 'nothing'"),
        (["results", NOBODY], 5, "no batch or job"),
        (["retry", "nothing"], 5, "no batch or job 'nothing'"),
        (["retry", "", "--state", "failed"], 5, "no batch or job ''"),
        (["retry", "--batch", ""], 5, "no batch ''"),
        (["retry", "--batch", "nothing"], 5, "no batch 'nothing'"),
        (["cancel", "nothing"], 5, "no batch or job 'nothing'"),
        (["job", "nothing"], 5, "no job 'nothing'"),
        (["job", NOBODY], 5, "no job"),
        (["jobs", "--batch", "nothing"], 5, "no batch 'nothing'"),
        (["keys", "revoke", "nothing"], 5, "no working key 'nothing'"),
        (["keys", "create", " "], 2, "1 to 100 printable characters"),
    ],
)
def test_what_is_not_in_the_ledger_is_told_in_one_line(arguments, code, complaint, backstop):
    check_complaint(backstop(*arguments), code, complaint)


@pytest.mark.parametrize("arguments", [["jobs"], ["chat", "hello"], ["enqueue", "tickets.csv"], ["db", "check"], ["keys", "list"]])
def test_a_database_that_does_not_answer_is_exit_69_and_nothing_of_its_url_is_shown(arguments, command, tickets, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        monkeypatch.setenv("DATABASE_URL", f"postgresql://me:hidden-password@127.0.0.1:{port}/nothing")
        monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1/0")
        ended = command(*arguments)
    assert (ended.code, ended.out) == (69, "")
    (line,) = ended.err.splitlines()
    assert line.startswith("backstop: Postgres does not answer: ")
    assert "DATABASE_URL" in line
    assert "hidden-password" not in line


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("mysql://me:hidden-password@127.0.0.1/x", "DATABASE_URL must be a postgresql:// URL"),
        ("nonsense", "DATABASE_URL is not a URL"),
        pytest.param("", "REDIS_URL"),
    ],
)
def test_a_url_that_is_none_is_exit_2_and_is_not_shown(url, complaint, backstop, monkeypatch):
    monkeypatch.setenv(*(("DATABASE_URL", url) if url else ("REDIS_URL", "http://me:hidden-password@127.0.0.1")))
    ended = backstop("jobs")
    assert (ended.code, ended.out) == (2, "")
    (line,) = ended.err.splitlines()
    assert complaint in line
    assert "hidden-password" not in line


def test_without_redis_files_are_taken_and_what_is_unknown_is_said(backstop, tickets, database_url, monkeypatch):
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1/0")
    assert backstop("enqueue", "tickets.csv").code == 0
    assert states(database_url) == ["queued", "queued"]
    health = backstop("providers", "--json")
    assert (health.code, [row["breaker"]["local"] for row in health.json()]) == (0, [True, True])
    assert "Redis does not answer" in health.err
    forced = backstop("providers", "open", "steady")
    assert (forced.code, forced.out) == (69, "")
    assert "REDIS_URL" in forced.err


def test_a_schema_that_is_missing_is_exit_69_with_the_command_that_makes_it(backstop, database_url):
    sql(database_url, "DROP TABLE alembic_version")
    ended = backstop("jobs")
    assert (ended.code, ended.out) == (69, "")
    assert ended.err.count("\n") == 1
    assert "run `backstop db upgrade`" in ended.err
    checked = backstop("db", "check", "--json")
    assert (checked.code, checked.json()["ok"], checked.err) == (1, False, "")
    assert "backstop db upgrade" in checked.json()["problem"]


@pytest.mark.parametrize(
    "arguments", [["config", "check"], ["config", "show"], ["chat", "hello"], ["enqueue", "tickets.csv"], ["providers"]]
)
def test_an_unknown_key_of_the_configuration_is_named_with_the_one_that_was_meant(arguments, command, tickets, here):
    config = here / "backstop.toml"
    config.write_text(config.read_text().replace("model =", "modell =", 1))
    ended = command(*arguments)
    assert (ended.code, ended.out) == (2, "")
    assert "backstop.toml: unknown key providers.steady.modell, did you mean 'model'?" in ended.err


def test_no_configuration_is_told_with_what_to_do(command, here):
    (here / "backstop.toml").unlink()
    ended = command("config", "check")
    assert (ended.code, ended.out) == (2, "")
    assert "set BACKSTOP_CONFIG" in ended.err


# Jobs in.


def test_a_dry_run_shows_the_first_prompt_and_submits_nothing(backstop, tickets, here, database_url):
    (here / "ask.toml").write_text('system = "Be brief."\nuser = "Ticket {{ id }}: {{ body }}"\n')
    ended = backstop("enqueue", "tickets.csv", "--prompt", "ask.toml", "--dry-run")
    assert ended.code == 0
    assert "Be brief." in ended.out
    assert "Ticket 7: printer on fire" in ended.out
    assert "password" not in ended.out + ended.err
    assert "nothing was submitted; 2 of 2 rows can be sent" in ended.err
    body = backstop("enqueue", "tickets.csv", "--prompt", "ask.toml", "--dry-run", "--json").json()
    assert body["counts"] == {"rows": 2, "empty": 0, "replaced": 0}
    assert body["first"]["messages"][1] == {"role": "user", "content": "Ticket 7: printer on fire"}
    assert sql(database_url, "SELECT FROM jobs UNION ALL SELECT FROM batches") == []


def test_a_dry_run_names_the_rows_that_would_fail(backstop, database_url):
    ended = backstop("enqueue", "-", "--dry-run", stdin="id,body\n1,a\n2,b,c\n3,d\n")
    assert ended.code == 0
    assert "row 2 would fail: expected 2 fields as in the header, found 3" in ended.err
    assert "2 of 3 rows can be sent" in ended.err


def test_the_same_file_and_batch_again_submit_nothing_new(backstop, tickets, database_url):
    first = backstop("enqueue", "tickets.csv", "--batch", "monday", "--json")
    assert first.code == 0
    assert (first.json()["total"], first.json()["state"]) == (2, "open")
    again = backstop("enqueue", "tickets.csv", "--batch", "monday", "--json")
    assert again.code == 0
    assert "complete already: nothing was submitted again" in again.err
    assert again.json() == first.json()
    assert states(database_url) == ["queued", "queued"]
    other = backstop("enqueue", "tickets.csv", "--batch", "monday", "--id-column", "id")
    assert other.code == 2
    assert "batch 'monday' exists and was made from another file" in other.err


def test_a_file_that_breaks_off_is_mended_and_goes_on_with_each_row_once(backstop, tickets, database_url, monkeypatch):
    monkeypatch.setattr(submitting, "CHUNK", 2)
    whole = "id,body\n" + "".join(f"{n},row {n}\n" for n in range(1, 8))
    tickets.write_text(whole.replace("5,row", '5,"row'))
    broken = backstop("enqueue", "tickets.csv", "--batch", "monday", "--id-column", "id", "--json")
    assert (broken.code, broken.out) == (2, "")
    assert "tickets.csv, row 5" in broken.err
    assert "never closed" in broken.err
    assert "4 rows were submitted before this; run it again with --batch monday" in broken.err
    assert states(database_url) == ["queued"] * 4

    tickets.write_text(whole)
    mended = backstop("enqueue", "tickets.csv", "--batch", "monday", "--id-column", "id", "--json")
    assert mended.code == 0
    assert "goes on where it broke off" in mended.err
    assert "submitted 3 jobs" in mended.err
    assert (mended.json()["total"], mended.json()["state"]) == (7, "open")
    rows = sql(database_url, "SELECT j.custom_id, r.row FROM jobs j JOIN job_requests r ON r.job_id = j.id ORDER BY j.ordinal")
    assert [(row.custom_id, row.row["body"]) for row in rows] == [(str(n), f"row {n}") for n in range(1, 8)]


def test_openai_batch_lines_keep_their_ids_and_models(backstop, database_url):
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [{"role": "user", "content": "x"}]}}
    unknown = line | {"custom_id": "b", "body": {**line["body"], "model": "nobody"}}
    ended = backstop("enqueue", "-", "--batch", "lines", "--json", stdin=f"{json.dumps(line)}\n{json.dumps(unknown)}\n")
    assert ended.code == 0
    rows = sql(database_url, "SELECT custom_id, state, error FROM jobs ORDER BY ordinal")
    assert [(row.custom_id, row.state) for row in rows] == [("a", "queued"), ("b", "failed")]
    assert "no chain or provider 'nobody'" in rows[1].error["message"]
    refused = backstop("results", "lines", "--format", "csv")
    assert (refused.code, refused.out) == (2, "")
    assert "use --format jsonl" in refused.err


def test_chat_that_does_not_wait_prints_the_id_of_its_job(backstop, database_url):
    plain, as_json = backstop("chat", "hello", "--wait", "0"), backstop("chat", "-", "--wait", "0", "--json", stdin="hello")
    assert (plain.code, as_json.code) == (0, 0)
    ids = {str(row.id) for row in sql(database_url, "SELECT id FROM jobs WHERE lane = 'interactive' AND state = 'queued'")}
    assert {plain.out.strip(), as_json.json()["id"]} == ids


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_chat_that_nobody_answers_in_time_is_exit_4_and_its_job_goes_on(flags, backstop, database_url):
    sql(database_url, HEARTBEAT, id=new_id())  # a worker that lives and takes no job
    ended = backstop("chat", "hello", "--wait", "0.05", *flags)
    (job,) = sql(database_url, "SELECT id, state FROM jobs")
    assert (ended.code, job.state) == (4, "queued")
    assert ended.err == f"backstop: no answer within 0.05 s; it goes on: backstop job {job.id}\n"
    assert (ended.json()["id"] == str(job.id)) if flags else (ended.out == "")


def test_enqueue_waits_for_all_answers_and_writes_them_beside_the_columns_of_the_file(backstop, tickets, here):
    (here / "ask.toml").write_text("""
user = "{{ body }}"
[schema]
type = "object"
additionalProperties = false
required = ["urgency"]
properties.urgency = { type = "string", enum = ["low", "high"] }
""")
    ended = backstop("enqueue", "tickets.csv", "--prompt", "ask.toml", "--batch", "all", "--out", "out.csv", "--json")
    assert ended.code == 0, ended.err
    assert (ended.json()["state"], ended.json()["succeeded"], ended.json()["total"]) == ("finished", 2, 2)
    header, *rows = csv.reader(io.StringIO((here / "out.csv").read_text()))
    assert header == ["id", "body", *OUTCOME, "urgency"]
    assert [row[:2] for row in rows] == [["7", "printer on fire"], ["8", "forgot my password"]]
    for row in rows:
        answer, state, provider, model, degraded, cost_usd, error, urgency = row[2:]
        assert (state, provider, model, degraded, error) == ("succeeded", "steady", "sim-steady", "", "")
        assert float(cost_usd) > 0
        assert urgency == json.loads(answer)["urgency"]
    written = backstop("results", "all")
    assert written.code == 0
    assert written.out == (here / "out.csv").read_bytes().decode()


def test_a_worker_that_runs_already_answers_and_what_a_provider_refuses_is_told(backstop, tickets, database_url):
    async def lives(db: AsyncEngine) -> None:
        await stage.until(db, "SELECT FROM workers WHERE state = 'live'")

    with subprocess.Popen([sys.executable, "-m", "worker", "worker"], stderr=subprocess.DEVNULL) as worker:
        try:
            stage.play(database_url, lives)
            answered = backstop("chat", "hello", "--wait", "60")
            refused = backstop("chat", "hello", "--wait", "60", "--chain", "broken", "--json")
            partly = backstop("enqueue", "tickets.csv", "--batch", "b", "--chain", "broken", "--wait", "--json")
        finally:
            worker.terminate()
    assert answered.code == 0
    assert answered.out.strip()
    assert "starting one" not in answered.err
    assert "(steady, sim-steady, " in answered.err
    assert (refused.code, refused.json()["state"]) == (1, "failed")
    assert f"job {refused.json()['id']} failed: " in refused.err
    assert (partly.code, partly.json()["failed"], partly.json()["state"]) == (3, 2, "finished")
    assert "2 of 2 have no full answer: backstop results b" in partly.err
    timeline = backstop("job", refused.json()["id"], "--json").json()["calls"]
    assert [(call["provider"], call["http_status"], call["cost_usd"]) for call in timeline] == [("broken", 400, "0")]


# Jobs out.


def test_results_of_a_batch_with_failed_jobs_are_whole_and_exit_3(backstop, database_url):
    ids = a_batch(database_url, [JobState.SUCCEEDED, JobState.FAILED, None])
    ended = backstop("results", "monday", "--format", "jsonl")
    assert ended.code == 3
    assert ended.err == "backstop: 2 of 3 have no full answer\n"
    lines = [json.loads(line) for line in ended.out.splitlines()]
    assert [set(line) for line in lines] == [{"id", "custom_id", "response", "error"}] * 3
    assert [(line["id"], line["custom_id"]) for line in lines] == list(zip(ids, ["monday-1", "monday-2", "monday-3"], strict=True))
    assert lines[0]["response"]["body"]["choices"][0]["message"]["content"] == "hi"
    assert [line["error"] and line["error"]["code"] for line in lines] == [None, "all_failed", "not_finished"]


def test_results_go_into_a_file_of_the_shape_its_name_says(backstop, tickets, here):
    assert backstop("enqueue", "tickets.csv", "--batch", "b", "--id-column", "id").code == 0
    for name in ("out.csv", "out.jsonl"):
        ended = backstop("results", "b", "--out", name)
        assert (ended.code, ended.out) == (3, "")
        assert f"results: {name}" in ended.err
    header, *rows = csv.reader(io.StringIO((here / "out.csv").read_text()))
    assert header == ["id", "body", *OUTCOME]
    assert [row[3] for row in rows] == ["queued", "queued"]
    assert [json.loads(line)["custom_id"] for line in (here / "out.jsonl").read_text().splitlines()] == ["7", "8"]


def test_a_batch_is_found_by_its_name_and_by_its_id(backstop, database_url):
    a_batch(database_url, [JobState.SUCCEEDED])
    by_name = backstop("watch", "monday", "--json")
    by_id = backstop("watch", by_name.json()["id"], "--json")
    assert (by_name.code, by_id.code) == (0, 0)
    assert by_name.json() == by_id.json()
    assert backstop("watch", "monday").out == "batch monday finished: 1 answered, 0 failed, 0 cancelled, 0 expired, 0 to go\n"


@pytest.mark.parametrize("command_name", ["watch", "results"])
def test_what_has_failed_is_exit_3_of_a_batch_and_of_a_job(command_name, backstop, database_url):
    good, bad = a_batch(database_url, [JobState.SUCCEEDED, JobState.FAILED])
    assert backstop(command_name, "monday").code == 3
    ended = backstop(command_name, bad, "--json")
    assert (ended.code, ended.json()["state"]) == (3, "failed")
    assert backstop(command_name, good, "--json").code == 0


def test_jobs_are_listed_by_state_and_batch_newest_first(backstop, database_url):
    ids = a_batch(database_url, [JobState.SUCCEEDED, JobState.FAILED, None])
    a_batch(database_url, [None], "tuesday")
    listed = backstop("jobs", "--batch", "monday", "--json").json()
    assert [job["id"] for job in listed] == ids[::-1]
    assert [job["id"] for job in backstop("jobs", "--state", "failed", "--json").json()] == [ids[1]]
    assert len(backstop("jobs", "--limit", "2", "--json").json()) == 2
    table = [line.split("\t") for line in backstop("jobs").out.splitlines()]
    assert table[0] == ["job", "state", "code", "lane", "chain", "provider", "calls", "USD", "created"]
    assert len(table) == 5
    assert {len(row) for row in table} == {9}


def test_a_job_shows_its_answer_and_the_timeline_of_its_calls(backstop, database_url):
    good, bad = a_batch(database_url, [JobState.SUCCEEDED, JobState.FAILED])
    body = backstop("job", good, "--json").json()
    assert (body["job"]["state"], body["job"]["result"]["content"], body["job"]["cost_usd"]) == ("succeeded", "hi", "0.25")
    assert [(call["provider"], call["outcome"], call["cost_usd"]) for call in body["calls"]] == [("first", "answered", "0.25")]
    words = backstop("job", bad)
    assert words.code == 0
    assert "all_failed: nobody answered" in words.out
    assert "overloaded" in words.out


@pytest.mark.parametrize(("by", "key"), [("provider", "first"), ("model", "m-first"), ("batch", "monday")])
def test_costs_are_summed_and_say_how_much_is_known(by, key, backstop, database_url):
    a_batch(database_url, [JobState.SUCCEEDED, JobState.FAILED, JobState.SUCCEEDED, JobState.FAILED])
    sql(
        database_url,
        "UPDATE provider_calls SET cost_usd = NULL, billing = 'unknown' WHERE id = (SELECT min(id::text)::uuid FROM provider_calls)",
    )
    (row,) = backstop("costs", "--by", by, "--json").json()
    assert (row["key"], row["calls"], row["unknown"], row["cost_usd"], row["coverage"]) == (key, 4, 1, "0.75", 0.75)
    assert "75.0%" in backstop("costs", "--by", by).out
    assert "\t" in backstop("costs", "--by", "day", "--since", "1h").out


# Operators.


def test_retry_queues_what_was_not_answered_once_more(backstop, database_url):
    good, bad, _ = a_batch(database_url, [JobState.SUCCEEDED, JobState.FAILED, JobState.EXPIRED])
    assert backstop("retry", bad, "--json").json() == {"requeued": 1}
    assert states(database_url) == ["succeeded", "queued", "expired"]
    assert backstop("retry", "monday").out == "1 queued once more\n"
    assert states(database_url) == ["succeeded", "queued", "queued"]
    assert backstop("retry", good, "--json").json() == {"requeued": 0}


def test_retry_takes_what_its_jobs_have_in_common_and_counts_first(backstop, database_url):
    a_batch(database_url, [JobState.SUCCEEDED, JobState.FAILED, JobState.EXPIRED, JobState.FAILED])
    a_batch(database_url, [JobState.FAILED], "tuesday")
    sql(database_url, "UPDATE jobs SET error = jsonb_set(error, '{code}', '\"worker_died\"') WHERE ordinal = 4")
    before = states(database_url)
    dry = backstop("retry", "--batch", "monday", "--dry-run")
    assert (dry.code, dry.out, dry.err) == (0, "nothing was queued\n", "to be queued: 3, 2 failed, 1 expired\n")
    assert backstop("retry", "--code", "worker_died", "--dry-run", "--json").json() == {"would_requeue": {"failed": 1}}
    assert backstop("retry", "--code", "nothing", "--dry-run", "--json").json() == {"would_requeue": {}}
    assert states(database_url) == before
    poison = backstop("retry", "--code", "worker_died", "--since", "1h")
    assert (poison.out, poison.err) == ("1 queued once more\n", "to be queued: 1, 1 failed\n")
    assert backstop("retry", "monday", "--state", "expired", "--json").json() == {"requeued": 1}
    assert backstop("retry", "--chain", "default", "--state", "failed", "--json").json() == {"requeued": 2}
    assert sorted(states(database_url)) == ["queued"] * 4 + ["succeeded"]


def test_the_dead_are_counted_by_what_they_died_of_with_the_newest_to_look_at(backstop, database_url):
    ids = a_batch(database_url, [JobState.SUCCEEDED, JobState.FAILED, JobState.FAILED, JobState.EXPIRED])
    table = [line.split("\t") for line in backstop("jobs", "--dead").out.splitlines()]
    assert table[0] == ["state", "code", "providers", "jobs", "newest", "last ended"]
    assert [row[:5] for row in table[1:]] == [["failed", "all_failed", "-", "2", ids[2]], ["expired", "all_failed", "-", "1", ids[3]]]
    (row,) = backstop("jobs", "--dead", "--state", "expired", "--json").json()
    assert (row["code"], row["jobs"], row["newest_id"]) == ("all_failed", 1, ids[3])
    assert [job["id"] for job in backstop("jobs", "--code", "all_failed", "--state", "failed", "--json").json()] == [ids[2], ids[1]]
    assert backstop("jobs", "--chain", "other", "--json").json() == []


def test_the_doctor_repairs_what_is_stuck_and_says_so_and_once_is_enough(backstop, database_url):
    a_batch(database_url, [JobState.SUCCEEDED, JobState.FAILED])
    sql(database_url, "UPDATE batches SET failed = 0")
    sql(database_url, "DELETE FROM workers")
    looked = backstop("doctor", "--json")
    (stuck,) = [row for row in looked.json() if not row["ok"]]
    assert (looked.code, stuck["name"], stuck["count"], stuck["mended"]) == (1, "batch counters", 1, 0)
    repaired = backstop("doctor", "--repair")
    assert (repaired.code, repaired.err) == (0, "")
    (line,) = [line for line in repaired.out.splitlines() if "batch counters" in line]
    assert line.split("\t")[0] == "mended"
    assert line.split("\t")[2].endswith("such as monday; 1 counted again")
    assert {line.split("\t")[0] for line in backstop("doctor", "--repair").out.splitlines()[1:]} == {"ok"}
    assert backstop("doctor").code == 0


def test_cancel_ends_what_is_queued_and_no_more(backstop, database_url):
    _, first, _, _ = a_batch(database_url, [JobState.SUCCEEDED, None, None, None])
    assert backstop("cancel", first, "--json").json() == {"cancelled": 1, "flagged": 0}
    assert backstop("cancel", "monday").out == "2 cancelled, 0 running ones told to stop\n"
    assert states(database_url) == ["succeeded", "cancelled", "cancelled", "cancelled"]
    assert backstop("cancel", "monday", "--json").json() == {"cancelled": 0, "flagged": 0}
    assert backstop("results", "monday").code == 3


def test_a_breaker_is_opened_closed_and_reset_by_hand(backstop):
    def state() -> list[tuple[str, str]]:
        shown = backstop("providers", "--json").json()
        return [(row["breaker"]["provider"], row["breaker"]["state"]) for row in shown]

    assert state() == [("steady", "closed"), ("broken", "closed")]
    opened = backstop("providers", "open", "steady", "--json")
    assert (opened.code, opened.json()["state"]) == (0, "forced_open")
    assert state() == [("steady", "forced_open"), ("broken", "closed")]
    assert backstop("providers", "close", "steady", "--json").json()["state"] == "forced_closed"
    assert backstop("providers", "reset", "steady").out == "steady is closed\n"
    header, *rows = [line.split("\t") for line in backstop("providers").out.splitlines()]
    assert [row[:3] for row in rows] == [["steady", "healthy", "closed"], ["broken", "healthy", "closed"]]
    assert {len(row) for row in rows} == {len(header)}


def test_providers_show_what_they_did_today(backstop, database_url):
    a_batch(database_url, [JobState.SUCCEEDED])
    sql(database_url, "UPDATE provider_calls SET provider = 'steady'")
    steady, broken = backstop("providers", "--json").json()
    assert (steady["today"]["calls"], steady["today"]["cost_usd"], broken["today"]) == (1, "0.25", None)


def test_a_lane_is_paused_and_resumed(backstop, database_url):
    a_batch(database_url, [None, None])
    paused = backstop("lanes", "pause", "bulk", "--json")
    assert {row["name"]: (row["paused"], row["queued"]) for row in paused.json()} == {"interactive": (False, 0), "bulk": (True, 2)}
    assert "bulk\tpaused\t2\t0" in backstop("lanes").out.splitlines()
    assert "bulk\topen\t2\t0" in backstop("lanes", "resume", "bulk").out.splitlines()
    assert [row["paused"] for row in backstop("lanes", "--json").json()] == [False, False]


def test_a_key_is_shown_once_listed_without_its_secret_and_revoked_once(backstop):
    made = backstop("keys", "create", "robot", "--tenant", "acme", "--json")
    secret, key = made.json()["secret"], made.json()["key"]
    plain = backstop("keys", "create", "person")
    assert len(plain.out.splitlines()) == 1
    listed = backstop("keys", "list", "--json")
    assert [(row["name"], row["tenant"]) for row in listed.json()] == [("person", "default"), ("robot", "acme")]
    for ended in (listed, backstop("keys", "list")):
        assert secret not in ended.out
        assert plain.out.strip() not in ended.out
    revoked = backstop("keys", "revoke", "robot", "--json").json()
    assert revoked["id"] == key["id"]
    assert revoked["revoked_at"]
    assert backstop("keys", "revoke", key["id"]).code == 5
    assert [bool(row["revoked_at"]) for row in backstop("keys", "list", "--json").json()] == [False, True]


def test_the_configuration_is_checked_with_the_keys_it_names_and_shown_without_them(command, here, monkeypatch):
    config = here / "backstop.toml"
    config.write_text(config.read_text().replace("[providers.broken]", 'api_key = "env:STEADY_KEY"\nrpm = 9\n[providers.broken]'))
    missing = command("config", "check", "--json")
    assert (missing.code, missing.json()["ok"]) == (1, False)
    assert "providers.steady.api_key: environment variable STEADY_KEY is not set" in missing.err
    monkeypatch.setenv("STEADY_KEY", "very-secret")
    fine = command("config", "check", "--json")
    assert (fine.code, fine.json()) == (0, {"ok": True, "problems": [], "without_effect": [], "notes": []})
    assert "2 providers, 1 chains" in command("config", "check").out
    for ended in (command("config", "show", "--json"), command("config", "show")):
        assert ended.code == 0
        assert "env:STEADY_KEY" in ended.out
        assert "very-secret" not in ended.out + ended.err
    assert not (here / ".backstop").exists()


def test_a_chain_that_keeps_to_a_share_of_the_spend_needs_prices(command, here, monkeypatch):
    config = here / "backstop.toml"
    more = '[chains.quick]\nproviders = ["steady", "nobodys"]\nstrategy = "hedge"\n'
    unlisted = '[providers.nobodys]\nbase_url = "http://127.0.0.1:1/v1"\nmodel = "of-nobody"\n'
    config.write_text(f"{config.read_text()}\n{unlisted}{more}")
    ended = command("config", "check")
    assert ended.code == 1
    assert 'chains.quick: strategy = "hedge" keeps to a share of the spend, so providers.nobodys.price is needed' in ended.err


def test_a_schema_that_is_current_is_fine_and_stays_so(backstop):
    assert backstop("db", "check").code == 0
    assert backstop("db", "check", "--json").json() == {"ok": True, "problem": None}
    assert backstop("db", "upgrade", "--json").json() == {"ok": True}


def test_whoever_reads_only_the_beginning_of_the_results_sees_no_trace(backstop, database_url):
    a_batch(database_url, [JobState.SUCCEEDED] * 5)
    program = [sys.executable, "-m", "worker", "results", "monday"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        words = process.stderr.read().decode()
    assert (process.returncode, words) == (0, "")
