"""Short plays of the machine that together come past every guard of the ledger. What always holds is looked at after each step."""

from worker.job import JobState

QUEUED, FAILED, SUCCEEDED = JobState.QUEUED, JobState.FAILED, JobState.SUCCEEDED


def _dispatch(m, broker_down=False):
    m.dispatch(0, broker_down, False)


def _claim(m, job_id, who=0):
    m.an_old_message_comes(who, m.jobs().index(job_id))


def _settle(m, state=QUEUED, *, who=0, unsent=False, reply_lost=False, **fields):
    """All that the worker holds."""
    pick = [worker for worker in m.workers if worker.held].index(m.workers[who])
    every = [state] * len(m.workers[who].held)
    m.settle_some(pick, every, {"new_walk": False, "counted": False, "run_after_s": 0} | fields, unsent, reply_lost)


def _dies(m, who=0):
    m.a_worker_ends(who, False)


def _cancel(m, job_id):
    m.cancel(m.jobs().index(job_id), False)


def _requeue(m, job_id):
    m.requeue(m.jobs().index(job_id), False)


def publishing(m):
    _dispatch(m)
    yield
    _dispatch(m)  # the window is full
    yield
    m.fetch(0, 0, False)
    yield
    m.the_broker("find old ones", 0)
    yield
    m.fetch(0, 0, True)
    yield
    _dispatch(m)
    yield
    m.the_broker("find old ones", 0)
    yield
    _dispatch(m, broker_down=True)
    yield
    m.submit_one(True, True)
    yield
    m.submit_one(True, False)
    yield


def a_pause(m):
    first, *_ = m.model.jobs
    m.pause_or_resume("bulk", True)
    _dispatch(m)
    yield
    _claim(m, first)
    yield


def an_attempt_after_the_other(m):
    _dispatch(m)
    m.deliver(0, 0, False, False)
    yield
    job_id = m.workers[0].held[0].claim.job_id
    _claim(m, job_id)  # it runs already
    m.ask_another_provider(0, True)
    yield
    _settle(m, counted=True, run_after_s=3600, unsent=True, reply_lost=True)
    yield
    _claim(m, job_id)  # before its time
    yield
    m.time("an hour passes", 0)
    _claim(m, job_id)
    m.ask_another_provider(0, False)
    yield
    _settle(m, new_walk=True)
    yield
    for _ in range(2):
        _claim(m, job_id)
        yield
        _settle(m)
        yield
    _claim(m, job_id)
    _settle(m, SUCCEEDED, reply_lost=True)
    yield


def a_success_and_its_repetition(m):
    job_id = next(iter(m.model.jobs))
    _claim(m, job_id)
    _settle(m, SUCCEEDED, reply_lost=True)
    yield
    _requeue(m, job_id)
    yield
    m.settle_again(0)
    yield


def late_settles(m):
    first, second, *_ = m.model.jobs
    _claim(m, first)
    _claim(m, second, who=1)
    _dies(m, who=1)
    yield
    _claim(m, first, who=3)  # to the one that was declared dead
    _claim(m, list(m.model.jobs)[2], who=3)
    yield
    m.rescue(9)  # but not of the first
    yield
    m.ask_another_provider(1, False)
    yield
    m.settle_late(0, SUCCEEDED, True)
    yield
    _claim(m, second, who=1)  # finds the answer
    yield
    _dies(m, who=1)
    m.rescue(9)  # what was booked stays
    yield
    _claim(m, second, who=1)
    yield
    m.ask_another_provider(2, False)  # under an old fence
    yield
    m.settle_late(0, FAILED, False)
    yield
    _cancel(m, second)
    _dies(m, who=1)
    m.rescue(9)
    yield


def strays(m):
    _dispatch(m)
    m.deliver(0, 0, False, True)
    yield
    _cancel(m, next(iter(m.model.jobs)))
    yield
    m.beat(0, True)
    m.beat(0, False)
    yield
    _claim(m, list(m.model.jobs)[1])
    m.beat(0, False)
    yield


def a_worker_leaves_strays_behind(m):
    _dispatch(m)
    m.deliver(0, 0, False, True)
    m.a_worker_ends(0, True)
    yield
    m.rescue(9)
    yield


def deadlines(m):
    running, queued, *_ = m.model.jobs
    _claim(m, running)
    for job_id in (running, queued):
        m.time("a deadline passes", m.jobs().index(job_id))
    yield
    _claim(m, queued)
    yield
    m.time("deadlines are noticed", 0)
    yield
    _requeue(m, queued)
    yield
    m.time("deadlines are noticed", 0)
    yield


def cancels_and_requeues(m):
    failed, running, succeeded, _ = m.model.jobs
    _claim(m, failed)
    _settle(m, FAILED, counted=True, reply_lost=True)
    _claim(m, succeeded)
    _settle(m, SUCCEEDED)
    _claim(m, running)
    yield
    m.cancel(0, True)
    yield
    _settle(m)
    yield
    m.requeue(0, True)
    yield
    _claim(m, failed)
    yield


def files(m):
    m.submit_batch(1, False, True)
    yield
    m.submit_batch(1, False, False)
    job_id = list(m.model.jobs)[-1]
    _claim(m, job_id)
    _settle(m, FAILED)  # the last for now
    yield
    for _ in range(2):
        m.the_file_goes_on(2, 0)
        yield
    m.the_file_goes_on(0, 1)  # into a closed batch
    yield
    m.submit_batch(0, False, True)
    m.cancel(3, True)
    yield
    m.requeue(3, True)  # of a row that never could be sent
    yield


def poison(m):
    for times, job_id in zip((4, 3, 3), list(m.model.jobs), strict=False):
        m.one_kills_its_workers(m.jobs().index(job_id), times)
        yield
    _dispatch(m)  # one of the suspects
    yield
    _requeue(m, next(iter(m.model.jobs)))
    yield


TOUR = (
    publishing,
    a_pause,
    an_attempt_after_the_other,
    a_success_and_its_repetition,
    late_settles,
    strays,
    a_worker_leaves_strays_behind,
    deadlines,
    cancels_and_requeues,
    files,
    poison,
)
