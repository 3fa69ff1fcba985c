"""What is said of requests that cannot be used: the place, and in words what was expected."""

import pytest

JSON = {"Content-Type": "application/json"}
NOBODY = "/v1/jobs/01a2076a-3cb9-781a-91ce-0b8e83564df2/events"


@pytest.mark.parametrize(
    ("sent", "status", "detail"),
    [
        ({"content": '{"messages": [}', "headers": JSON}, 400, "body: expected JSON: Expecting value at line 1, column 15"),
        ({"content": '{"a": "x\ny"}', "headers": JSON}, 400, "body: expected JSON: Invalid control character at line 1, column 9"),
        ({"content": '{\n"a": "\\q"}', "headers": JSON}, 400, "body: expected JSON: Invalid \\escape at line 2, column 7"),
        ({"content": b'{"messages": "\xff"}', "headers": JSON}, 400, "body: expected JSON: byte 15 is no UTF-8"),
        ({"content": "[" * 200_000, "headers": JSON}, 400, "body: expected JSON: nested too deeply"),
        ({"content": '{"n": ' + "7" * 5_000 + "}", "headers": JSON}, 400, "body: expected JSON: a number of too many digits"),
        ({"content": "[]", "headers": JSON}, 422, "body: expected a JSON object"),
        ({"content": "", "headers": JSON}, 422, "body: expected a JSON object"),
        ({"content": "{}", "headers": {"Content-Type": "text/plain"}}, 422, "body: send it with Content-Type: application/json"),
        ({"content": "{}", "headers": {"Content-Type": "text/json"}}, 422, "body: send it with Content-Type: application/json"),
        ({"content": b"{}"}, 422, "body: send it with Content-Type: application/json"),
        ({"json": {"messages": [3]}}, 422, "body.messages[0]: Input should be a valid dictionary"),
    ],
)
def test_a_body_that_cannot_be_used_is_told_by_its_place_and_what_was_expected(stage, sent, status, detail):
    answer = stage.client.post("/v1/jobs", **sent)
    assert (answer.status_code, answer.json()["detail"]) == (status, detail)


@pytest.mark.parametrize(
    ("path", "headers", "detail"),
    [
        ("/v1/batches/b/results?cursor=x", {}, "query.cursor: expected the `cursor` of a line that was read, or 0"),
        (NOBODY, {"Last-Event-ID": "1"}, "header.last-event-id: expected the id of an event of this job"),
        ("/v1/batches/b/events", {"Last-Event-ID": "1"}, "header.last-event-id: expected the id of an event of this batch"),
        ("/v1/costs?since=7", {}, "query.since: expected a number and m, h, d or w, as in 7d"),
        ("/v1/jobs?since=7", {}, "query.since: expected a number and m, h, d or w, as in 7d"),
        ("/v1/jobs?chain=%00", {}, "query.chain: expected a text without NUL characters"),
        ("/v1/jobs?chain=" + "x" * 513, {}, "query.chain: String should have at most 512 characters"),
        ("/v1/providers?x=1", {}, "query.x: unknown parameter; none is known here"),
        ("/v1/costs?x=1", {}, "query.x: unknown parameter; known are by, since"),
    ],
)
def test_texts_of_a_fixed_form_are_asked_for_in_words(stage, path, headers, detail):
    answer = stage.client.get(path, headers=headers)
    assert (answer.status_code, answer.json()["detail"]) == (422, detail)


def test_a_misspelled_filter_is_not_taken_for_none(stage):
    stage.submit()
    answer = stage.client.get("/v1/jobs", params={"stat": "failed"})
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "query.stat")
    assert "state" in answer.json()["detail"]


def test_an_idempotency_key_of_other_characters_is_refused_in_words_on_both_kinds_of_route(stage):
    words, headers = "expected 1 to 255 visible ASCII characters", {"Idempotency-Key": "a b"}
    message = [{"role": "user", "content": "Hello"}]
    native = stage.client.post("/v1/jobs", json={"messages": message}, headers=headers)
    assert (native.status_code, native.json()["detail"]) == (422, f"header.idempotency-key: {words}")
    openai = stage.client.post("/v1/chat/completions", json={"model": "default", "messages": message}, headers=headers)
    assert (openai.status_code, openai.json()["error"]["message"]) == (400, f"idempotency-key: {words}")


def test_openai_routes_spell_a_field_the_same_wherever_it_was_found_out(stage):
    for message in (3, {"role": "nobody", "content": "Hello"}):
        answer = stage.client.post("/v1/chat/completions", json={"model": "default", "messages": [message]})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"].startswith("messages[0]")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"k" * 65: "v"}, f"metadata.{'k' * 65}: String should have at most 64 characters"),
        ({"k": "v" * 513}, "metadata.k: String should have at most 512 characters"),
        ({"k\0": "v"}, "metadata.k\0: expected a text without NUL characters"),
        ({"k": "\0"}, "metadata.k: expected a text without NUL characters"),
    ],
)
def test_metadata_that_cannot_be_kept_is_told_by_its_key(stage, metadata, message):
    batch = {"input_file_id": "file-" + "0" * 32, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    answer = stage.client.post("/v1/batches", json={**batch, "metadata": metadata})
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, message)
    assert answer.json()["error"]["param"] == message.partition(":")[0]


def test_a_method_that_is_not_for_a_path_is_answered_with_those_that_are(stage):
    answer = stage.client.delete("/v1/jobs")
    assert (answer.status_code, answer.json()["detail"]) == (405, "DELETE is not for this path; use GET, POST")
    assert answer.headers["Allow"] == "GET, POST"


def test_who_asks_openais_route_for_another_batch_reads_where_its_results_are(stage):
    answer = stage.client.get("/v1/batches/monday")
    assert answer.status_code == 404
    assert "/v1/batches/NAME/results" in answer.json()["error"]["message"]
