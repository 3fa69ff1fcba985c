"""A chain of scripted providers, with the real gates; its time is virtual where that matters."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import pytest
from fakeredis import FakeAsyncRedis as FakeRedis

from worker import step as step_module
from worker import walk as walk_module
from worker.calls import NewCall
from worker.chain import Chain
from worker.config import ChainConfig, ProviderConfig
from worker.cost import Pricing, Usage
from worker.grouping import Group
from worker.job import Answer, ChatRequest, Lane, new_id
from worker.ledger import Claim
from worker.providers.provider import Reply
from worker.resilience import gate as gate_module
from worker.resilience.cache import AnswerCache
from worker.resilience.gate import Gates
from worker.signals import Signal, Verdict
from worker.step import Station, Steps
from worker.walk import Outcome, Walk

FAILED = Signal.SERVER_ERROR
USAGE = Usage(1_000, 100)
CALL_USD = Decimal("0.0012")  # of USAGE at 1 and 2 USD per million

Act = Reply | Exception | Callable[[float], Awaitable[Reply]]


def answered(content: str = "hello") -> Reply:
    answer = Answer(content=content, finish_reason="stop", provider="p", model="m", usage=USAGE)
    return Reply(signal=Signal.ANSWERED, answer=answer, usage=USAGE, http_status=200)


def failed(signal: Signal = FAILED, **more: Any) -> Reply:
    return Reply(signal=signal, **more)


def lasting(seconds: float, reply: Reply) -> Callable[[float], Awaitable[Reply]]:
    """A provider that keeps its contract: the reply, or TIMED_OUT when that comes first."""

    async def play(timeout_s: float) -> Reply:
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.sleep(seconds)
        except TimeoutError:
            return Reply(signal=Signal.TIMED_OUT)
        return reply

    return play


async def hangs(timeout_s: float) -> Reply:
    await asyncio.Event().wait()
    raise AssertionError


@dataclass
class Scripted:
    """Gives its replies in order, the last one for ever; writes down what it was asked."""

    name: str
    replies: list[Act]
    diary: list[tuple[Any, ...]]
    model: str = "m"

    async def complete(self, request: ChatRequest, *, timeout_s: float, call_id: str) -> Reply:
        self.diary.append(("sent", self.name, call_id, step_module.time.monotonic(), timeout_s))
        step = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        if isinstance(step, Exception):
            raise step
        return step if isinstance(step, Reply) else await step(timeout_s)


class Overheard(Gates):
    """The real gates; what they are told is written down."""

    diary: list[tuple[Any, ...]]

    async def report(self, provider, admission, ending):
        self.diary.append(("told", provider, ending.verdict, ending))
        await super().report(provider, admission, ending)


@dataclass
class Stage:
    """A chain of scripted providers, in the order given, and a diary of what happened in it."""

    script: dict[str, list[Act]]
    gates: Overheard = field(default_factory=lambda: Overheard(None))
    config: dict[str, dict[str, Any]] = field(default_factory=dict)
    opening: Exception | Callable[[], Awaitable[None]] | None = None
    may_call: Callable[[Claim], bool] = lambda _: True
    rng: Callable[[], float] = lambda: 0.0
    diary: list[tuple[Any, ...]] = field(default_factory=list)
    route: dict[str, Any] = field(default_factory=dict)
    ours: bool = True

    def __post_init__(self) -> None:
        self.gates.diary = self.diary
        stations = {}
        for name, replies in self.script.items():
            config = ProviderConfig.model_validate(
                {"base_url": "http://127.0.0.1:1/v1", "model": "m", "price": {"input": "1", "output": "2"}} | self.config.get(name, {})
            )
            stations[name] = Station(provider=Scripted(name, list(replies), self.diary), config=config, pricing=Pricing.of(config))
        steps = Steps(self.gates, Group(self.open), self.may_call, rng=self.rng)
        self.cache = AnswerCache(FakeRedis())
        self.chain = Chain(stations, steps, self.cache)

    async def open(self, calls: list[NewCall]) -> list[bool]:
        if isinstance(self.opening, Exception):
            raise self.opening
        if self.opening is not None:
            await self.opening()
        self.diary += [("opened", call.provider, str(call.id)) for call in calls]
        return [self.ours] * len(calls)

    async def run(self, walk: Walk) -> Outcome:
        return await self.chain.answer(walk, ChainConfig.model_validate({"providers": tuple(self.script)} | self.route))

    def said(self, kind: str) -> list[str]:
        return [entry[1] for entry in self.diary if entry[0] == kind]

    def told(self, provider: str) -> list[Verdict]:
        return [entry[2] for entry in self.diary if entry[:2] == ("told", provider)]


def a_claim(**changes: Any) -> Claim:
    values: dict[str, Any] = {
        "job_id": new_id(), "worker_id": new_id(), "fence": 1, "attempts": 0, "chain": "default", "lane": Lane.BULK, "tenant": "default",
        "request": ChatRequest([{"role": "user", "content": "hi"}]), "remaining_s": 60.0, "asked": (),
        "opened_id": None, "opened_provider": None,
    }  # fmt: skip
    return Claim(**(values | changes))


def walked(stage: Stage, **claim: Any) -> tuple[Outcome, Walk]:
    async def main() -> tuple[Outcome, Walk]:
        walk = Walk(a_claim(**claim))
        return await stage.run(walk), walk

    return asyncio.run(main())


def reasons(walk: Walk) -> list[tuple[str, str]]:
    return [(reason.provider, reason.reason) for reason in walk.reasons]


class VirtualLoop(asyncio.SelectorEventLoop):
    """Never waits: where it would, its clock goes on. (A timer that was cancelled is no reason to wait for the next one.)"""

    now_s = 1_000.0

    def __init__(self) -> None:
        super().__init__()
        wait = self._selector.select

        def select(timeout: float | None = None) -> list[Any]:
            self.now_s += timeout or 0
            return wait(timeout and 0)

        self._selector.select = select

    def time(self) -> float:
        return self.now_s


@contextmanager
def virtual_time() -> Iterator[asyncio.Runner]:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner, pytest.MonkeyPatch.context() as patch:
        loop = runner.get_loop()
        clock = SimpleNamespace(monotonic=loop.time, monotonic_ns=lambda: int(loop.time() * 1e9))
        patch.setattr(step_module, "time", clock)
        patch.setattr(walk_module, "time", clock)
        patch.setattr(gate_module, "time", clock)
        yield runner


def virtually(stage: Stage, **claim: Any) -> tuple[Outcome, Walk, float]:
    """Outcome, walk, and how long it took."""
    with virtual_time() as runner:

        async def main() -> tuple[Outcome, Walk, float]:
            walk = Walk(a_claim(**claim))
            began_s = step_module.time.monotonic()
            return await stage.run(walk), walk, step_module.time.monotonic() - began_s

        return runner.run(main())
