"""The simulated vendors on one port: `http://HOST:PORT/PROVIDER/v1` is a base URL for OpenAI-compatible and Anthropic clients."""

from __future__ import annotations

import asyncio
import errno
import json
import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import click
from aiohttp import web

from worker.errors import UsageError
from worker.simulator.answers import say
from worker.simulator.bill import Bill, fingerprint
from worker.simulator.dialects import AnthropicDialect, Dialect, OpenAIDialect, Spoken
from worker.simulator.door import Door
from worker.simulator.plan import Plan, Vendor
from worker.simulator.script import Script
from worker.simulator.wire import Reply, deliver, refusal, reply

_OPENAI, _ANTHROPIC = OpenAIDialect(), AnthropicDialect()
_CLOSING_S = 0.1  # what is still being answered after that is cut off


class Simulator:
    """An async context manager; inside it, the vendors can be asked.

    Routes: `POST /{provider}/v1/chat/completions` and `POST /{provider}/v1/messages` (either with `"stream": true`),
    `GET /{provider}/v1/models`, `POST /{provider}/script` (a JSON object of keys to replace in it), `GET /bill` (`?full=1`:
    with every line), `GET /livez`. API keys are not checked.
    Raises UsageError when a port is in use or the bill cannot be written.
    """

    def __init__(
        self,
        script: Script,
        host: str = "127.0.0.1",
        port: int = 0,
        bill_file: Path | None = None,
        *,
        fsync: bool = False,
    ) -> None:
        self.host, self.port = host, port
        self.bill = Bill(bill_file, fsync=fsync)
        self._vendors = {name: Vendor(name, provider, script.seed) for name, provider in script.providers.items()}
        self._doors: dict[str, Door] = {}
        self._runner: web.ServerRunner | None = None

    @property
    def url(self) -> str:
        return _url(self.host, self.port)

    def base_url(self, provider: str) -> str:
        """What to write as `base_url` in the configuration: on the provider's own port when its script gives it one."""
        port = self._doors[provider].port if provider in self._doors else self.port
        return f"{_url(self.host, port)}/{self._vendor(provider).name}/v1"

    def requests(self, provider: str) -> int:
        """How many chat requests it has seen."""
        return self._vendor(provider).requests

    async def change(self, provider: str, **changes: Any) -> None:
        """These keys of the provider's script hold from now on, as `faults=[]`; outage windows are counted anew."""
        vendor = self._vendor(provider)
        vendor.change(changes)
        if provider in self._doors:
            await self._doors[provider].look_again()

    async def __aenter__(self) -> Self:
        try:
            await self._open()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        for door in self._doors.values():
            await door.stop()
        if self._runner is not None:
            await self._runner.cleanup()
        self.bill.end()

    async def _open(self) -> None:
        self._runner = web.ServerRunner(self._server(), shutdown_timeout=_CLOSING_S)
        await self._runner.setup()
        port = self.port
        try:
            site = web.TCPSite(self._runner, self.host, port, backlog=4096)
            await site.start()
            self.port = self._runner.addresses[0][1]
            for name, vendor in self._vendors.items():
                port = vendor.script.port or 0
                if vendor.script.port is not None:
                    self._doors[name] = Door(vendor, self._server(), self.host, port)
                    await self._doors[name].start()
        except OSError as failure:
            reason = "is in use" if failure.errno == errno.EADDRINUSE else f"cannot be opened ({failure.strerror})"
            raise UsageError(f"port {port} on {self.host} {reason}: choose another one") from None

    def _server(self) -> web.Server:
        return web.Server(self._handle, handler_cancellation=True, access_log=None, keepalive_timeout=3600)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        match request.method, request.path.strip("/").split("/"):
            case "POST", [name, "v1", "chat", "completions"] if name in self._vendors:
                return await self._chat(request, self._vendors[name], _OPENAI)
            case "POST", [name, "v1", "messages"] if name in self._vendors:
                return await self._chat(request, self._vendors[name], _ANTHROPIC)
            case "GET", [name, "v1", "models"] if name in self._vendors:
                model = {
                    "id": self._vendors[name].script.model,
                    "object": "model",
                    "created": 0,
                    "owned_by": "simulator",
                }
                return web.json_response({"object": "list", "data": [model]})
            case "POST", [name, "script"] if name in self._vendors:
                return await self._rewrite(request, name)
            case "GET", ["bill"]:
                return web.json_response(self.bill.to_json(full=request.query.get("full") == "1"))
            case "GET", ["livez"]:
                return web.json_response({"status": "ok"})
        known = ", ".join(self._vendors)
        return (await deliver(request, refusal(_OPENAI, 404, code="not_found", message=f"No such route; providers: {known}")))[0]

    async def _chat(self, request: web.BaseRequest, vendor: Vendor, dialect: Dialect) -> web.StreamResponse:
        raw = b""
        complete = False
        try:
            raw = await request.content.read()
            complete = True
        finally:
            ask = _parsed(raw) if complete else None
            prompt = fingerprint(ask["messages"]) if ask else ""
            seq = self.bill.open(vendor.name, vendor.script.price, request.headers.get("X-Client-Request-Id"), prompt)
            if not complete:
                self.bill.close(seq, "incomplete", None, (0, 0), written=False)
        made, latency_s = _made(vendor, dialect, ask)
        return await self._play(request, vendor, made, latency_s, seq)

    async def _play(self, request: web.BaseRequest, vendor: Vendor, made: Reply, latency_s: float, seq: int) -> web.StreamResponse:
        written = False
        vendor.busy += 1
        try:
            if latency_s and made.outcome not in ("reset", "refuse", "limited"):
                await asyncio.sleep(latency_s)
            response, written = await deliver(request, made)
        finally:
            vendor.busy -= 1
            self.bill.close(seq, made.outcome, made.status, made.tokens, written=written)
        return response

    async def _rewrite(self, request: web.BaseRequest, name: str) -> web.StreamResponse:
        try:
            changes = json.loads(await request.content.read())
            if not isinstance(changes, dict):
                raise UsageError(f"{name}: expected a JSON object with keys of a provider's script")
            self._vendor(name).change(changes)
        except (UsageError, ValueError) as error:
            return (await deliver(request, refusal(_OPENAI, 400, message=str(error))))[0]
        if name in self._doors:
            await self._doors[name].look_again()
        return web.json_response(self._vendor(name).script.model_dump(mode="json", exclude_unset=True))

    def _vendor(self, name: str) -> Vendor:
        if name not in self._vendors:
            raise UsageError(f"the script has no provider {name!r}; there are: {', '.join(self._vendors)}")
        return self._vendors[name]


