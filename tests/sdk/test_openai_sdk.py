"""The official openai package, unmodified, in its last three major versions, against a real API, worker and Postgres.

`play.py` is the user's program. Here it is run under each version, and what it saw is looked at.
"""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from stand import INTERPRETERS, LONG_S, SCRIPT, Site, api, open_site, until

from worker.embedded.servers import Endpoints


@pytest.fixture(scope="module")
def site(servers: Endpoints, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with open_site(servers, tmp_path_factory.mktemp("sdk")) as opened:
        yield opened


@pytest.fixture(scope="module")
def plays(site: Site) -> Iterator[dict[str, Future[dict[str, Any]]]]:
    """All versions at once: a play mostly waits."""
    with ThreadPoolExecutor() as threads:
        yield {sdk: threads.submit(site.play, sdk) for sdk in INTERPRETERS}


@pytest.fixture(scope="module", params=list(INTERPRETERS))
def seen(plays: dict[str, Future[dict[str, Any]]], request: pytest.FixtureRequest) -> dict[str, Any]:
    """What a user's program saw, by scene."""
    saw = plays[request.param].result()
    assert saw["version"].startswith(f"{request.param}.")
    return saw


@pytest.fixture(scope="module")
def impatient_site(site: Site) -> Iterator[Site]:
    """The same with another API, which begins a stream after a tenth of a second."""
    with api(site.settings, "0.1") as url:
        yield replace(site, url=url)


def refusal(error: dict[str, Any]) -> tuple[Any, ...]:
    """What a program decides by, of an error that the SDK did not try to get over."""
    assert error["request_id"]
    assert error["retries"] == 0
    return error["kind"], error["status"], error["code"], error["param"]


def test_models_are_chains_providers_and_their_models(seen):
    models = seen["models"]
    assert models["listed"] == [
        "default",
        *SCRIPT["providers"],
        "tools",
        *(f"{given['model']}" for given in SCRIPT["providers"].values()),
        "m-tools",
    ]
    assert (models["retrieved"]["id"], models["retrieved"]["owned_by"]) == ("vendor/m-good", "good")
    assert refusal(models["missing"]) == ("NotFoundError", 404, "model_not_found", "model")


def test_a_completion_is_whole(seen, site):
    chat, completion = seen["chat"], seen["chat"]["completion"]
    assert (chat["kind"], completion["object"], completion["model"]) == ("ChatCompletion", "chat.completion", "vendor/m-good")
    (choice,) = completion["choices"]
    assert (choice["index"], choice["finish_reason"], choice["message"]["role"]) == (0, "stop", "assistant")
    assert "vpn" in choice["message"]["content"]
    usage = completion["usage"]
    assert usage["prompt_tokens"] + usage["completion_tokens"] == usage["total_tokens"] > 2
    assert chat["request_id"] == chat["header_request_id"]
    assert abs(completion["created"] - time.time()) < LONG_S * 10
    job_id = UUID(chat["headers"]["x-backstop-job-id"])
    assert completion["id"] == f"chatcmpl-{job_id.hex}"
    assert chat["headers"]["x-backstop-provider"] == completion["backstop"]["provider"] == "good"
    assert Decimal(chat["headers"]["x-backstop-cost-usd"]) > 0
    assert site.sql("SELECT state, lane, metadata FROM jobs WHERE id = :id", id=job_id) == [("succeeded", "interactive", {"ticket": "T-1"})]


def test_the_async_client_works_as_well(seen):
    chat = seen["chat_async"]
    assert len(set(chat["ids"])) == 20
    assert chat["contents"] == [chat["streamed"]]
    assert chat["listed"] == len(seen["models"]["listed"])


def test_a_stream_is_the_answer_its_finish_reason_and_its_usage(seen):
    stream = seen["stream"]
    assert stream["content"] == stream["final"] == stream["whole"]
    assert (stream["role"], stream["finish_reason"], len(stream["ids"])) == ("assistant", [None, "stop"], 1)
    assert stream["usage"] == [None, None, stream["total_tokens"]]
    assert {"content.delta", "content.done"} <= set(stream["events"])


def test_tools_are_called_parsed_streamed_and_answered(seen):
    tools = seen["tools"]
    function = {"name": "close", "arguments": '{"ticket": 7}'}
    assert (tools["finish_reason"], tools["call"]) == ("tool_calls", {"id": "call_1", "type": "function", "function": function})
    assert (tools["parsed"], tools["streamed"]["parsed_arguments"]) == ({"ticket": 7}, {"ticket": 7})
    assert tools["after"] == "It is closed."


def test_response_formats_are_parsed(seen):
    formats = seen["formats"]
    assert isinstance(formats["plain"], dict)
    assert (formats["parsed"], formats["streamed"]) == ("Triage", "Triage")


def test_each_error_is_the_exception_a_program_expects_and_is_not_tried_again(seen):
    errors = seen["errors"]
    assert {name: refusal(error) for name, error in errors.items() if name != "reader_reads"} == {
        "wrong_key": ("AuthenticationError", 401, "invalid_api_key", None),
        "may_only_read": ("PermissionDeniedError", 403, None, None),
        "unknown_model": ("NotFoundError", 404, "model_not_found", "model"),
        "n": ("BadRequestError", 400, None, "n"),
        "unknown_parameter": ("BadRequestError", 400, None, "temperatur"),
        "no_messages": ("BadRequestError", 400, None, "messages"),
        "content_filter": ("BadRequestError", 400, "content_filter", None),
        "invalid": ("BadRequestError", 400, "invalid_request", None),
        "too_long": ("BadRequestError", 400, "context_length_exceeded", None),
        "streamed": ("BadRequestError", 400, "content_filter", None),
        "no_such_path": ("NotFoundError", 404, None, None),
    }
    assert errors["reader_reads"]
    assert "did you mean 'temperature'?" in errors["unknown_parameter"]["message"]
    assert "there is no POST /v1/embeddings here" in errors["no_such_path"]["message"]


def test_the_job_expires_before_the_client_loses_patience(seen, site):
    error = seen["timeouts"]["in_time"]
    assert refusal(error) == ("InternalServerError", 504, "deadline_exceeded", None)
    assert "silent" in error["message"]
    assert site.state_of(error["job"]) == "expired"


def test_the_job_of_a_client_that_hung_up_is_cancelled(seen, site):
    assert seen["timeouts"]["hung_up"]["kind"] == "APITimeoutError"
    sql = "SELECT j.state FROM jobs j JOIN job_requests r ON r.job_id = j.id WHERE r.request -> 'parameters' ->> 'user' = :user"
    until(lambda: site.sql(sql, user=f"hung up under {seen['version']}") == [("cancelled",)])


def test_under_a_key_a_client_that_asks_again_joins_its_job_and_pays_once(seen, site):
    retries = seen["retries"]
    assert retries["retries"] > 0
    (job_id,) = {UUID(name.removeprefix("chatcmpl-")) for name in retries["ids"]}
    assert str(job_id) == retries["job"]
    assert site.sql("SELECT outcome FROM provider_calls WHERE job_id = :id", id=job_id) == [("answered",)]
    assert refusal(retries["other_request"]) == ("ConflictError", 409, "idempotency_key_reused", None)


def test_files_come_back_as_they_went_however_they_are_sent_and_read(seen):
    files, file = seen["files"], seen["files"]["file"]
    assert file["id"].startswith("file-")
    assert (file["object"], file["purpose"], file["status"], file["filename"]) == ("file", "batch", "processed", "tickets.jsonl")
    assert (file["bytes"], files["processed"]) == (files["size"], "processed")
    assert (files["retrieved"], files["contents"]) == (True, [True, True, True])
    assert files["names"] == ["more.jsonl", "more.jsonl"]
    assert seen["files_async"] == {"same": True, "found": True, "deleted": True}


def test_files_are_listed_page_by_page_in_order_each_once(seen):
    assert (seen["files"]["in_order"], seen["files"]["once_each"], seen["files"]["first_page"]) == (True, True, True)


def test_a_deleted_file_is_gone_and_other_purposes_are_refused(seen):
    files = seen["files"]
    assert files["deleted"] == {"id": files["file"]["id"], "object": "file", "deleted": True}
    for name in ("gone", "content_gone", "never_was"):
        assert refusal(files[name])[:2] == ("NotFoundError", 404)
    assert refusal(files["purpose"]) == ("BadRequestError", 400, None, "purpose")
    assert "batch" in files["purpose"]["message"]


def test_a_batch_goes_from_its_file_to_its_answers(seen):
    batches, created, done = seen["batches"], seen["batches"]["created"], seen["batches"]["done"]
    assert created["id"].startswith("batch_")
    assert (created["object"], created["status"], created["endpoint"]) == ("batch", "validating", "/v1/chat/completions")
    assert (created["input_file_id"], created["metadata"]) == (batches["input_file_id"], {"week": "47"})
    order = ["validating", "in_progress", "finalizing", "completed"]
    assert batches["states"] == [state for state in order if state in batches["states"]]
    assert done["request_counts"] == {"total": 3, "completed": 3, "failed": 0}
    assert created["created_at"] <= done["in_progress_at"] <= done["finalizing_at"] <= done["completed_at"] < done["expires_at"]
    assert (done["errors"], done["error_file_id"], batches["output"]["purpose"]) == (None, None, "batch_output")
    assert set(batches["answers"]) == {"T-1", "T-2", "T-3"}
    assert "printer" in batches["answers"]["T-2"]
    assert (batches["status_codes"], batches["errors"]) == ([200] * 3, [None] * 3)


def test_a_batch_that_cannot_be_made_says_why(seen):
    batches = seen["batches"]
    assert refusal(batches["missing"])[:2] == ("NotFoundError", 404)
    assert refusal(batches["no_file"])[1:] == (404, None, "input_file_id")
    assert refusal(batches["endpoint"]) == ("BadRequestError", 400, None, "endpoint")


def test_bad_lines_fail_a_batch_by_their_numbers_or_are_skipped_on_request(seen):
    bad = seen["batches_with_bad_lines"]
    failed, skipped = bad["failed"], bad["skipped"]
    assert (failed["status"], failed["output_file_id"], failed["request_counts"]["completed"]) == ("failed", None, 0)
    assert [(error["line"], error["code"]) for error in failed["errors"]["data"]] == [(2, "invalid_json_line"), (4, "duplicate_custom_id")]
    assert all(error["message"] for error in failed["errors"]["data"])
    assert failed["failed_at"] >= failed["created_at"]
    assert (skipped["status"], skipped["request_counts"]) == ("completed", {"total": 4, "completed": 2, "failed": 2})
    assert (bad["output_lines"], bad["error_lines"]) == (2, 2)


def test_a_batch_is_cancelled(seen):
    cancelled = seen["batches_cancelled"]
    assert cancelled["cancelling"] in ("cancelling", "cancelled")
    assert cancelled["cancelled"]["status"] == "cancelled"
    assert cancelled["cancelled"]["cancelling_at"] <= cancelled["cancelled"]["cancelled_at"]
    assert refusal(cancelled["again"])[:2] == ("ConflictError", 409)


def test_batches_are_listed_newest_first_page_by_page_each_once(seen):
    assert seen["batches_listed"] == {"newest_first": True, "once_each": True, "page": [2, True], "next": True}


def test_a_batch_that_the_sdk_sends_again_is_the_same_batch(seen):
    assert seen["batches_retried"] == {"joined": True, "meant": True}


@pytest.mark.parametrize("sdk", INTERPRETERS)
def test_a_stream_that_has_to_wait_is_kept_alive_and_ends_with_the_answer_or_the_error(impatient_site, sdk):
    late = impatient_site.play(sdk, "late_stream")["late_stream"]
    assert "vpn" in late["content"]
    assert (late["error"]["kind"], late["error"]["code"]) == ("APIError", "deadline_exceeded")
    until(lambda: impatient_site.state_of(late["left"]) == "cancelled")


def test_without_an_environment_the_command_that_makes_it_is_said(site, monkeypatch, tmp_path):
    monkeypatch.setitem(INTERPRETERS, "1", tmp_path / "python")
    with pytest.raises(AssertionError, match=r"make \.venv-openai-1/\.ready"):
        site.play("1")
