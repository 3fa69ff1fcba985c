"""Three workers, a broker that loses and repeats, two leaders and an operator, in any order, on the real SQL.

After every step the ledger is what `model` says; and whatever happened, in the end every accepted job is answered or has ended.
"""

from contextlib import suppress
from dataclasses import dataclass, field
from uuid import UUID

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from model import Batch, Job, Model
from redis.exceptions import RedisError
from stage import FIRST, HELLO, Mailbox, a_call, a_worker, an_answer, ending

from worker.calls import NewCall, open_calls
from worker.dispatch import EPOCH_KEY, Dispatcher, withdraw
from worker.errors import UsageError
from worker.intervene import Cancelled, cancel, requeue
from worker.job import TERMINAL, TRANSITIONS, JobState, Lane, new_id
from worker.ledger import Claim, claim, settle
from worker.rescue import MAX_DEATHS, expire, release, rescue
from worker.signals import Signal
from worker.submit import Batch as OpenBatch
from worker.submit import NewJob, Row, add_rows, close_batch, open_batch, submit

SLOTS = 1  # of each worker, so that three jobs fill the window
JOBS = 12  # a few, so that much happens to each
WINDOW = "state = 'queued' AND dispatched_at IS NOT NULL"
SUCCEEDED = JobState.SUCCEEDED
WORKERS = st.integers(0, 2)
PICK = st.integers(0, 30)
RARELY = st.sampled_from([False, False, False, True])
ENDINGS = st.sampled_from([state for state in JobState if state is not JobState.RUNNING])
FIELDS = st.fixed_dictionaries({"new_walk": st.booleans(), "counted": st.booleans(), "run_after_s": st.sampled_from([0, 3600])})


@dataclass
class Held:
    claim: Claim
    calls: list[UUID]


@dataclass
class SimulatedWorker:
    id: UUID
    held: list[Held] = field(default_factory=list)
    fetched: list[tuple] = field(default_factory=list)  # messages that wait for slots


