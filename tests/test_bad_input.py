"""Whatever is put in, through whichever door: it is refused with its field or row named, or carried to the provider unharmed."""

import asyncio
import json
from dataclasses import replace

import pytest
import stage
from starlette.testclient import TestClient

from api.app import create_app
from worker import database, keys, template, tickets
from worker.batchlines import DEEPEST, LARGEST_SCHEMA
from worker.cli.produce import rows_of
from worker.config import ProviderConfig, load
from worker.errors import Unreadable, UsageError
from worker.job import Answer, ChatRequest
from worker.providers.http import client
from worker.providers.openai import OpenAICompatible
from worker.settings import Settings
from worker.signals import Signal
from worker.simulator.script import parse
from worker.simulator.server import Simulator
from worker.submit import NewJob, add_rows, open_batch, submit
from worker.template import DEFAULT
from worker.textfile import MOST_SHOWN

CONFIG = """
[providers.first]
base_url = "http://127.0.0.1:1"
model = "m-first"
[chains.default]
providers = ["first"]
"""
HI = '"messages": [{"role": "user", "content": "hi"}]'
DIGITS = "7" * 10_000
DEEP = "[" * 10_000 + "]" * 10_000


def nested(levels, inner="1"):
    return "[" * levels + inner + "]" * levels


def saying(content):
    return f'{{"messages": [{{"role": "user", "content": {content}}}]}}'


def fitting(schema):
    return f'{{{HI}, "response_format": {{"type": "json_schema", "json_schema": {{"name": "a", "schema": {schema}}}}}}}'


# Bodies of chat requests, as they may stand in a POST or in a batch line: what is complained of, or None where they are carried.
BODIES = [
    (saying(r'"a\u0000b"'), None),
    (saying(r'"a\ud800b"'), None),
    (saying('""'), None),
    (saying('"' + "x" * 900_000 + '"'), None),
    (f'{{{HI}, "user": "\\udfff"}}', None),
    (f'{{{HI}, "stop": ["\\u0000"]}}', None),
    (f'{{{HI}, "logit_bias": {{"\\ud800\\u0000": {"7" * 4_000}}}}}', None),
    (f'{{{HI}, "logit_bias": {{"a": 1e308}}}}', None),
    (f'{{{HI}, "logit_bias": {{"a": {nested(DEEPEST - 1)}}}}}', None),
    (f'{{{HI}, "temperature": 0.{DIGITS}}}', None),
    (fitting(r'{"title": "\ud800", "properties": {"\u0000": {}}}'), None),
    (fitting('{"$schema": "http://json-schema.org/draft-07/schema#", "$ref": "#"}'), None),
    (fitting('{"items": ' * 50 + "{}" + "}" * 50), None),
    ("{}", "messages"),
    ('{"messages": []}', "messages"),
    ('{"messages": "hi"}', "messages"),
    ('{"messages": [7]}', "messages"),
    ('{"messages": [{}]}', "messages[0].role"),
    ('{"messages": [{"role": ["user"], "content": "hi"}]}', "messages[0].role"),
    (r'{"messages": [{"role": "\ud800", "content": "hi"}]}', "messages[0].role"),
    (saying("7"), "messages[0].content"),
    (saying("null"), "messages[0].content"),
    (saying("[]"), "messages[0].content"),
    (saying("[7]"), "messages[0].content"),
    (saying(f'[{{"type": "text", "text": {nested(DEEPEST)}}}]'), "messages: nested more than"),
    (saying('[{"type": "text", "text": 1e999}]'), "messages: inf"),
    ('{"messages": [{"role": "assistant", "content": null, "tool_calls": 7}]}', "messages[0].tool_calls"),
    ('{"messages": [{"role": "assistant", "content": "a", "tool_calls": [7]}]}', "messages[0].tool_calls"),
    (f'{{{HI}, "temperature": "hot"}}', "temperature"),
    (f'{{{HI}, "temperature": {"7" * 4_000}}}', "temperature"),
    (f'{{{HI}, "seed": {"7" * 4_000}}}', "seed"),
    (f'{{{HI}, "stop": [7]}}', "stop"),
    (f'{{{HI}, "tools": [null]}}', "tools"),
    (f'{{{HI}, "modalities": [[]]}}', "modalities"),
    (f'{{{HI}, "logit_bias": {{"a": 1e999}}}}', "logit_bias"),
    (f'{{{HI}, "logit_bias": {{"a": {nested(500)}}}}}', "logit_bias: nested more than"),
    (f'{{{HI}, "temperaturr": 1}}', "did you mean 'temperature'"),
    (f'{{{HI}, "\\u0000": 1}}', "�: unknown parameter"),
    (f'{{{HI}, "{"x" * 900_000}": 1}}', "x" * MOST_SHOWN + ": unknown parameter"),
    (f'{{{HI}, "response_format": 7}}', "response_format"),
    (f'{{{HI}, "response_format": {{"type": ["json_schema"]}}}}', "response_format.type"),
    (fitting("7"), "response_format.json_schema.schema"),
    (fitting('{"type": "strin"}'), "response_format.json_schema.schema: not a JSON Schema at $.type"),
    (fitting('{"pattern": "("}'), "response_format.json_schema.schema: not a JSON Schema at $.pattern"),
    (fitting('{"$ref": "file:///etc/passwd"}'), "a $ref or $schema in it leads nowhere, or out of it"),
    (fitting('{"$schema": 7}'), "response_format.json_schema.schema: not a JSON Schema at $.$schema"),
    (fitting('{"$schema": []}'), "response_format.json_schema.schema: not a JSON Schema at $.$schema"),
    (fitting('{"$schema": {}}'), "response_format.json_schema.schema: not a JSON Schema at $.$schema"),
    (fitting('{"$schema": "http://example.com/mine"}'), "a $ref or $schema in it leads nowhere"),
    (fitting('{"title": "' + "x" * LARGEST_SCHEMA + '"}'), "response_format.json_schema.schema: larger than"),
    (fitting('{"a": ' * 100 + "{}" + "}" * 100), "response_format: nested more than"),
]

