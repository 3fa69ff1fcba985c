"""A full outage of all providers, and a crowd of jobs that is attempted again as settlements say until it is over."""

import asyncio
import random
from dataclasses import dataclass, field, replace

from chain_story import now_s
from scripted import Overheard, Stage, a_claim, answered, failed

from worker.config import ChainConfig
from worker.job import JobState, Lane
from worker.ledger import Asked
from worker.settlement import decide
from worker.signals import Signal
from worker.walk import Walk


@dataclass
class Outage:
    """Every provider says `signal` after `seconds`, until `ends_s`; then all of them answer. `slots`: jobs in flight at once."""

    jobs: int
    slots: int
    signal: Signal
    seconds: float
    ends_s: float = 1800.0
    providers: tuple[str, ...] = ("a", "b", "c")
    sent_s: list[float] = field(default_factory=list)
    attempts: int = 0
    states: list[JobState] = field(default_factory=list)
    last_s: float = 0

    async def play(self) -> "Outage":
        began_s, rng = now_s(), random.Random(1).random

        async def act(timeout_s: float):
            at_s = now_s() - began_s
            self.sent_s.append(at_s)
            await asyncio.sleep(min(self.seconds, timeout_s))
            if at_s >= self.ends_s:
                return answered()
            return failed(Signal.TIMED_OUT) if self.seconds > timeout_s else failed(self.signal)

        gates = Overheard(None, rng=rng)
        config = {name: {"base_url": f"http://{name}.test/v1", "timeout_s": 10} for name in self.providers}
        stage = Stage({name: [act] for name in self.providers}, gates=gates, config=config, rng=rng)
        stage.chain._steps.reach = type(stage.chain._steps.reach)(now_s)
        slots, route = asyncio.Semaphore(self.slots), ChainConfig(providers=self.providers)
        self.states = await asyncio.gather(*(self._job(stage, route, slots, rng) for _ in range(self.jobs)))
        self.last_s = now_s() - began_s
        return self

    async def _job(self, stage: Stage, route: ChainConfig, slots: asyncio.Semaphore, rng) -> JobState:
        deadline_s, attempts, asked, claim = now_s() + 86_400, 0, (), a_claim(lane=Lane.BULK)
        while True:
            async with slots:
                walk = Walk(replace(claim, attempts=attempts, asked=asked, remaining_s=deadline_s - now_s()))
                settlement = decide(await stage.chain.answer(walk, route), walk, rng=rng)
            self.attempts += 1
            if settlement.state is not JobState.QUEUED:
                return settlement.state
            attempts += settlement.counted
            calls = tuple(Asked(provider=call.provider, outcome=call.signal.value, answer=None) for call in walk.calls)
            asked = () if settlement.new_walk else (*asked, *calls)
            await asyncio.sleep(settlement.run_after_s)
