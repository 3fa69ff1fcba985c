"""Batches over HTTP, in OpenAI's words, from the POST to the files with what came of it."""

import asyncio
import json

import pytest

from worker import database, file_batches
from worker.config import load
from worker.intake import tend
from worker.new_file_batch import MOST_UNFINISHED

HELLO = [{"role": "user", "content": "hi"}]


def lines(*custom_ids):
    return b"".join(json.dumps({"custom_id": one, "body": {"messages": HELLO}}).encode() + b"\n" for one in custom_ids)


def uploaded(stage, content, headers=None):
    form = {"files": {"file": ("tickets.jsonl", content)}, "data": {"purpose": "batch"}}
    return stage.client.post("/v1/files", headers=headers, **form).json()["id"]


def post(stage, file_id, headers=None, **fields):
    body = {"input_file_id": file_id, "endpoint": "/v1/chat/completions", "completion_window": "24h", **fields}
    return stage.client.post("/v1/batches", json=body, headers=headers)


def started(stage, content=None, **fields):
    response = post(stage, uploaded(stage, lines("T-1", "T-2") if content is None else content), **fields)
    assert response.status_code == 200, response.text
    return response.json()


def got(stage, batch):
    return stage.client.get(f"/v1/batches/{batch['id']}").json()


def tended(stage, config):
    async def once():
        db = database.engine(stage.database_url)
        try:
            await tend(db, config)
        finally:
            await db.dispose()

    asyncio.run(once())


@pytest.fixture
def config(stage, tmp_path):
    return load(tmp_path / "backstop.toml")


def settled(stage, batch, **states):
    """Its jobs have ended in these states, by custom id (T_1); the batch knows."""
    batch_id = file_batches.from_wire(batch["id"])
    for name, state in states.items():
        (job,) = stage.sql("SELECT id FROM jobs WHERE batch_id = :b AND custom_id = :c", b=batch_id, c=name.replace("_", "-"))
        if state == "succeeded":
            stage.succeed(str(job.id))
        else:
            stage.sql("UPDATE jobs SET state = :state, finished_at = now() WHERE id = :id", state=state, id=job.id)
        stage.sql(f"UPDATE batches SET {state} = {state} + 1 WHERE id = :id", id=batch_id)
    stage.sql(
        """UPDATE batches SET state = 'finished', finished_at = now()
           WHERE id = :id AND succeeded + failed + cancelled + expired = total""",
        id=batch_id,
    )


def refused(response, status, message, param=None):
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param), error
    assert message in error["message"]
    return error


def test_a_new_batch_is_described_as_openai_does(stage):
    file_id = uploaded(stage, lines("T-1"))
    batch = post(stage, file_id, metadata={"week": "47"}).json()
    assert file_batches.from_wire(batch["id"]) is not None
    assert batch == {
        "id": batch["id"],
        "object": "batch",
        "endpoint": "/v1/chat/completions",
        "errors": None,
        "input_file_id": file_id,
        "completion_window": "24h",
        "status": "validating",
        "output_file_id": None,
        "error_file_id": None,
        "created_at": batch["created_at"],
        "in_progress_at": None,
        "expires_at": batch["created_at"] + 86_400,
        "finalizing_at": None,
        "completed_at": None,
        "failed_at": None,
        "expired_at": None,
        "cancelling_at": None,
        "cancelled_at": None,
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
        "usage": None,
        "metadata": {"week": "47"},
    }
    assert got(stage, batch) == batch


