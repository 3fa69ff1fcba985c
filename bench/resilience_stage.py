"""Who plays besides Backstop: a simulator for each contestant, a host that takes no connection, the rivals' processes."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from bench import processes
from bench.faultmodel import PROVIDERS
from bench.resilience_plan import DEAD, DEADLINE_S, Plan

READY_S = 60.0


@contextmanager
def simulators(names: Sequence[str], plan: Plan, place: Path, env: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """The URL of each contestant's own simulator, all its providers well."""
    script = place / "script.toml"
    script.write_text(plan.script())
    urls = {name: f"http://127.0.0.1:{_free_port()}" for name in names}
    with ExitStack() as stack:
        for name, url in urls.items():
            argv = ["-m", "worker", "simulate", "--port", url.rpartition(":")[2], "--script", str(script)]
            stack.enter_context(processes.running(argv, place / f"simulator-{name}.log", env))
        for url in urls.values():
            processes.wait_until(partial(_answers, f"{url}/livez"), limit_s=READY_S, what="a simulator")
        yield urls


async def let_weather_begin(url: str, plan: Plan, began: float) -> None:
    """From now on the providers at `url` are ill when the plan says so. `began`: Unix time of the world's second 0."""
    async with httpx.AsyncClient(trust_env=False, timeout=30) as http:
        for world in plan.played:
            for name in PROVIDERS:
                now_s = time.time() - began
                outages = [one.outage(now_s) for one in world.episodes if one.provider == name]
                body = {"outages": [outage for outage in outages if outage]}
                if body["outages"]:
                    (await http.post(f"{url}/{world.provider(name)}/script", json=body)).raise_for_status()


async def bill(url: str) -> list[dict[str, Any]]:
    """Every request that the simulator received."""
    async with httpx.AsyncClient(trust_env=False, timeout=120) as http:
        lines: list[dict[str, Any]] = (await http.get(f"{url}/bill", params={"full": 1})).json()["lines"]
        return lines


def base_urls(plan: Plan, simulator: str, dead_url: str) -> dict[str, list[str]]:
    """Of each world, in the order of the chain."""
    found = {world.name: [f"{simulator}/{world.provider(name)}/v1" for name in PROVIDERS] for world in plan.played}
    found[DEAD][0] = dead_url
    return found


@contextmanager
def dead_host() -> Iterator[str]:
    """A base URL where connecting never ends: nobody accepts, and the queue is full, so the kernel drops each SYN."""
    with socket.socket() as silent, ExitStack() as stack:
        silent.bind(("127.0.0.1", 0))
        silent.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(silent.getsockname())
        yield f"http://127.0.0.1:{silent.getsockname()[1]}/v1"


class Rival:
    """A process of the rivals' Python that is ready to play."""

    def __init__(self, python: Path, name: str, plan_file: Path, out: Path, log: Path) -> None:
        self._out = out
        with log.open("ab") as words:
            argv = [str(python), "-m", "bench.rivals", name, str(plan_file), str(out)]
            self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=words, text=True)
        self._log = log

    def wait_ready(self) -> None:
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            raise RuntimeError(f"a rival did not start: see {self._log}")

    def begin(self, began: float) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{began}\n")
        self._process.stdin.flush()

    async def ended(self, limit_s: float) -> list[dict[str, Any]]:
        """How its jobs ended. Raises TimeoutError."""
        await asyncio.to_thread(processes.wait_until, self._out.exists, limit_s=limit_s, what=f"{self._log.stem} to end")
        found: list[dict[str, Any]] = json.loads(self._out.read_text())
        return found

    def cpu_s(self) -> float:
        return processes.cpu_s(self._process.pid)

    def end(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.kill()
        self._process.wait()


@contextmanager
def rivals(python: Path, plan: Plan, urls: Mapping[str, str], dead_url: str, place: Path) -> Iterator[dict[str, Rival]]:
    """One for each of these simulators, warmed up and waiting for the beginning."""
    with ExitStack() as stack:
        made = {}
        for turn, (name, url) in enumerate(urls.items()):
            file = place / f"plan-{name}.json"
            body = {"deadline_s": DEADLINE_S, "worlds": base_urls(plan, url, dead_url), "jobs": plan.jobs(turn)}
            file.write_text(json.dumps(body))
            made[name] = Rival(python, name, file, place / f"ended-{name}.json", place / f"rival-{name}.log")
            stack.callback(made[name].end)
        for rival in made.values():
            rival.wait_ready()
        yield made


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False, timeout=1).is_success
    except httpx.TransportError:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