# What only a POST can hold.
POSTED = [
    ("", "body"),
    ("{", "body"),
    ("\0", "body"),
    ("[]", "body"),
    ("7", "body"),
    (b"\xff\xfe{}", "body"),
    (b'{"messages": [{"role": "user", "content": "\xe9"}]}', "byte 44 is no UTF-8"),
    (saying(DEEP), "nested too deeply"),
    (f'{{{HI}, "metadata": {{"a": {DEEP}}}}}', "nested too deeply"),
    (f'{{{HI}, "seed": {DIGITS}}}', "too many digits"),
    (f'{{{HI}, "temperature": NaN}}', "temperature"),
    (f'{{{HI}, "logit_bias": {{"a": -Infinity}}}}', "logit_bias"),
    (f"{{{HI}, {HI}}}", None),
    (f'{{{HI}, "\\ud800": 1}}', "body"),
    (f'{{{HI}, "metadata": {{"a": {"7" * 4_000}, "b": 1e308, "": null}}}}', None),
    (f'{{{HI}, "metadata": {{"a": NaN}}}}', "metadata"),
    (f'{{{HI}, "metadata": {{"a": 1e999}}}}', "metadata"),
    (f'{{{HI}, "metadata": {{"a": "\\u0000"}}}}', "metadata"),
    (f'{{{HI}, "metadata": {{"\\ud800": 1}}}}', "metadata"),
    (f'{{{HI}, "metadata": {{"a": {nested(40)}}}}}', "metadata"),
    (f'{{{HI}, "metadata": []}}', "metadata"),
    (f'{{{HI}, "metadata": {{"a": "{"x" * 16_400}"}}}}', "16384 characters"),
    (f'{{{HI}, "model": "default"}}', "as `chain`"),
    (f'{{{HI}, "chain": 7}}', "chain"),
    (f'{{{HI}, "chain": "\\u0000"}}', "no chain or provider"),
    (f'{{{HI}, "chain": "\\ud800"}}', "chain"),
    (f'{{{HI}, "chain": "{"x" * 900_000}"}}', "chain"),
    (f'{{{HI}, "lane": "\\ud800"}}', "lane"),
    (f'{{{HI}, "deadline_s": NaN}}', "deadline_s"),
    (f'{{{HI}, "deadline_s": true}}', "deadline_s"),
    (f'{{{HI}, "deadline_s": "60"}}', "deadline_s"),
    (f'{{{HI}, "deadline_s": {"7" * 4_000}}}', "deadline_s"),
    (saying('"' + "x" * 1_100_000 + '"'), "1048576 bytes at most"),
]