def test_a_batch_goes_its_way_and_its_files_hold_what_came_of_it(stage, config):
    batch = started(stage, lines("T-1", "T-2", "T-3"), output_expires_after={"anchor": "created_at", "seconds": 3600})
    tended(stage, config)
    running = got(stage, batch)
    assert (running["status"], running["request_counts"]) == ("in_progress", {"total": 3, "completed": 0, "failed": 0})
    settled(stage, batch, T_1="succeeded", T_2="failed")
    assert got(stage, batch)["request_counts"] == {"total": 3, "completed": 1, "failed": 1}
    settled(stage, batch, T_3="succeeded")
    tended(stage, config)
    done = got(stage, batch)
    assert (done["status"], done["request_counts"]) == ("completed", {"total": 3, "completed": 2, "failed": 1})
    assert done["in_progress_at"] <= done["finalizing_at"] <= done["completed_at"]
    assert done["usage"]["total_tokens"] == 16
    output = stage.client.get(f"/v1/files/{done['output_file_id']}/content").text.splitlines()
    assert [json.loads(one)["custom_id"] for one in output] == ["T-1", "T-3"]
    body = json.loads(output[0])["response"]["body"]
    assert (body["object"], body["choices"][0]["message"]["content"], body["model"]) == ("chat.completion", "Hello!", "m-a")
    (error,) = stage.client.get(f"/v1/files/{done['error_file_id']}/content").text.splitlines()
    assert (json.loads(error)["custom_id"], json.loads(error)["response"], json.loads(error)["error"]["code"]) == ("T-2", None, "failed")
    file = stage.client.get(f"/v1/files/{done['output_file_id']}").json()
    assert (file["purpose"], file["filename"], file["bytes"]) == ("batch_output", f"{batch['id']}_output.jsonl", len("\n".join(output)) + 1)
    assert file["expires_at"] is not None
    assert [one["id"] for one in stage.client.get("/v1/files?purpose=batch_output").json()["data"]].count(file["id"]) == 1


def test_bad_lines_fail_the_batch_by_number(stage, config):
    batch = started(stage, lines("T-1") + b"{\n" + lines("T-1"))
    tended(stage, config)
    failed = got(stage, batch)
    assert (failed["status"], failed["failed_at"] is not None, failed["output_file_id"]) == ("failed", True, None)
    assert failed["errors"]["object"] == "list"
    assert [(e["line"], e["code"], e["param"]) for e in failed["errors"]["data"]] == [
        (2, "invalid_json_line", None),
        (3, "duplicate_custom_id", "custom_id"),
    ]


@pytest.mark.parametrize(
    "asked", [{"metadata": {"backstop-bad-lines": "skip"}}, {"headers": {"backstop-bad-lines": "skip"}}], ids=["metadata", "header"]
)
def test_bad_lines_are_skipped_when_asked_for(stage, config, asked):
    batch = started(stage, lines("T-1") + b"{\n", **asked)
    tended(stage, config)
    settled(stage, batch, T_1="succeeded")
    tended(stage, config)
    done = got(stage, batch)
    assert (done["status"], done["errors"], done["request_counts"]) == ("completed", None, {"total": 2, "completed": 1, "failed": 1})
    (error,) = stage.client.get(f"/v1/files/{done['error_file_id']}/content").text.splitlines()
    assert (json.loads(error)["custom_id"], json.loads(error)["error"]["code"], json.loads(error)["error"]["line"]) == (
        None,
        "unusable_row",
        2,
    )


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"endpoint": None}, "endpoint"),
        ({"completion_window": "0h"}, "completion_window"),
        ({"completion_window": "24"}, "completion_window"),
        ({"completion_window": "24H"}, "completion_window"),
        ({"completion_window": "8d"}, "completion_window"),
        ({"completion_window": "99999d"}, "completion_window"),
        ({"completion_window": "24h\n"}, "completion_window"),
        ({"completion_window": 24}, "completion_window"),
        ({"metadata": {"backstop-bad-lines": "drop"}}, "metadata"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k"),
        ({"metadata": {"k": 1}}, "metadata.k"),
        ({"metadata": []}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 60}}, "output_expires_after.seconds"),
        ({"output_expires_after": {"seconds": 3600}}, "output_expires_after.anchor"),
        ({"input_file_id": 7}, "input_file_id"),
        ({"window": "24h"}, "window"),
    ],
)
def test_a_field_that_cannot_be_used_is_named(stage, fields, param):
    refused(post(stage, uploaded(stage, lines("T-1")), **fields) if "input_file_id" not in fields else post(stage, 7), 400, "", param)
    assert stage.sql("SELECT FROM file_batches") == []


@pytest.mark.parametrize(("window", "seconds"), [("1m", 60), ("90m", 5_400), ("36h", 129_600), ("7d", 604_800)])
def test_a_window_may_be_any_time_up_to_seven_days(stage, config, window, seconds):
    batch = started(stage, completion_window=window)
    assert (batch["completion_window"], batch["expires_at"] - batch["created_at"]) == (window, seconds)
    tended(stage, config)
    for job in stage.sql("SELECT deadline_s FROM jobs"):
        assert seconds - 30 < job.deadline_s <= seconds


