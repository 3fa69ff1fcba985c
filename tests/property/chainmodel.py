"""Any script of faults for a chain, and what came of it: scripted providers at the real gates and the real cache, in virtual time."""

import asyncio
from dataclasses import dataclass
from typing import Any

from scripted import USAGE

from worker.job import Answer, ChatRequest, Lane, new_id
from worker.ledger import Asked
from worker.providers.provider import Reply
from worker.signals import Signal

SECRET = "zebra-stripe-4711"  # in prompts, answers and exceptions; nowhere else may it turn up
SMALLER = "s"
FITS, UNFIT = f'{{"label": "{SECRET}"}}', f'{{"label": 1, "x": "{SECRET}"}}'
_SHAPE = {"type": "object", "required": ["label"], "properties": {"label": {"type": "string"}}}
WITH_SHAPE = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": _SHAPE}}}


@dataclass(frozen=True)
class Act:
    """What a provider says, so many seconds after it was asked. `breaks`: it raises instead."""

    signal: Signal = Signal.ANSWERED
    seconds: float = 0
    wait_s: float | None = None
    status: int | None = None
    code: str | None = None
    content: str = FITS
    finish_reason: str = "stop"
    breaks: bool = False

    async def __call__(self, timeout_s: float) -> Reply:
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.sleep(self.seconds)
        except TimeoutError:
            return Reply(signal=Signal.TIMED_OUT)
        if self.breaks:
            raise KeyError(SECRET)
        answer = None
        if self.signal is Signal.ANSWERED:
            answer = Answer(content=self.content, finish_reason=self.finish_reason, provider="p", model="m", usage=USAGE)
        told = {"http_status": self.status, "error_code": self.code, "retry_after_s": self.wait_s}
        return Reply(signal=self.signal, answer=answer, usage=USAGE if answer else None, **told)


@dataclass(frozen=True)
class Part:
    """One provider: its acts in order, the last one for ever, and how its gate is found."""

    acts: tuple[Act, ...] = (Act(),)
    max_retries: int = 1
    timeout_s: float = 10
    host: int = 0
    version: int = 1
    account: int = 0
    price: int | None = 1
    window: int | None = None
    gate: str = "well"  # isolated, shut, probe, blocked, full, scarce

    @property
    def base_url(self) -> str:
        return f"http://h{self.host}.test/v{self.version}"

    def config(self) -> dict[str, Any]:
        price = {"input": str(self.price), "output": str(2 * self.price)} if self.price else {"input": "0", "output": "0"}
        own = {"base_url": self.base_url, "api_key": f"env:KEY_{self.account}", "context_tokens": self.window, "price": price}
        return own | {"max_retries": self.max_retries, "timeout_s": self.timeout_s}

    def act(self, number: int) -> Act:
        return self.acts[min(number, len(self.acts) - 1)]


@dataclass(frozen=True)
class Play:
    """A job, its chain, and whatever befalls them. Providers are called p0, p1 and so on, and `SMALLER`."""

    parts: tuple[Part, ...]
    smaller: Part | None = None
    strategy: str = "ordered"
    degrade: tuple[str, ...] = ()
    lane: Lane = Lane.BULK
    remaining_s: float = 60
    attempts: int = 0
    asked: tuple[tuple[int, str], ...] = ()  # of the smaller one: -1
    opened: int | None = None  # whose call row the claim has opened
    cancel: tuple[float, int] | None = None  # after so many seconds, and then so many turns of the loop
    on_unknown: str = "retry"
    on_truncated: str = "accept"
    overflow: bool = False
    hedge_dearer: bool = False
    p95: float | None = None
    hedges: float = 0
    shaped: bool = False
    temperature: float = 0
    kept: bool = False  # an answer to this very request is in the cache
    books: tuple[str, ...] = ("open",)  # gone: the job is somebody else's; error: Postgres is away
    books_s: float = 0
    gate_s: float = 0
    hush_s: float = 1e9  # from then on this worker may not call
    seed: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"p{i}" for i in range(len(self.parts)))

    def part(self, name: str) -> Part:
        part = self.smaller if name == SMALLER else self.parts[int(name[1:])]
        assert part is not None
        return part

    def request(self) -> ChatRequest:
        parameters = {"temperature": self.temperature} | (WITH_SHAPE if self.shaped else {})
        return ChatRequest([{"role": "user", "content": SECRET}], parameters)

    def route(self) -> dict[str, Any]:
        route: dict[str, Any] = {"providers": self.names, "strategy": self.strategy, "degrade": self.degrade, "overflow": self.overflow}
        route |= {"on_unknown": self.on_unknown, "on_truncated": self.on_truncated, "hedge_dearer": self.hedge_dearer}
        route |= {"smaller": SMALLER} if "smaller" in self.degrade else {}
        return route | ({"static_text": "later"} if "static" in self.degrade else {})

    def claim(self) -> dict[str, Any]:
        paid = Answer(content=FITS, finish_reason="stop", provider="p", model="m", usage=USAGE)
        asked = tuple(
            Asked(provider=SMALLER if i < 0 else f"p{i}", outcome=word, answer=paid if word == "answered" else None)
            for i, word in self.asked
        )
        opened = {} if self.opened is None else {"opened_id": new_id(), "opened_provider": f"p{self.opened}"}
        about = {"lane": self.lane, "remaining_s": self.remaining_s, "attempts": self.attempts}
        return about | opened | {"asked": asked, "request": self.request()}