# What only a batch line can hold.
LINES = [
    ('{"custom_id": "a"', "not JSON"),
    ("7", "not a JSON object"),
    ('"hi"', "not a JSON object"),
    (DEEP, "nested too deeply"),
    (f'{{"custom_id": "a", "body": {saying(DEEP)}}}', "nested too deeply"),
    (f'{{"custom_id": "a", "body": {{{HI}, "seed": {DIGITS}}}}}', "a number of 10000 digits"),
    (f'{{"custom_id": "a", "body": {{{HI}, "temperature": NaN}}}}', "NaN"),
    (f'{{"custom_id": "a", "custom_id": "b", "body": {{{HI}}}}}', "'custom_id' stands there more than once"),
    (f'{{"custom_id": "a", "body": {{{HI}, {HI}}}}}', "'messages' stands there more than once"),
    (f'{{"custom_id": 7, "body": {{{HI}}}}}', "custom_id"),
    (f'{{"custom_id": "", "body": {{{HI}}}}}', "custom_id"),
    (f'{{"custom_id": "\\u0000\\ud800", "body": {{{HI}}}}}', None),
    (f'{{"custom_id": "{"x" * 100_000}", "body": {{{HI}}}}}', None),
    ('{"custom_id": "a", "body": 7}', "body: expected an object"),
    (f'{{"custom_id": "a", "method": [], "body": {{{HI}}}}}', "method"),
    (f'{{"custom_id": "a", "url": {{}}, "body": {{{HI}}}}}', "url"),
    (f'{{"custom_id": "a", "\\ud800": 1, "body": {{{HI}}}}}', "unknown key '�'"),
    (f'{{"custom_id": "a", "body": {{{HI}, "model": 7}}}}', "body.model"),
    (f'{{"custom_id": "a", "body": {{{HI}, "model": "\\ud800\\u0000"}}}}', "body.model: no chain or provider '��'"),
    (f'{{"custom_id": "a", "body": {{{HI}, "model": "{"x" * 100_000}"}}}}', "body.model"),
]

# Rows of JSONL that go through a template.
ROWS = [
    (r'{"body": "a\u0000\ud800", "\u0000": "x"}', None),
    (f'{{"body": {nested(400)}}}', None),
    ('{"body": 1e999}', None),
    (f'{{"body": "{"x" * 1_000_000}"}}', None),
    (f'{{"body": {DIGITS}}}', "a number of 10000 digits"),
    (f'{{"body": {DEEP}}}', "nested too deeply"),
    ('{"body": NaN}', "NaN"),
    ('{"body": "a", "body": "b"}', "'body' stands there more than once"),
    ("null", "not a JSON object"),
]


@pytest.fixture
def api(database_url, redis_url, tmp_path, monkeypatch):
    """A client of the API that holds a key. What it publishes goes nowhere."""

    async def secret():
        db = database.engine(database_url)
        try:
            return (await keys.create(db, name="test")).secret
        finally:
            await db.dispose()

    config = tmp_path / "backstop.toml"
    config.write_text(CONFIG)
    settings = Settings(database_url=database_url, redis_url=redis_url, config=config, data=tmp_path)
    with TestClient(create_app(settings), raise_server_exceptions=False) as opened:
        parts = opened.app.state.parts
        monkeypatch.setattr(opened.app.state, "parts", replace(parts, publish=stage.Mailbox().publish))
        opened.headers["Authorization"] = f"Bearer {asyncio.run(secret())}"
        opened.headers["Content-Type"] = "application/json"
        yield opened


async def all_are_sent(db, count):
    """So many jobs are queued; a worker can claim each and a provider can be asked each."""
    ids = [row.id for row in await stage.rows(db, "SELECT id FROM jobs WHERE state = 'queued'")]
    assert len(ids) == count
    claims = await stage.take(db, ids)
    assert len(claims) == count
    async with Simulator(parse({"providers": {"first": {"model": "sim"}}}, "test")) as simulator, client(most_connections=4) as http:
        provider = OpenAICompatible("first", ProviderConfig(base_url=simulator.base_url("first"), model="sim"), http, key=None)
        for claimed in claims:
            reply = await provider.complete(claimed.request, timeout_s=30, call_id=str(claimed.job_id))
            assert reply.signal is Signal.ANSWERED, reply