@pytest.mark.parametrize("headers", [{"backstop-bad-lines": "drop"}, {"Idempotency-Key": ""}, {"Idempotency-Key": "k" * 256}])
def test_a_header_that_cannot_be_used_is_refused(stage, headers):
    assert post(stage, uploaded(stage, lines("T-1")), headers=headers).status_code == 400


def test_a_file_that_is_not_there_is_a_404_and_one_of_ours_is_no_input(stage, config):
    for file_id in ("file-nobody", "file-" + "0" * 32, "", "\x00"):
        refused(post(stage, file_id), 404, "there is no file", "input_file_id")
    theirs = uploaded(stage, lines("T-1"), headers=stage.key("them"))
    refused(post(stage, theirs), 404, "there is no file", "input_file_id")
    deleted = uploaded(stage, lines("T-1"))
    stage.client.delete(f"/v1/files/{deleted}")
    refused(post(stage, deleted), 404, "there is no file", "input_file_id")
    batch = started(stage)
    tended(stage, config)
    settled(stage, batch, T_1="succeeded", T_2="succeeded")
    tended(stage, config)
    refused(post(stage, got(stage, batch)["output_file_id"]), 400, "batch_output, not batch", "input_file_id")


@pytest.mark.parametrize("again", [{"Idempotency-Key": "k"}, {"x-stainless-retry-count": "1"}])
def test_a_post_sent_again_is_its_batch_although_the_input_file_is_gone(stage, again):
    file_id = uploaded(stage, lines("T-1"))
    first = post(stage, file_id, {name: value for name, value in again.items() if name == "Idempotency-Key"}).json()
    stage.client.delete(f"/v1/files/{file_id}")
    assert post(stage, file_id, again).json()["id"] == first["id"]
    refused(post(stage, file_id, {"Idempotency-Key": "another"}), 404, "there is no file", "input_file_id")


def test_a_retry_of_the_sdk_is_the_batch_of_before(stage):
    file_id = uploaded(stage, lines("T-1"))
    first = post(stage, file_id, metadata={"day": "1"}).json()
    retry = {"x-stainless-retry-count": "1"}
    assert post(stage, file_id, retry, metadata={"day": "1"}).json()["id"] == first["id"]
    others = [
        post(stage, file_id, {"x-stainless-retry-count": "0"}, metadata={"day": "1"}),
        post(stage, file_id, retry, metadata={"day": "2"}),
        post(stage, file_id, retry, metadata={"day": "1"}, completion_window="23h"),
        post(stage, file_id, retry | {"backstop-bad-lines": "skip"}, metadata={"day": "1"}),
        post(stage, uploaded(stage, lines("T-1")), retry, metadata={"day": "1"}),
    ]
    assert len({first["id"], *(other.json()["id"] for other in others)}) == 6


def test_under_a_key_there_is_one_batch_and_no_other_request(stage):
    file_id, key = uploaded(stage, lines("T-1")), {"Idempotency-Key": "k"}
    first = post(stage, file_id, key).json()
    assert post(stage, file_id, key).json() == first
    response = post(stage, file_id, key, completion_window="1h")
    assert refused(response, 409, first["id"])["code"] == "idempotency_key_reused"
    assert response.headers["x-should-retry"] == "false"


def test_batches_are_listed_page_by_page_newest_first(stage):
    file_id = uploaded(stage, lines("T-1"))
    made = [post(stage, file_id).json()["id"] for _ in range(5)]
    seen, after = [], None
    while True:
        page = stage.client.get("/v1/batches", params={"limit": 2} | ({"after": after} if after else {})).json()
        seen += [batch["id"] for batch in page["data"]]
        assert (page["object"], page["first_id"], page["last_id"]) == ("list", page["data"][0]["id"], page["data"][-1]["id"])
        if not page["has_more"]:
            break
        after = page["last_id"]
    assert seen == made[::-1]


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "after=nobody", "after=file-" + "0" * 32])
def test_a_listing_that_cannot_be_is_refused(stage, query):
    refused(stage.client.get(f"/v1/batches?{query}"), 400, "", query.partition("=")[0])