class Ledger(RuleBasedStateMachine):
    def __init__(self, theatre):
        super().__init__()
        self.run, self.rows, self.db, self.redis, self.leaders = theatre.run, theatre.rows, theatre.db, theatre.redis, theatre.leaders
        self.leader = self.leaders[0]
        self.mailbox, self.model = Mailbox(), Model()
        self.late, self.sent = [], []  # of the dead; settlements that were committed
        self.strays = []  # read by a heartbeat, not yet released
        self.seen = {}

    @initialize()
    def begin(self):
        for table in ("provider_calls", "jobs", "batches", "workers"):
            self.rows(f"DELETE FROM {table}")
        self.rows("UPDATE lanes SET paused = false")
        self.workers = [self._worker() for _ in range(3)]
        self.dispatchers = [self._dispatcher(leader) for leader in self.leaders]
        self.submit_batch(4, True, False)

    def _worker(self):
        worker = SimulatedWorker(self.run(a_worker(self.db, slots=SLOTS)))
        self.model.living.add(worker.id)
        return worker

    def _dispatcher(self, leader):
        return Dispatcher(leader, self.redis, self.mailbox.publish, pack_size=3, dispatch_ttl_s=30)

    def jobs(self):
        """To pick from: those that have not ended twice."""
        return [job_id for job_id, job in self.model.jobs.items() if job.state not in TERMINAL] + list(self.model.jobs)

    def _job(self, pick):
        jobs = self.jobs()
        return jobs[pick % len(jobs)]

    # In.

    @precondition(lambda self: len(self.model.jobs) < JOBS)
    @rule(interactive=st.booleans(), broker_down=RARELY)
    def submit_one(self, interactive, broker_down):
        self.mailbox.broken = broker_down
        lane = Lane.INTERACTIVE if interactive else Lane.BULK
        job_id = self.run(submit(self.db, self.mailbox.publish, NewJob(request=HELLO, lane=lane, deadline_s=3600))).job_id
        self.mailbox.broken = False
        self.model.jobs[job_id] = Job(lane.value)
        if interactive and not broker_down:
            self.model.published[job_id] = job_id

    @precondition(lambda self: len(self.model.jobs) < JOBS)
    @rule(size=st.integers(0, 4), closed=st.booleans(), unusable=RARELY)
    def submit_batch(self, size, closed, unusable):
        opened = self.run(open_batch(self.db, f"batch {len(self.model.batches)}", fingerprint=[], columns=None))
        self.model.batches[opened.id] = Batch()
        self._add(opened, size, unusable)
        if closed:
            self._close(opened)

    @rule(pick=PICK, size=st.integers(0, 2))
    def the_file_goes_on(self, pick, size):
        """Rows that were there come again, then new ones, then the end. A batch that was closed or cancelled takes none."""
        named, job_ids = self._named(pick, whole=True)
        opened = OpenBatch(named["batch_id"], "batch", resumed=True, complete=False)
        loading = self.model.batches[opened.id].loading
        with suppress(UsageError):
            self._add(opened, len(job_ids) + size, unusable=False)
            assert loading
        if not size:
            self._close(opened)

    def _add(self, opened, size, unusable):
        wanted = [Row(ordinal=n, custom_id=None, request=HELLO, chain="default") for n in range(1, size + 1)]
        if unusable:
            wanted.append(Row(ordinal=size + 1, custom_id=None, request=None, chain="default", problem="no body"))

        async def add():
            async for _ in add_rows(self.db, opened, wanted):
                pass

        self.run(add())
        known = self.model.batches[opened.id].job_ids
        for row in self.rows("SELECT id FROM jobs WHERE batch_id = %(id)s ORDER BY ordinal", id=opened.id)[len(known) :]:
            known.append(row.id)
            self.model.jobs[row.id] = Job("bulk")
        if unusable:
            last = self.model.jobs[known[-1]]
            last.state, last.sendable = JobState.FAILED, False

    def _close(self, opened):
        self.run(close_batch(self.db, opened))
        self.model.batches[opened.id].loading = False

    # To the workers.

    @rule(which=st.integers(0, 1), broker_down=RARELY, succession=RARELY)
    def dispatch(self, which, broker_down, succession):
        """By either of two leaders, of which one does not know yet that it was replaced."""
        if succession:
            self.dispatchers[which] = self._dispatcher(self.leaders[which])
        self.mailbox.broken = broker_down
        self._dispatch(which)
        self.mailbox.broken = False

    def _dispatch(self, which=0):
        before, suspects = len(self.mailbox.messages), self._suspects_in_flight()
        with suppress(RedisError):
            self.run(self.dispatchers[which].tick())
        published = self.mailbox.messages[before:]
        for lane, delivery_id, job_ids in published:
            assert not {lane.value} & self.model.paused
            self.model.published.update(dict.fromkeys(job_ids, delivery_id))
        assert self._suspects_in_flight() <= max(suspects, 1)
        return published

    def _suspects_in_flight(self):
        return self.rows(f"SELECT count(*) AS n FROM jobs WHERE deaths > 2 AND (state = 'running' OR {WINDOW})")[0].n

    @rule(what=st.sampled_from(["lose a message", "forget", "find old ones"]), pick=PICK)
    def the_broker(self, what, pick):
        if what == "find old ones":
            self._published_long_ago()
        elif what == "forget":
            self.mailbox.messages.clear()
            self.run(self.redis.delete(EPOCH_KEY))
        elif self.mailbox.messages:
            self.mailbox.messages.pop(pick % len(self.mailbox.messages))

    def _published_long_ago(self):
        """What lies with no worker is withdrawn, what waits for slots is not."""
        fetched = {message[1] for worker in self.workers for message in worker.fetched}
        before = {row.delivery_id for row in self.rows(f"SELECT delivery_id FROM jobs WHERE {WINDOW}")}
        self.rows(f"UPDATE jobs SET dispatched_at = dispatched_at - interval '1 minute' WHERE {WINDOW}")
        self.run(self.dispatchers[0].look_for_losses())
        assert {row.delivery_id for row in self.rows(f"SELECT delivery_id FROM jobs WHERE {WINDOW}")} == before & fetched

    def _message(self, pick, *, again=False):
        if not (self.mailbox.messages or self._dispatch()):
            return [(Lane.BULK, new_id(), [self._job(pick)])]  # an old one, for whatever job
        messages = self.mailbox.messages
        return [messages[pick % len(messages)]] if again else [messages.pop(pick % len(messages))]

    @rule(who=WORKERS, pick=PICK, draining=RARELY)
    def fetch(self, who, pick, draining):
        """A message waits for slots. When it comes to one that waited before, that one runs, or is withdrawn."""
        worker = self.workers[who]
        for _, delivery_id, job_ids in worker.fetched:
            if draining:
                self.run(withdraw(self.db, [delivery_id]))
            else:
                self._claim(job_ids, worker)
        worker.fetched = self._message(pick) if not worker.fetched else []
        waiting = [message[1] for message in worker.fetched]
        self.rows("UPDATE workers SET waiting = CAST(%(waiting)s AS uuid[]) WHERE id = %(id)s", waiting=waiting, id=worker.id)

    @rule(who=WORKERS, pick=PICK, twice=RARELY, reply_lost=RARELY)
    def deliver(self, who, pick, twice, reply_lost):
        for _, _, job_ids in self._message(pick, again=twice):
            self._claim(job_ids, self.workers[who], reply_lost=reply_lost)

    @rule(who=st.integers(0, 3), pick=PICK)
    def an_old_message_comes(self, who, pick):
        """For whatever job, ended or running or not due; also to a process that was declared dead."""
        dead = SimulatedWorker(next(iter(self.model.dead), new_id()))
        self._claim([self._job(pick)], [*self.workers, dead][who])

    def _claim(self, job_ids, worker, *, reply_lost=False):
        wanted = self.model.may_be_claimed(job_ids, worker.id)
        claims = self.run(claim(self.db, job_ids, worker.id, FIRST))
        assert {claimed.job_id for claimed in claims} == wanted
        self.model.claimed(claims)
        if not reply_lost:
            worker.held += [Held(claimed, [claimed.opened_id] if claimed.opened_id else []) for claimed in claims]

    # From the workers.

    @precondition(lambda self: self.late or any(worker.held for worker in self.workers))
    @rule(pick=PICK, twice=RARELY)
    def ask_another_provider(self, pick, twice):
        """Of a job that is held, or was: then nothing is opened. On the way it is booked that the one before has failed."""
        holders = [held for worker in self.workers for held in worker.held] + self.late
        held = holders[pick % len(holders)]
        failed = tuple(a_call(call_id, Signal.SERVER_ERROR) for call_id in held.calls)
        call = NewCall(id=new_id(), job_id=held.claim.job_id, fence=held.claim.fence, provider="second", model="m", ended=failed)
        for _ in range(1 + twice):
            (opened,) = self.run(open_calls(self.db, [call]))
            self.model.opened(call, opened)
        held.calls += [call.id] if opened else []

    @precondition(lambda self: any(worker.held for worker in self.workers))
    @rule(pick=PICK, states=st.lists(ENDINGS, min_size=1, max_size=4), fields=FIELDS, unsent=st.booleans(), reply_lost=st.booleans())
    def settle_some(self, pick, states, fields, unsent, reply_lost):
        """A group of one worker's, and in it one of somebody's who is late."""
        worker = [worker for worker in self.workers if worker.held][pick % sum(bool(worker.held) for worker in self.workers)]
        group = [self._settlement(worker.held.pop(), state, unsent, **fields) for state in states[: len(worker.held)]]
        if self.late and unsent:
            group.append(self._settlement(self.late.pop(), states[0], unsent))
        self._settle(group)
        if reply_lost:
            self._settle(group, again=True)
        self.sent.append(group)

    @precondition(lambda self: self.late)
    @rule(pick=PICK, state=ENDINGS, again=st.booleans())
    def settle_late(self, pick, state, again):
        """Refused when the job was rescued before; else its worker, though dead, was the first."""
        self._settle([self._settlement(self.late.pop(pick % len(self.late)), state)], again=again)

    @precondition(lambda self: self.sent)
    @rule(pick=PICK)
    def settle_again(self, pick):
        self._settle(self.sent[pick % len(self.sent)], again=True)

    def _settlement(self, held, state, unsent=False, **fields):
        """Of its calls the last one was never made (`unsent`), or has answered where the job succeeds; the others have failed."""
        sent, never = (held.calls[:-1], held.calls[-1:]) if unsent and state is not SUCCEEDED else (held.calls, [])
        answer = an_answer(f"of fence {held.claim.fence}") if state is SUCCEEDED else None
        booked = [a_call(call_id, Signal.SERVER_ERROR) for call_id in sent]
        if answer and booked:
            booked[-1] = a_call(sent[-1], answer=answer)
        return ending(held.claim, state, answer=answer, calls=tuple(booked), unsent=tuple(never), **fields)

    def _settle(self, group, *, again=False):
        held = self.run(settle(self.db, group, again=again))
        self.model.settled(group, held, again=again)

    @rule(who=WORKERS, slow=st.booleans())
    def beat(self, who, slow):
        """A heartbeat that finds strays gives them back, at once or after everything else had its turn."""
        worker = self.workers[who]
        held = {one.claim.job_id: one.claim.fence for one in worker.held}
        running = self.rows("SELECT id, fence FROM jobs WHERE state = 'running' AND worker_id = %(id)s", id=worker.id)
        # Of what it holds an earlier fence, as if that had been read before.
        self.strays.append((worker.id, {row.id: row.fence - (held.get(row.id) == row.fence) for row in running}))
        while self.strays and not slow:
            worker_id, fences = self.strays.pop()
            strays = self.model.strays(worker_id, fences)
            assert set(self.run(release(self.leader, worker_id, fences))) == strays
            self.model.released(strays)

    @rule(who=WORKERS, gracefully=st.booleans())
    def a_worker_ends(self, who, gracefully):
        """What it held was released, or may come late: it only slept, and is dead to the others. It comes back under another id."""
        worker = self.workers[who]
        if gracefully and worker.held:
            self._settle([self._settlement(held, JobState.QUEUED) for held in worker.held])
        elif not gracefully:
            self.late += worker.held
            self.model.dead.append(worker.id)
        state = "gone" if gracefully else "dead"
        self.rows("UPDATE workers SET state = %(state)s, waiting = '{}' WHERE id = %(id)s", state=state, id=worker.id)
        self.model.living.discard(worker.id)
        self.workers[who] = self._worker()

    @rule(pick=PICK, times=st.integers(2, MAX_DEATHS))
    def one_kills_its_workers(self, pick, times):
        for _ in range(times):
            self._claim([self._job(pick)], self.workers[0])
            self.a_worker_ends(0, gracefully=False)
            self.rescue(most=100)

    # The leader and the operator.

    @rule(most=st.integers(1, 9))
    def rescue(self, most):
        expected = self.model.to_be_rescued(most)
        assert sorted(self.run(rescue(self.leader, most=most))) == expected
        self.model.rescued(expected)

    @rule(what=st.sampled_from(["a deadline passes", "deadlines are noticed", "an hour passes"]), pick=PICK)
    def time(self, what, pick):
        job = self.model.jobs[self._job(pick)]
        if what == "an hour passes":
            self._an_hour_passes()
        elif what == "deadlines are noticed":
            assert set(self.run(expire(self.leader))) == self.model.expired()
        elif job.state not in TERMINAL:
            self.rows("UPDATE jobs SET deadline_at = now() WHERE id = %(id)s", id=self._job(pick))
            job.overdue = True

    def _an_hour_passes(self):
        self.rows("UPDATE jobs SET run_at = now() WHERE state = 'queued'")
        for job in self.model.jobs.values():
            job.parked = False

    @rule(lane=st.sampled_from([lane.value for lane in Lane]), paused=RARELY)
    def pause_or_resume(self, lane, paused):
        self.rows("UPDATE lanes SET paused = %(paused)s WHERE name = %(lane)s", paused=paused, lane=lane)
        (self.model.paused.add if paused else self.model.paused.discard)(lane)

    @rule(pick=PICK, whole=RARELY)
    def cancel(self, pick, whole):
        named, job_ids = self._named(pick, whole)
        if whole:
            self.model.batches[named["batch_id"]].loading = False
        assert self.run(cancel(self.db, **named)) == Cancelled(*self.model.cancelled(job_ids))

    @rule(pick=PICK, whole=st.booleans())
    def requeue(self, pick, whole):
        named, job_ids = self._named(pick, whole)
        assert self.run(requeue(self.db, **named)) == self.model.requeued(job_ids)

    def _named(self, pick, whole):
        if not whole:
            return {"job_ids": [self._job(pick)]}, [self._job(pick)]
        batch_id = list(self.model.batches)[pick % len(self.model.batches)]
        return {"batch_id": batch_id}, self.model.batches[batch_id].job_ids

    # What always holds.

    @invariant()
    def the_ledger_is_what_the_model_says(self):
        sql = """
        SELECT j.id, j.state, j.fence, j.walk_fence, j.attempts, j.deaths, j.worker_id, j.cancel_requested, r.fence AS answered,
            j.lane, CASE WHEN j.state = 'queued' AND j.dispatched_at IS NOT NULL THEN j.delivery_id END AS published
        FROM jobs j FULL JOIN results r ON r.job_id = j.id
        """
        stored = self.rows(sql)
        assert {row.id: tuple(row)[1:9] for row in stored} == {
            job_id: (j.state, j.fence, j.walk, j.attempts, j.deaths, j.holder, j.unwanted, j.fence if j.state is SUCCEEDED else None)
            for job_id, j in self.model.jobs.items()
        }
        assert {(row.id, row.published) for row in stored if row.published} <= set(self.model.published.items())
        assert sum(row.lane == "bulk" for row in stored if row.published) <= 3 * SLOTS

    @invariant()
    def the_books_are_complete_and_what_was_booked_stays(self):
        sql = "SELECT id, job_id, fence, provider, outcome, cost_usd, answer ->> 'content' AS said FROM provider_calls"
        assert {row.id: tuple(row)[1:] for row in self.rows(sql)} == {
            call_id: (line.job_id, line.fence, line.provider, line.outcome, line.cost_usd, line.answer)
            for call_id, line in self.model.books.items()
        }

    @invariant()
    def counters_are_counts(self):
        stored = self.rows("SELECT id, state, total, succeeded, failed, cancelled, expired, finished_at FROM batches")
        assert {row.id: tuple(row)[1:7] for row in stored} == {
            batch_id: self.model.counters(batch) for batch_id, batch in self.model.batches.items()
        }
        assert all((row.finished_at is not None) == (row.state == "finished") for row in stored)

    @invariant()
    def states_move_legally_and_fences_never_fall(self):
        now = {job_id: (job.state, job.fence) for job_id, job in self.model.jobs.items()}
        for job_id, (state, fence) in self.seen.items():
            after, raised = now[job_id]
            assert after is state or after in TRANSITIONS[state] or raised > fence
            assert raised >= fence
        self.seen = now

    def teardown(self):
        if hasattr(self, "dispatchers"):
            self._everything_ends()

    def _everything_ends(self):
        for lane in sorted(self.model.paused):
            self.pause_or_resume(lane, False)
        self._an_hour_passes()
        for who in range(3):
            self.a_worker_ends(who, gracefully=False)
        self.rescue(most=1_000)
        self.time("deadlines are noticed", 0)
        self.the_broker("forget", 0)
        while published := self._dispatch():
            for _, _, job_ids in published:
                self._claim(job_ids, self.workers[0])
                self._settle([self._settlement(held, SUCCEEDED) for held in self.workers[0].held])
                self.workers[0].held.clear()
        assert {job.state for job in self.model.jobs.values()} <= TERMINAL
        self.holds()

    def holds(self):
        self.the_ledger_is_what_the_model_says()
        self.the_books_are_complete_and_what_was_booked_stays()
        self.counters_are_counts()
        self.states_move_legally_and_fences_never_fall()
