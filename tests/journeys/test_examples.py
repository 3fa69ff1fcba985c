"""Every example does what it says, against real workers, a real API and simulated vendors."""

import ast
import asyncio
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
from ports import free_port
from standardwebhooks.webhooks import Webhook
from test_fleet import LONG_S, Fleet, environment, fleet, until  # noqa: F401 - the fixture

from worker.following import Enqueuing

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


def backstop(*words: str) -> list[str]:
    return [sys.executable, "-m", "worker", *words]


async def lives(url: str) -> bool:
    try:
        with await asyncio.to_thread(urllib.request.urlopen, f"{url}/livez"):
            return True
    except urllib.error.URLError:
        return False


@pytest.fixture(scope="module")
def api(fleet: Fleet) -> Iterator[dict[str, str]]:  # noqa: F811
    """The environment in which clients find an API that answers."""
    environ = environment(fleet.settings)
    made = subprocess.run(backstop("keys", "create", "examples", "--json"), env=environ, capture_output=True, check=True, timeout=LONG_S)
    key = json.loads(made.stdout)["secret"]
    port = free_port()
    process = subprocess.Popen(backstop("api", "--port", str(port)), env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        asyncio.run(until(partial(lives, url)))
        names = {"BACKSTOP_URL": url, "BACKSTOP_API_KEY": key, "OPENAI_BASE_URL": f"{url}/v1", "OPENAI_API_KEY": key}
        yield environ | names
    finally:
        process.terminate()
        process.wait(timeout=LONG_S)


def said(command: list[str], environ: dict[str, str]) -> list[str]:
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=LONG_S, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def python(name: str) -> list[str]:
    return [sys.executable, "-W", "error", str(EXAMPLES / name)]


def test_producer(fleet: Fleet) -> None:  # noqa: F811
    lines = said(python("producer.py"), environment(fleet.settings))
    assert len(lines) == 6
    assert all(" succeeded " in line for line in lines)
    assert [line.split()[0] for line in lines[3:]] == ["ticket-1", "ticket-2", "ticket-3"]


def test_async_producer(fleet: Fleet) -> None:  # noqa: F811
    lines = said(python("async_producer.py"), environment(fleet.settings))
    assert [line.split(":")[0] for line in lines] == ["succeeded", "succeeded"]


def snippets() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (EXAMPLES.parent / "docs" / "api.md").read_text(), re.MULTILINE | re.DOTALL)


def test_the_snippets_compile_and_name_what_there_is() -> None:
    trees = [ast.parse(snippet) for snippet in snippets()]
    named = [
        node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and str(node.module).startswith("worker.")
    ]
    for node in named:
        assert all(hasattr(import_module(str(node.module)), alias.name) for alias in node.names)
    assert len(named) == 3
    for call in (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if ast.unparse(call.func) == "backstop.enqueue":
            assert {one.arg for one in call.keywords} <= set(Enqueuing.__annotations__)


def test_curl(api: dict[str, str]) -> None:
    lines = said(["sh", str(EXAMPLES / "curl.sh")], api)
    waited, calls, at_once, *results = [json.loads(line) for line in lines if line.startswith(("{", "["))]
    assert (waited["state"], at_once["state"]) == ("succeeded", "succeeded")
    assert calls["data"]
    assert "event: succeeded" in lines
    (event,) = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert event["id"] == waited["id"]
    assert {(row["custom_id"], row["state"]) for row in results} == {(f"t-{n}", "succeeded") for n in (1, 2, 3)}
    assert all(row["cursor"] for row in results)


def test_openai_sdk(api: dict[str, str]) -> None:
    lines = said(python("openai_sdk.py"), api)
    assert any(line.startswith("completed") for line in lines)
    assert {json.loads(line)["custom_id"] for line in lines if line.startswith("{")} == {"t-0", "t-1", "t-2"}


@contextmanager
def receiver() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    environ = os.environ | {"WEBHOOK_SECRET": SECRET}
    command = [*python("webhook_receiver.py"), "0"]
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{process.stdout.readline().strip()}", process
        finally:
            process.terminate()


def posted(url: str, body: str, signature: str, at: datetime) -> int:
    headers = {"webhook-id": "msg_1", "webhook-timestamp": str(int(at.timestamp())), "webhook-signature": signature}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body.encode(), headers), timeout=LONG_S) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_the_webhook_receiver_believes_only_what_is_signed() -> None:
    body, now = '{"type":"job.succeeded"}', datetime.now(UTC)
    signature = Webhook(SECRET).sign("msg_1", now, body)
    with receiver() as (url, process):
        assert posted(url, body.replace("succeeded", "failed"), signature, now) == 401
        assert posted(url, body, signature, now) == 204
        assert process.stdout is not None
        assert process.stdout.readline() == "msg_1 job.succeeded\n"