def test_a_batch_is_cancelled_and_again_while_it_is_at_it(stage, config):
    batch = started(stage)
    tended(stage, config)
    settled(stage, batch, T_1="succeeded")
    cancelling = stage.client.post(f"/v1/batches/{batch['id']}/cancel").json()
    assert (cancelling["status"], cancelling["cancelling_at"] is not None) == ("cancelling", True)
    assert stage.client.post(f"/v1/batches/{batch['id']}/cancel").json()["status"] == "cancelling"
    tended(stage, config)
    done = got(stage, batch)
    assert (done["status"], done["request_counts"]) == ("cancelled", {"total": 2, "completed": 1, "failed": 1})
    assert "T-1" in stage.client.get(f"/v1/files/{done['output_file_id']}/content").text
    response = stage.client.post(f"/v1/batches/{batch['id']}/cancel")
    refused(response, 409, "the batch is cancelled")
    assert response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("batch_id", ["nobody", "batch_", "batch_" + "0" * 32, "0" * 32, "%00", "batch_%ff", "batch_" + "0" * 5000])
def test_a_batch_that_never_was_is_a_404(stage, batch_id):
    refused(stage.client.get(f"/v1/batches/{batch_id}"), 404, "there is no batch", "batch_id")
    refused(stage.client.post(f"/v1/batches/{batch_id}/cancel"), 404, "there is no batch", "batch_id")


def test_a_batch_of_the_native_kind_is_not_of_this_surface(stage):
    stage.sql("INSERT INTO batches (id, name, state, fingerprint) VALUES ('00000000-0000-7000-8000-000000000000', 'monday', 'open', '')")
    for spelled in ("monday", "00000000-0000-7000-8000-000000000000", "batch_" + "00000000000070008000000000000000"):
        assert stage.client.get(f"/v1/batches/{spelled}").status_code == 404
    assert stage.client.get("/v1/batches").json()["data"] == []


def test_batches_of_another_tenant_do_not_exist(stage):
    batch, theirs = started(stage), stage.key("them")
    for method, path in (("GET", ""), ("POST", "/cancel"), ("GET", "/results")):
        assert stage.client.request(method, f"/v1/batches/{batch['id']}{path}", headers=theirs).status_code == 404
    assert stage.client.get("/v1/batches", headers=theirs).json()["data"] == []
    assert got(stage, batch)["status"] == "validating"


def test_the_results_of_a_batch_of_a_file_stream_natively_as_well(stage, config):
    batch = started(stage)
    tended(stage, config)
    settled(stage, batch, T_1="succeeded", T_2="succeeded")
    found = stage.client.get(f"/v1/batches/{batch['id']}/results").text.splitlines()
    assert [json.loads(one)["custom_id"] for one in found] == ["T-1", "T-2"]


def test_a_key_that_may_only_read_starts_and_cancels_nothing(stage):
    batch, file_id = started(stage), uploaded(stage, lines("T-1"))
    stage.sql("UPDATE api_keys SET scopes = '{read}'")
    assert post(stage, file_id).status_code == 403
    assert stage.client.post(f"/v1/batches/{batch['id']}/cancel").status_code == 403
    assert got(stage, batch)["status"] == "validating"


def test_with_too_many_unfinished_batches_a_new_one_is_refused_and_not_sent_again(stage):
    file_id = uploaded(stage, lines("T-1"))
    stage.sql(
        """WITH b AS (INSERT INTO batches (id, tenant, name, state, fingerprint)
               SELECT gen_random_uuid(), 'default', 'b' || n, 'loading', '' FROM generate_series(1, :n) n RETURNING id)
           INSERT INTO file_batches (batch_id, tenant, state, input_file_id, completion_window, fingerprint, expires_at)
           SELECT id, 'default', 'validating', id, '24h', '', now() + interval '1 day' FROM b""",
        n=MOST_UNFINISHED,
    )
    response = post(stage, file_id)
    assert refused(response, 429, "wait for some")["code"] == "too_many_batches"
    assert (response.headers["x-should-retry"], response.headers["Retry-After"]) == ("false", "60")
    assert post(stage, uploaded(stage, lines("T-1"), stage.key("other")), stage.key("other")).status_code == 200


def test_a_job_of_a_batch_that_is_over_is_not_queued_again(stage, config):
    batch = started(stage)
    tended(stage, config)
    settled(stage, batch, T_1="succeeded", T_2="failed")
    tended(stage, config)
    (failed,) = stage.client.get("/v1/jobs", params={"state": "failed"}).json()["data"]
    response = stage.client.post(f"/v1/jobs/{failed['id']}/requeue")
    assert (response.status_code, response.headers["Content-Type"]) == (409, "application/problem+json")
    assert f"{batch['id']} is completed" in response.json()["detail"]
    assert got(stage, batch)["status"] == "completed"
