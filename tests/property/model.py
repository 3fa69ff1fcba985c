"""The ledger as it should be: the rules of the protocol on plain values, without SQL, for one thing at a time."""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any
from uuid import UUID

from worker.calls import NewCall
from worker.job import TERMINAL, JobState
from worker.ledger import Claim, Settlement
from worker.rescue import MAX_DEATHS

QUEUED, RUNNING, FAILED, CANCELLED = JobState.QUEUED, JobState.RUNNING, JobState.FAILED, JobState.CANCELLED


@dataclass
class Job:
    lane: str
    state: JobState = QUEUED
    fence: int = 0
    walk: int = 1
    attempts: int = 0
    deaths: int = 0
    holder: UUID | None = None
    unwanted: bool = False
    parked: bool = False  # its `run_at` is far away
    overdue: bool = False
    sendable: bool = True


@dataclass
class Line:
    """A row of the books. An answer stays with its call only when its settle came too late."""

    job_id: UUID
    fence: int
    provider: str
    outcome: str | None = None
    cost_usd: Decimal | None = None
    answer: str | None = None


@dataclass
class Batch:
    job_ids: list[UUID] = field(default_factory=list)
    loading: bool = True


@dataclass
class Model:
    jobs: dict[UUID, Job] = field(default_factory=dict)
    batches: dict[UUID, Batch] = field(default_factory=dict)
    books: dict[UUID, Line] = field(default_factory=dict)
    published: dict[UUID, UUID] = field(default_factory=dict)  # queued jobs, by the message that carried them last
    living: set[UUID] = field(default_factory=set)
    dead: list[UUID] = field(default_factory=list)
    paused: set[str] = field(default_factory=set)

    def counters(self, batch: Batch) -> tuple[Any, ...]:
        """State, total, and how many ended in which way."""
        states = Counter(self.jobs[job_id].state for job_id in batch.job_ids)
        ended = [states[state] for state in (JobState.SUCCEEDED, FAILED, CANCELLED, JobState.EXPIRED)]
        state = "loading" if batch.loading else "finished" if sum(ended) == len(batch.job_ids) else "open"
        return (state, len(batch.job_ids), *ended)

    def may_be_claimed(self, job_ids: Iterable[UUID], worker_id: UUID) -> set[UUID]:
        def ready(job: Job) -> bool:
            return job.state is QUEUED and not (job.parked or job.overdue or job.lane in self.paused)

        return {job_id for job_id in job_ids if worker_id in self.living and ready(self.jobs[job_id])}

    def claimed(self, claims: Collection[Claim]) -> None:
        """Checks what each claim says, and notes it."""
        for claim in claims:
            job = self.jobs[claim.job_id]
            job.state, job.fence, job.holder = RUNNING, job.fence + 1, claim.worker_id
            self.published.pop(claim.job_id, None)
            asked = [line for line in self.books.values() if line.job_id == claim.job_id and line.fence >= job.walk and line.outcome]
            assert (claim.fence, claim.attempts) == (job.fence, job.attempts)
            assert Counter((asked.provider, asked.outcome, asked.answer and asked.answer.content) for asked in claim.asked) == Counter(
                (line.provider, line.outcome, line.answer) for line in asked
            )
            assert (claim.opened_id is not None) == (job.fence == job.walk)
            if claim.opened_id:
                self.books[claim.opened_id] = Line(claim.job_id, claim.fence, "first")

    def opened(self, call: NewCall, opened: bool) -> None:
        """Checks whether it was, and notes what ended before it."""
        job = self.jobs[call.job_id]
        assert opened == ((job.state, job.fence) == (RUNNING, call.fence))
        if opened:
            self.books[call.id] = Line(call.job_id, call.fence, call.provider)
        for ended in call.ended:
            line = self.books[ended.id]
            if line.outcome is None:
                line.outcome, line.cost_usd = ended.signal.value, ended.cost_usd

    def settled(self, settlements: Sequence[Settlement], held: Sequence[bool], *, again: bool) -> None:
        """Checks whose fence held, and notes what follows. The books take every call."""
        for settlement, ours in zip(settlements, held, strict=True):
            job = self.jobs[settlement.job_id]
            holds = job.state is RUNNING and job.fence == settlement.fence
            if holds:
                unwanted = settlement.state is QUEUED and job.unwanted
                self._leaves(settlement.job_id, CANCELLED if unwanted else settlement.state, settlement.run_after_s > 0)
                job.attempts += settlement.counted
                job.walk = job.fence + 1 if settlement.new_walk else job.walk
            else:
                holds = again and (job.fence, job.state) == (settlement.fence, settlement.state)
            assert ours == holds
            for call in settlement.calls:
                line = self.books[call.id]
                line.outcome, line.cost_usd = call.signal.value, call.cost_usd
                line.answer = call.answer.content if call.answer and not ours else None
            for call_id in settlement.unsent:
                self.books.pop(call_id, None)

    def to_be_rescued(self, most: int) -> list[UUID]:
        return sorted(job_id for job_id, job in self.jobs.items() if job.state is RUNNING and job.holder not in self.living)[:most]

    def rescued(self, job_ids: Iterable[UUID]) -> None:
        """Only those of workers that died, not of those that retired, are a death nearer to their end."""
        for job_id in job_ids:
            job = self.jobs[job_id]
            job.deaths += job.holder in self.dead
            given_up = job.deaths >= MAX_DEATHS
            self._leaves(job_id, CANCELLED if job.unwanted else FAILED if given_up else QUEUED)
            self._orphan(job_id)

    def released(self, job_ids: Iterable[UUID]) -> None:
        for job_id in job_ids:
            self._leaves(job_id, CANCELLED if self.jobs[job_id].unwanted else QUEUED)
            self._orphan(job_id)

    def strays(self, worker_id: UUID, fences: dict[UUID, int]) -> set[UUID]:
        def stray(job: Job, fence: int) -> bool:
            return (job.state, job.holder, job.fence) == (RUNNING, worker_id, fence)

        return {job_id for job_id, fence in fences.items() if stray(self.jobs[job_id], fence)}

    def cancelled(self, job_ids: Iterable[UUID]) -> tuple[int, int]:
        """How many ended at once, and how many were flagged."""
        queued = [job_id for job_id in job_ids if self.jobs[job_id].state is QUEUED]
        running = [job_id for job_id in job_ids if self.jobs[job_id].state is RUNNING and not self.jobs[job_id].unwanted]
        for job_id in queued:
            self._leaves(job_id, CANCELLED)
        for job_id in queued + running:
            self.jobs[job_id].unwanted = True
        return len(queued), len(running)

    def expired(self) -> set[UUID]:
        late = {job_id for job_id, job in self.jobs.items() if job.state is QUEUED and job.overdue}
        for job_id in late:
            self._leaves(job_id, JobState.EXPIRED)
        return late

    def requeued(self, job_ids: Iterable[UUID]) -> int:
        ended = [self.jobs[i] for i in job_ids if self.jobs[i].state in TERMINAL - {JobState.SUCCEEDED} and self.jobs[i].sendable]
        for job in ended:
            job.state, job.walk, job.attempts, job.deaths = QUEUED, job.fence + 1, 0, 0
            job.unwanted = job.parked = job.overdue = False
        return len(ended)

    def _leaves(self, job_id: UUID, state: JobState, parked: bool = False) -> None:
        job = self.jobs[job_id]
        job.state, job.holder, job.parked = state, None, parked
        self.published.pop(job_id, None)

    def _orphan(self, job_id: UUID) -> None:
        for line in self.books.values():
            if line.job_id == job_id and line.outcome is None:
                line.outcome = "orphaned"
