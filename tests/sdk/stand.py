"""Backstop as its users meet it: an API and a worker in processes of their own, in front of simulated vendors."""

import asyncio
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
from ports import free_port
from redis import Redis
from sqlalchemy import Engine, create_engine, text
from stage import own_database

from worker import database, keys
from worker.embedded.servers import Endpoints
from worker.loop import LoopThread
from worker.settings import Settings
from worker.simulator import script
from worker.simulator.server import Simulator

ROOT = Path(__file__).resolve().parents[2]
LONG_S = 60.0  # never waited out by a test that passes
INTERPRETERS = {"1": ROOT / ".venv-openai-1/bin/python", "2": ROOT / ".venv-openai-2/bin/python", "3": Path(sys.executable)}


def failing(status: int, code: str) -> dict[str, Any]:
    return {"faults": [{"kind": "status", "status": status, "code": code, "rate": 1}]}


SCRIPT = {
    "providers": {
        "good": {"model": "vendor/m-good"},
        "policy": {"model": "m-policy", **failing(400, "content_filter")},
        "invalid": {"model": "m-invalid", **failing(400, "invalid_value")},
        "long": {"model": "m-long", **failing(400, "context_length_exceeded")},
        "silent": {"model": "m-silent", "faults": [{"kind": "hang", "seconds": 300, "rate": 1}]},
        "late": {"model": "m-late", "latency": {"ms": 1500}},
    }
}


class ToolVendor(BaseHTTPRequestHandler):
    """Calls the tool it is given, and says something once it is told what came of it."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        function = {"name": asked["tools"][0]["function"]["name"], "arguments": '{"ticket": 7}'}
        message: dict[str, Any] = {"role": "assistant", "content": None}
        message["tool_calls"] = [{"id": "call_1", "type": "function", "function": function}]
        if asked["messages"][-1]["role"] == "tool":
            message = {"role": "assistant", "content": f"It is {asked['messages'][-1]['content']}."}
        reason = "tool_calls" if "tool_calls" in message else "stop"
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        choices = [{"index": 0, "message": message, "finish_reason": reason}]
        body = json.dumps({"id": "x", "model": "m-tools", "choices": choices, "usage": usage}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@dataclass
class Site:
    """Where Backstop is, as a user knows it, and the ledger behind it."""

    settings: Settings
    url: str
    ledger: Engine

    def sql(self, statement: str, **values: Any) -> list[Any]:
        with self.ledger.begin() as connection:
            result = connection.execute(text(statement), values)
            return list(result) if result.returns_rows else []

    def state_of(self, job_id: str) -> str:
        return self.sql("SELECT state FROM jobs WHERE id = :id", id=UUID(job_id))[0].state

    def play(self, sdk: str, *scenes: str) -> dict[str, Any]:
        """What `play.py` saw under that version of the SDK, as a tenant of its own."""
        python = INTERPRETERS[sdk]
        assert python.exists(), f"no environment with openai {sdk}.x: make .venv-openai-{sdk}/.ready"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")}
        everything, reading = asyncio.run(two_keys(str(self.settings.database_url), f"openai-{sdk}"))
        self.sql("UPDATE api_keys SET scopes = '{read}' WHERE name = 'reading'")
        environment |= {"OPENAI_BASE_URL": self.url, "OPENAI_API_KEY": everything, "READ_KEY": reading}
        program = [str(python), str(Path(__file__).with_name("play.py")), *scenes]
        done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=2 * LONG_S, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@contextmanager
def open_site(servers: Endpoints, home: Path, *, well: bool = False) -> Iterator[Site]:
    """An API, a worker for both lanes, and simulated vendors; `well`: only those that answer."""
    loop, simulator = LoopThread(), Simulator(script.parse(SCRIPT, "script"))
    with ExitStack() as stack:
        stack.callback(loop.stop)
        loop.submit(simulator.__aenter__()).result()
        stack.callback(lambda: loop.submit(simulator.__aexit__()).result())
        names = ["good"] if well else SCRIPT["providers"]
        config = configured(home, simulator, names, None if well else stack.enter_context(serving(ToolVendor)))
        database_url = stack.enter_context(own_database(servers, "sdk"))
        settings = Settings(database_url=database_url, redis_url=servers.redis_url, data=home, config=config)
        with Redis.from_url(servers.redis_url) as redis:
            redis.flushall()
        stack.enter_context(running(settings, WORKER))
        ledger = create_engine(database.driver_url(database_url))
        stack.callback(ledger.dispose)
        url = stack.enter_context(api(settings))
        made = Site(settings, url, ledger)
        until(lambda: made.sql("SELECT FROM workers WHERE state = 'live'"))
        yield made


def configured(home: Path, simulator: Simulator, names: Collection[str], tool_vendor: str | None) -> Path:
    providers = {name: (simulator.base_url(name), SCRIPT["providers"][name]["model"]) for name in names}
    if tool_vendor:
        providers["tools"] = (tool_vendor, "m-tools")
    lines = [
        f'[providers.{name}]\nbase_url = "{url}"\nmodel = "{model}"\nprice = {{ input = "1", output = "2" }}\n'
        for name, (url, model) in providers.items()
    ]
    file = home / "backstop.toml"
    file.write_text("\n".join([*lines, '[chains.default]\nproviders = ["good"]']))
    return file


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()
        thread.join()


WORKER = """
from worker.app import app
app.worker_main(["worker", "-n", "sdk@test", "-Q", "backstop.1.interactive,backstop.2.bulk", "--without-gossip", "--without-mingle"])
"""
API = """
import sys
from api import chat
from worker.cli import main
if len(sys.argv) > 2:
    chat.BEAT_S = float(sys.argv[2])
main(["api", "--port", sys.argv[1]])
"""


@contextmanager
def running(settings: Settings, program: str, *arguments: str) -> Iterator[None]:
    """A process of Backstop's, until the context ends; it must end well itself."""
    environment = os.environ | {
        "DATABASE_URL": str(settings.database_url),
        "REDIS_URL": str(settings.redis_url),
        "BACKSTOP_CONFIG": str(settings.config),
        "BACKSTOP_DATA": str(settings.data),
        "BACKSTOP_HEARTBEAT_S": "0.2",
        "BACKSTOP_DRAIN_S": "1",
    }
    with (settings.data / f"{secrets.token_hex(4)}.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-c", program, *arguments], env=environment, stdout=log, stderr=log)
        try:
            yield
            process.terminate()
            assert process.wait(LONG_S) in (0, -signal.SIGTERM)
        finally:
            process.kill()
            process.wait()


@contextmanager
def api(settings: Settings, *beat_s: str) -> Iterator[str]:
    """The base URL of an API that answers."""
    port = free_port()
    with running(settings, API, str(port), *beat_s):
        until(lambda: answers(f"http://127.0.0.1:{port}/readyz"))
        yield f"http://127.0.0.1:{port}/v1"


def answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


async def two_keys(database_url: str, tenant: str) -> list[str]:
    db = database.engine(database_url)
    try:
        return [(await keys.create(db, name=name, tenant=tenant)).secret for name in ("everything", "reading")]
    finally:
        await db.dispose()


def until(condition: Callable[[], object]) -> None:
    give_up_s = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < give_up_s
        time.sleep(0.02)