def test_what_is_posted_is_refused_by_its_field_or_can_be_sent(api, database_url):
    posted = [*BODIES, *POSTED]
    for body, complaint in posted:
        answer = api.post("/v1/jobs", content=body if isinstance(body, bytes) else body.encode())
        if complaint is None:
            assert answer.status_code == 202, (body[:100], answer.text)
        else:
            assert answer.status_code in (400, 413, 422), (body[:100], answer.text)
            assert complaint in answer.json()["detail"], (body[:100], answer.text[:500])
            fields = [fault["field"] for fault in answer.json().get("errors", [])]
            assert answer.status_code != 422 or (fields and all(field.startswith("body") for field in fields)), (body[:100], fields)
            assert len(answer.text) < 1_500
    accepted = sum(complaint is None for _, complaint in posted)

    async def story(db):
        await all_are_sent(db, accepted)

    stage.play(database_url, story)
    listed = api.get("/v1/jobs?limit=100").json()["data"]
    assert len(listed) == accepted


@pytest.mark.parametrize("key", [b"a\0b", b"\xe9", b"x" * 300, b"a b", b""])
def test_an_idempotency_key_that_cannot_be_kept_is_refused_by_its_name(key, api):
    answer = api.post("/v1/jobs", content=f"{{{HI}}}", headers=[(b"Idempotency-Key", key)])
    assert answer.status_code == 422
    assert "idempotency-key" in answer.json()["detail"]


def test_a_row_that_cannot_be_used_says_why_and_every_other_one_can_be_sent(database_url, tmp_path):
    (tmp_path / "backstop.toml").write_text(CONFIG)
    configured = load(tmp_path / "backstop.toml")
    lines = [(f'{{"custom_id": "a", "body": {body}}}', complaint) for body, complaint in BODIES] + LINES

    async def story(db):
        carried = 0
        for name, wanted in (("lines.jsonl", lines), ("rows.jsonl", ROWS)):
            file = tmp_path / name
            file.write_text("\n".join(line for line, _ in wanted) + "\n")
            batch = await open_batch(db, name, fingerprint=[name], columns=None)
            with tickets.open_tickets(str(file)) as source:
                rows = list(rows_of(source, DEFAULT, configured, "default", None))
            for row, (line, complaint) in zip(rows, wanted, strict=True):
                assert (row.problem is None) == (complaint is None), (line[:100], row.problem)
                assert (complaint or "") in (row.problem or ""), (line[:100], row.problem)
                assert len(row.problem or "") < 500
            assert sum([added async for added in add_rows(db, batch, rows)]) == len(wanted)
            carried += sum(complaint is None for _, complaint in wanted)
        await all_are_sent(db, carried)

    stage.play(database_url, story)


