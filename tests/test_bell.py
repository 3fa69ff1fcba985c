"""How the queues are rung: a Redis that fails is left alone for a while, by all but one."""

import pytest
import redis

from worker.dispatch import queue_name
from worker.job import Lane, new_id
from worker.transport import PROBE_S, QUIET_S, Bell


class Faulty:
    """A Redis that does as it is told. `meanwhile` is run while somebody waits for it."""

    def __init__(self):
        self.well, self.asked, self.meanwhile = True, 0, lambda: None

    def lpush(self, _queue, _message):
        self.asked += 1
        self.meanwhile()
        if not self.well:
            raise redis.TimeoutError("silent")


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("worker.transport.time.monotonic", lambda: now[0])
    return now


@pytest.fixture
def server():
    return Faulty()


@pytest.fixture
def bell(server):
    made = Bell("redis://127.0.0.1:1/0")
    made._redis = server
    return made


def rung(bell):
    try:
        bell.publish(Lane.INTERACTIVE, new_id(), [new_id()])
    except redis.RedisError:
        return False
    return True


def test_a_message_is_on_the_queue_of_its_lane(redis_url):
    bell = Bell(redis_url)
    bell.publish(Lane.BULK, new_id(), [new_id()])
    with redis.Redis.from_url(redis_url) as client:
        assert client.llen(queue_name(Lane.BULK)) == 1
    bell.close()


def test_a_redis_that_is_well_is_rung_every_time(bell, server, clock):
    assert [rung(bell) for _ in range(3)] == [True] * 3
    assert server.asked == 3


def test_a_redis_that_failed_is_left_alone_for_a_while(bell, server, clock):
    server.well = False
    assert not rung(bell)
    server.well = True
    clock[0] += QUIET_S - 0.01
    assert not rung(bell)
    assert server.asked == 1
    clock[0] += 0.02
    assert [rung(bell), rung(bell)] == [True, True]


def test_of_those_who_come_after_it_one_finds_out_for_all(bell, server, clock):
    server.well = False
    rung(bell)
    clock[0] += QUIET_S
    others = []

    def come():
        server.meanwhile = lambda: None
        clock[0] += PROBE_S - 0.01
        others.append(rung(bell))

    server.meanwhile = come
    assert not rung(bell)
    assert others == [False]
    assert server.asked == 2, "the other one did not wait for it as well"
    assert not rung(bell)
    assert server.asked == 2
    clock[0] += QUIET_S
    server.well = True
    assert rung(bell)

    def come_again():
        server.meanwhile = lambda: None
        others.append(rung(bell))

    server.meanwhile = come_again
    assert rung(bell)
    assert others == [False, True], "once it has answered all ring again"


def test_one_that_never_comes_back_holds_up_nobody_for_ever(bell, server, clock):
    server.well = False
    rung(bell)
    clock[0] += QUIET_S
    server.meanwhile = lambda: clock.__setitem__(0, clock[0] + PROBE_S)
    rung(bell)
    server.meanwhile, server.well = (lambda: None), True
    clock[0] += QUIET_S
    assert rung(bell)


def test_a_url_that_is_none_of_a_redis_is_told():
    with pytest.raises(ValueError, match="scheme"):
        Bell("postgresql://x")