def serve(script: Script, host: str, port: int, bill_file: Path | None) -> None:
    """Runs until SIGINT or SIGTERM; says on stderr where. Raises UsageError as `Simulator` does."""
    asyncio.run(_serve(Simulator(script, host, port, bill_file), list(script.providers)))


async def _serve(simulator: Simulator, providers: list[str]) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    async with simulator:
        for provider in providers:
            click.echo(f"{provider}: {simulator.base_url(provider)}", err=True)
        click.echo(f"bill: {simulator.url}/bill   (Ctrl-C stops)", err=True)
        await stopped.wait()


def _made(vendor: Vendor, dialect: Dialect, ask: Mapping[str, Any] | None) -> tuple[Reply, float]:
    """The reply to a vendor's next request, and its latency in seconds."""
    plan = vendor.next()
    made = _answer(vendor, plan, dialect, ask)
    room = dialect.room(vendor.limits.levels(), time.time())
    return replace(made, headers={**room, **made.headers}), plan.latency_s


def _answer(vendor: Vendor, plan: Plan, dialect: Dialect, ask: Mapping[str, Any] | None) -> Reply:
    if ask is None:
        return refusal(dialect, 400, message="Expected a JSON object with messages.", outcome="invalid")
    try:
        saying = say(vendor.seed, dialect.asked(ask))
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        return refusal(dialect, 400, message="The simulator has no answer to this request.", outcome="invalid")
    wait_s = vendor.refusal_s(saying.input_tokens + saying.output_tokens)
    if wait_s is not None:
        return refusal(dialect, 429, retry_after_s=wait_s, message="Rate limit reached.", outcome="limited")
    spoken = Spoken(saying, vendor.script.model, f"{vendor.name}-{plan.n}", int(time.time()))
    return reply(plan.fault, spoken, dialect, streamed=ask.get("stream") is True)


def _parsed(raw: bytes) -> dict[str, Any] | None:
    """The body of a chat request, None when it is none."""
    try:
        ask = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    messages = ask.get("messages") if isinstance(ask, dict) else None
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        return None
    return dict(ask)


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