def test_half_characters_that_a_terminal_lets_through_are_carried_as_replaced(database_url):
    async def story(db):
        words = "a\0b\udcff"  # of an argument that is not UTF-8
        await submit(db, stage.Mailbox().publish, NewJob(request=ChatRequest([{"role": "user", "content": words}])))
        await all_are_sent(db, 1)
        (row,) = await stage.rows(db, "SELECT request FROM job_requests")
        assert row.request["messages"][0]["content"] == "a�b�"

    stage.play(database_url, story)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (b"user = '\xff'", "cannot be read"),
        ("user = '\0'", "not TOML"),
        ("user = 'a'\nuser = 'b'", "not TOML"),
        (f"user = 'a'\n[parameters]\nseed = {DIGITS}", "a number in it has too many digits"),
        (f"user = 'a'\n[parameters]\nlogit_bias.a = {nested(400)}", "nested more than"),
        (f"user = 'a'\n[schema.{'.'.join('a' * 5_000)}]", "nested too deeply"),
        (f"user = 'a'\n[schema.{'.'.join('a' * 100)}]", "nested more than"),
        ("user = 'a'\n[parameters]\ntemperature = nan", "temperature"),
        ("user = 'a'\n[parameters]\nlogit_bias.a = inf", "logit_bias"),
        ("user = 'a'\n[parameters]\nlogit_bias.a = 2020-01-01", "logit_bias"),
        ("user = 'a'\n[schema]\n'$schema' = 7", "$schema"),
        ("user = 7", "user: expected a text"),
        ("user = '''\n{{ body | nonsense }}'''", "user, line 1: No filter named 'nonsense'"),
        (f"user = '{{{{ {'(' * 5_000}body{')' * 5_000} }}}}'", "user: nested too deeply"),
        (f"user = 'a'\nsystem = '{'{% if body %}' * 3_000}{'{% endif %}' * 3_000}'", "system: nested too deeply"),
        (f"user = '{'{% for a in body %}' * 30}x{'{% endfor %}' * 30}'", "user: nested too deeply"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_in_one_line(text, complaint, tmp_path):
    file = tmp_path / "prompt.toml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError) as refused:
        template.load(file)
    assert str(refused.value).startswith(str(file))
    assert complaint in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_a_template_says_that_cannot_be_stored_is_replaced(database_url, tmp_path):
    file = tmp_path / "prompt.toml"
    file.write_text(r"""
user = "{{ body }} \u0000"
system = "\u0000"
parameters.user = "\u0000"
[schema]
type = "object"
properties = { "a\u0000" = { title = "\u0000" } }
""")
    asking = template.load(file)
    assert asking.fields == ["a�"]

    async def story(db):
        batch = await open_batch(db, "monday", fingerprint=[], columns=["body"], fields=asking.fields)
        request = asking.request(tickets.Ticket(1, {"body": "hi"}))
        async for _ in add_rows(db, batch, [stage.Row(ordinal=1, custom_id=None, request=request, chain="default")]):
            pass
        await all_are_sent(db, 1)

    stage.play(database_url, story)


REQUEST = {"messages": [{"role": "user", "content": "hi"}], "parameters": {}}
ANSWER = json.loads(json.dumps(stage.an_answer().to_json()))


@pytest.mark.parametrize(
    "body",
    [
        None, 7, "hi", [], {}, {**REQUEST, "messages": None}, {**REQUEST, "messages": {}}, {**REQUEST, "messages": []},
        {**REQUEST, "messages": ["hi"]}, {**REQUEST, "parameters": None}, {**REQUEST, "parameters": []}, {**REQUEST, "tools_v2": []},
    ],
)  # fmt: skip
def test_a_stored_request_that_this_version_did_not_write_is_unreadable_and_nothing_else(body):
    with pytest.raises(Unreadable, match="request"):
        ChatRequest.from_json(body)


@pytest.mark.parametrize(
    "body",
    [
        None, 7, "hi", [], {}, {**ANSWER, "content": 7}, {**ANSWER, "finish_reason": None}, {**ANSWER, "provider": []},
        {**ANSWER, "usage": None}, {**ANSWER, "usage": {"input_tokens": "7"}}, {**ANSWER, "usage": {"input_tokens": True}},
        {**ANSWER, "tool_calls": {}}, {**ANSWER, "tool_calls": [7]}, {**ANSWER, "degraded": 7},
    ],
)  # fmt: skip
def test_a_stored_answer_that_this_version_did_not_write_is_unreadable_and_nothing_else(body):
    with pytest.raises(Unreadable, match="answer"):
        Answer.from_json(body)


def test_answers_of_versions_before_and_after_this_one_are_read():
    older = {name: value for name, value in ANSWER.items() if name not in ("tool_calls", "degraded")}
    newer = {**ANSWER, "mood": "fine", "usage": {**ANSWER["usage"], "watts": 7}}
    assert Answer.from_json(older) == Answer.from_json(newer) == Answer.from_json(ANSWER) == stage.an_answer()


def test_an_answer_that_cannot_be_read_is_no_answer_and_the_job_says_so(api, database_url):
    job_id = api.post("/v1/jobs", content=f"{{{HI}}}").json()["id"]

    async def story(db):
        await stage.rows(db, "INSERT INTO results (job_id, fence, answer) VALUES (:id, 1, '[7]')", id=job_id)

    stage.play(database_url, story)
    answer = api.get(f"/v1/jobs/{job_id}").json()
    assert (answer["result"], answer["error"]["code"]) == (None, "unreadable_answer")
    assert "not one this version wrote" in answer["error"]["message"]
