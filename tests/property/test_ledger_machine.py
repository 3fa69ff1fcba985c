"""Three workers, a broker that loses and repeats, a leader and an operator, in any order, on the real SQL.

After every step the ledger is consistent; and whatever happened, in the end every accepted job is answered or ended.
"""

import asyncio
from dataclasses import dataclass, field
from uuid import UUID

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from stage import FIRST, Mailbox, a_batch, a_call, a_job, a_worker, answered, counters_are_exact, ending, rows

from worker import database
from worker.dispatch import EPOCH_KEY, Dispatcher
from worker.intervene import cancel, requeue
from worker.job import TERMINAL, TRANSITIONS, JobState
from worker.ledger import Claim, claim, settle
from worker.rescue import DEATH_COSTS, expire, release, rescue
from worker.settlement import MAX_ATTEMPTS
from worker.signals import Signal
from worker.submit import close_batch
from worker.wiring import redis_client

WORKERS = st.integers(0, 2)
PICK = st.integers(0, 30)
ENDINGS = st.sampled_from([state for state in JobState if state is not JobState.RUNNING])


@dataclass
class SimulatedWorker:
    id: UUID
    held: list[Claim] = field(default_factory=list)


class Ledger(RuleBasedStateMachine):
    def __init__(self, database_url, redis_url):
        super().__init__()
        self.runner = asyncio.Runner()
        self.db = database.engine(database_url)
        self.redis = redis_client(redis_url)
        self.mailbox = Mailbox()
        self.batches, self.open_batches = [], []
        self.late, self.sent = [], []  # claims of the dead, and settlements that were committed
        self.seen = {}

    def run(self, awaitable):
        async def within():
            return await awaitable

        return self.runner.run(within())

    @initialize()
    def begin(self):
        for table in ("results", "provider_calls", "jobs", "batches", "workers"):
            self.run(rows(self.db, f"DELETE FROM {table}"))
        self.workers = [SimulatedWorker(self.run(a_worker(self.db, slots=4))) for _ in range(3)]
        self.leader = self.run(self.db.connect().__aenter__())
        self.dispatcher = self._dispatcher()

    def _dispatcher(self):
        return Dispatcher(self.leader, self.redis, self.mailbox.publish, pack_size=3, dispatch_ttl_s=30)

    @rule(size=st.integers(1, 5), closed=st.booleans())
    def submit_batch(self, size, closed):
        opened, _ = self.run(a_batch(self.db, size, f"batch {len(self.batches)}", closed=closed))
        self.batches.append(opened)
        if not closed:
            self.open_batches.append(opened)

    @rule()
    def submit_one(self):
        self.run(a_job(self.db))

    @precondition(lambda self: self.open_batches)
    @rule()
    def close(self):
        self.run(close_batch(self.db, self.open_batches.pop()))

    @rule()
    def dispatch(self):
        self.run(self.dispatcher.tick())

    @rule()
    def another_leads(self):
        self.dispatcher = self._dispatcher()

    @precondition(lambda self: self.mailbox.messages)
    @rule(pick=PICK)
    def lose_a_message(self, pick):
        self.mailbox.messages.pop(pick % len(self.mailbox.messages))

    @rule()
    def redis_forgets(self):
        self.mailbox.messages.clear()
        self.run(self.redis.delete(EPOCH_KEY))

    @rule()
    def published_long_ago(self):
        self.run(rows(self.db, "UPDATE jobs SET dispatched_at = dispatched_at - interval '1 minute' WHERE state = 'queued'"))
        self.run(self.dispatcher.look_for_losses())

    @precondition(lambda self: self.mailbox.messages)
    @rule(who=WORKERS, pick=PICK, twice=st.booleans(), reply_lost=st.booleans())
    def deliver(self, who, pick, twice, reply_lost):
        position = pick % len(self.mailbox.messages)
        _, _, ids = self.mailbox.messages[position]
        if not twice:
            del self.mailbox.messages[position]
        claims = self.run(claim(self.db, ids, self.workers[who].id, FIRST))
        if not reply_lost:
            self.workers[who].held += claims

    @rule(who=WORKERS)
    def beat(self, who):
        """A heartbeat that finds strays gives them back."""
        worker = self.workers[who]
        sql = "SELECT id, fence FROM jobs WHERE state = 'running' AND worker_id = :id"
        held = {(claimed.job_id, claimed.fence) for claimed in worker.held}
        strays = {row.id: row.fence for row in self.run(rows(self.db, sql, id=worker.id)) if tuple(row) not in held}
        assert set(self.run(release(self.leader, worker.id, strays))) == set(strays)

    @precondition(lambda self: any(worker.held for worker in self.workers))
    @rule(pick=PICK, states=st.lists(ENDINGS, min_size=1, max_size=4), new_walk=st.booleans(), counted=st.booleans())
    def settle_some(self, pick, states, new_walk, counted):
        worker = [worker for worker in self.workers if worker.held][pick % sum(bool(worker.held) for worker in self.workers)]
        states = states[: len(worker.held)]
        group = [self._settlement(worker.held.pop(), state, new_walk=new_walk, counted=counted) for state in states]
        assert all(self.run(settle(self.db, group)))
        self.sent.append(group)

    def _settlement(self, claimed, state, **fields):
        if state is JobState.SUCCEEDED:
            return answered(claimed)
        unsent = (claimed.opened_id,) if claimed.opened_id and fields["counted"] else ()
        booked = (a_call(claimed.opened_id, Signal.SERVER_ERROR),) if claimed.opened_id and not unsent else ()
        return ending(claimed, state, calls=booked, unsent=unsent, **fields)

    @precondition(lambda self: self.late)
    @rule(pick=PICK, state=ENDINGS, again=st.booleans())
    def settle_late(self, pick, state, again):
        """Refused when the job was rescued before; else its worker, though dead, was the first."""
        claimed = self.late.pop(pick % len(self.late))
        settlement = self._settlement(claimed, state, new_walk=False, counted=False)
        (stored,) = self.run(rows(self.db, "SELECT state, fence FROM jobs WHERE id = :id", id=claimed.job_id))
        held = self.run(settle(self.db, [settlement], again=again))
        if (stored.state, stored.fence) == ("running", claimed.fence):
            assert held == [True]
        elif stored.fence > claimed.fence or state is JobState.SUCCEEDED:
            assert held == [False]

    @precondition(lambda self: self.sent)
    @rule(pick=PICK)
    def settle_again(self, pick):
        self.run(settle(self.db, self.sent[pick % len(self.sent)], again=True))

    @rule(who=WORKERS)
    def crash(self, who):
        worker = self.workers[who]
        self.late += worker.held
        self.run(rows(self.db, "UPDATE workers SET state = 'dead' WHERE id = :id", id=worker.id))
        self.workers[who] = SimulatedWorker(self.run(a_worker(self.db, slots=4)))

    @rule(most=st.integers(1, 9))
    def rescue(self, most):
        self.run(rescue(self.leader, most=most))

    @precondition(lambda self: self.batches)
    @rule(pick=PICK)
    def cancel_batch(self, pick):
        self.run(cancel(self.db, batch_id=self.batches[pick % len(self.batches)].id))

    @precondition(lambda self: self.seen)
    @rule(pick=PICK, what=st.sampled_from(["cancel", "requeue", "expire"]))
    def meddle_with_one(self, pick, what):
        job_id = sorted(self.seen)[pick % len(self.seen)]
        if what == "cancel":
            self.run(cancel(self.db, job_ids=[job_id]))
        elif what == "requeue":
            self.run(requeue(self.db, job_ids=[job_id]))
        else:
            self.run(rows(self.db, "UPDATE jobs SET deadline_at = now() WHERE id = :id AND state = 'queued'", id=job_id))
            self.run(expire(self.leader))

    @precondition(lambda self: self.batches)
    @rule(pick=PICK)
    def requeue_batch(self, pick):
        self.run(requeue(self.db, batch_id=self.batches[pick % len(self.batches)].id))

    @invariant()
    def there_is_one_result_for_each_success_and_none_otherwise(self):
        sql = """
        SELECT j.id FROM jobs j FULL JOIN results r ON r.job_id = j.id
        WHERE (coalesce(j.state, '') = 'succeeded') <> (r.job_id IS NOT NULL) OR r.fence <> j.fence
        """
        assert self.run(rows(self.db, sql)) == []

    @invariant()
    def counters_are_counts(self):
        self.run(counters_are_exact(self.db))

    @invariant()
    def fences_grow_and_states_move_legally(self):
        now = {row.id: row for row in self.run(rows(self.db, "SELECT id, state, fence, attempts FROM jobs"))}
        for job_id, before in self.seen.items():
            after = now[job_id]
            if after.state != before.state:
                assert JobState(after.state) in TRANSITIONS[JobState(before.state)]
            assert after.fence - before.fence == (before.state == "queued" and after.state == "running")
            assert after.attempts < MAX_ATTEMPTS + DEATH_COSTS
        self.seen = now

    @invariant()
    def a_call_is_open_only_while_its_attempt_runs(self):
        sql = """
        SELECT p.id FROM provider_calls p JOIN jobs j ON j.id = p.job_id
        WHERE p.outcome IS NULL AND (j.state <> 'running' OR j.fence <> p.fence)
        """
        assert self.run(rows(self.db, sql)) == []

    @invariant()
    def nobody_is_asked_for_more_than_the_window(self):
        (window,) = self.run(rows(self.db, "SELECT count(*) AS n FROM jobs WHERE state = 'queued' AND dispatched_at IS NOT NULL"))
        assert window.n <= 3 * 4

    def teardown(self):
        try:
            if hasattr(self, "workers"):
                self._everything_ends()
        finally:
            self.run(self.leader.close())
            self.run(self.redis.aclose())
            self.run(self.db.dispose())
            self.runner.close()

    def _everything_ends(self):
        while self.open_batches:
            self.close()
        for who in range(3):
            self.crash(who)
        while self.run(rescue(self.leader)):
            pass
        self.redis_forgets()
        while self.run(self.dispatcher.tick()):
            for _, _, ids in self.mailbox.messages:
                claims = self.run(claim(self.db, ids, self.workers[0].id, FIRST))
                assert all(self.run(settle(self.db, [answered(claimed) for claimed in claims])))
            self.mailbox.messages.clear()
        left = {row.state for row in self.run(rows(self.db, "SELECT DISTINCT state FROM jobs"))}
        assert left <= {state.value for state in TERMINAL}
        self.there_is_one_result_for_each_success_and_none_otherwise()
        self.counters_are_counts()


def test_the_ledger_stays_consistent_whatever_happens_in_whatever_order(database_url, redis_url):
    run_state_machine_as_test(
        lambda: Ledger(database_url, redis_url),
        settings=settings(
            max_examples=25, stateful_step_count=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
        ),
    )
