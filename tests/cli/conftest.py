"""A place with a configuration of its own, where commands are run in process and a simulated vendor can be asked."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import structlog

from worker import cli
from worker.loop import LoopThread
from worker.simulator.script import Script
from worker.simulator.server import Simulator

SCRIPT = Script.model_validate({
    "providers": {
        "steady": {"model": "sim-steady", "price": {"input": "1", "output": "2"}},
        "broken": {"model": "sim-broken", "faults": [{"kind": "status", "rate": 1.0, "status": 400}]},
    }
})  # fmt: skip
CONFIG = """
[providers.steady]
base_url = "{steady}"
model = "sim-steady"
price = {{ input = "1", output = "2" }}
[providers.broken]
base_url = "{broken}"
model = "sim-broken"
price = {{ input = "1", output = "2" }}
[chains.default]
providers = ["steady"]
"""


@dataclass(frozen=True)
class Ended:
    """What a command left behind."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """All of stdout is one JSON document."""
        return json.loads(self.out)


@pytest.fixture(scope="session")
def simulator() -> Iterator[Simulator]:
    """Vendors `steady`, which answers, and `broken`, which takes no request for a good one; on a loop of their own."""
    vendors, loop = Simulator(SCRIPT), LoopThread(asyncio.new_event_loop)
    loop.submit(vendors.__aenter__()).result()
    yield vendors
    loop.submit(vendors.__aexit__()).result()
    loop.stop()


@pytest.fixture
def here(tmp_path: Path, simulator: Simulator, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the commands run: a backstop.toml, nothing set, and afterwards the signals as they were."""
    for name in [name for name in os.environ if name.startswith("BACKSTOP_") or name in ("DATABASE_URL", "REDIS_URL")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    config = CONFIG.format(steady=simulator.base_url("steady"), broken=simulator.base_url("broken"))
    (tmp_path / "backstop.toml").write_text(config)
    return tmp_path


@pytest.fixture
def command(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Ended]]:
    """Runs one command. Whatever it is: no trace, no colours, and nothing but the document on stdout with --json."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    # A command logs to a stream that ends with the test, and its loggers would be kept for all tests to come.
    handlers, level, logged, configure = logging.root.handlers[:], logging.root.level, structlog.get_config(), structlog.configure
    monkeypatch.setattr("structlog.configure", lambda **given: configure(**{**given, "cache_logger_on_first_use": False}))

    def run(*arguments: str, stdin: str = "") -> Ended:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(stdin.encode())), "utf-8"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main(list(arguments))
        said = capsys.readouterr()
        code = exit_.value.code
        assert isinstance(code, int)
        assert "\x1b" not in said.out + said.err
        assert "Traceback" not in said.err
        ended = Ended(code, said.out, said.err)
        if "--json" in arguments and said.out:
            ended.json()
        return ended

    yield run
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    configure(**logged)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def backstop(command: Callable[..., Ended], database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ended]:
    """Runs one command on a ledger and a Redis that are there."""
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv("REDIS_URL", redis_url)
    return command
