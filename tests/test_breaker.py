import asyncio
import json
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from worker.errors import Unreachable
from worker.resilience import breaker, breaker_store
from worker.resilience.breaker import Breakers, BreakerState, Health
from worker.resilience.breaker_store import key
from worker.resilience.circuit import RULES, Circuit, Look, Report
from worker.signals import Verdict

S, F, X = Verdict.SUCCESS, Verdict.FAILURE, Verdict.NEUTRAL
LEASE_S = 30
TRIP = RULES.fails_in_a_row


@pytest.fixture
def patient(monkeypatch):
    """A busy machine is no reason for local mode in a test that is not about it."""
    monkeypatch.setattr(breaker_store, "ROUND_TRIP_S", 20)


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(breaker, "CHECK_AGAIN_S", 0.01)


@asynccontextmanager
async def connected(url, number=1, **options):
    """Redis, and so many processes' breakers on it. The clients wait for ever: the breakers' own limit is tested."""
    clients = [Redis.from_url(url, socket_timeout=None, socket_connect_timeout=None) for _ in range(number + 1)]
    fleet = [Breakers(client, **options) for client in clients[1:]]
    try:
        yield clients[0], *fleet
    finally:
        for breakers in fleet:
            await breakers.aclose()
        for client in clients:
            await client.aclose()


async def call(breakers, verdict, provider="p", **signals):
    admission = await breakers.admit(provider, lease_s=LEASE_S)
    await breakers.report(provider, admission, verdict, **signals)
    return admission


async def trip(breakers, provider="p"):
    for _ in range(TRIP):
        await call(breakers, F, provider, reason="server_error")


async def scripts_run(redis):
    return (await redis.info("commandstats")).get("cmdstat_evalsha", {"calls": 0})["calls"]


@asynccontextmanager
async def relay(url):
    """A way to Redis that can be `cut` (hangs up), `stuck` (says nothing) or `clear`; counts who came."""
    target, state = urlsplit(url), {"is": "clear", "came": 0}
    open_now, serving = set(), set()

    async def pump(reader, writer):
        while data := await reader.read(65536):
            if state["is"] == "clear":
                writer.write(data)
        writer.close()

    async def serve(reader, writer):
        state["came"] += 1
        serving.add(asyncio.current_task())
        open_now.add(writer)
        if state["is"] == "cut":
            writer.close()
            return
        far_reader, far_writer = await asyncio.open_connection(target.hostname, target.port)
        open_now.add(far_writer)
        await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer), return_exceptions=True)

    def become(word):
        state["is"] = word
        if word == "cut":
            for writer in open_now:
                writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    netloc = f"{target.netloc.rpartition('@')[0]}@127.0.0.1:{port}".lstrip("@")
    try:
        yield target._replace(netloc=netloc).geturl(), become, state
    finally:
        server.close()
        become("cut")
        if serving:
            await asyncio.wait(serving)


def test_a_trip_seen_by_one_process_is_obeyed_by_the_next_admit_of_another(redis_url, patient):
    async def story():
        async with connected(redis_url, 2) as (_, here, there):
            assert (await there.admit("p", lease_s=LEASE_S)).allowed
            await trip(here)
            denied = await there.admit("p", lease_s=LEASE_S)
            assert (denied.allowed, denied.state) == (False, BreakerState.OPEN)
            assert 0 < denied.retry_after_s <= 12
            assert not there.seems_closed("p")
            (status,) = await there.status(["p"])
            assert (status.health, status.opened_times, status.local) == (Health.FAILED, 1, False)
            assert status.reason == f"{TRIP} failures in a row: server_error"

    asyncio.run(story())


def test_of_64_racers_in_four_processes_exactly_one_gets_the_probe(redis_url, patient):
    async def story():
        async with connected(redis_url, 5) as (redis, first, *fleet):
            await trip(first)
            await redis.hset(key("p"), "until", 1)
            admissions = await asyncio.gather(*(fleet[n % 4].admit("p", lease_s=LEASE_S) for n in range(64)))
            allowed = [a for a in admissions if a.allowed]
            assert len(allowed) == 1
            assert allowed[0].probe
            assert allowed[0].lease
            assert {a.state for a in admissions} == {BreakerState.HALF_OPEN}
            assert all(0 < a.retry_after_s <= 1 for a in admissions if not a.allowed)

    asyncio.run(story())


def test_the_probe_of_a_dead_worker_is_free_after_its_lease(redis_url, patient):
    async def story():
        async with connected(redis_url, 3) as (redis, dead, there, late):
            await trip(dead)
            await redis.hset(key("p"), "until", 1)
            lost = await late.admit("p", lease_s=LEASE_S)
            assert lost.probe
            assert not (await there.admit("p", lease_s=LEASE_S)).allowed
            await redis.hset(key("p"), "lease_until", 1)
            async with connected(redis_url) as (_, fresh):
                taken = await fresh.admit("p", lease_s=LEASE_S)
                assert taken.probe
                await late.report("p", lost, F)  # it was alive after all, but no longer the holder
                assert (await fresh.status(["p"]))[0].state is BreakerState.HALF_OPEN
                await fresh.report("p", taken, X)
                assert (await call(fresh, S)).probe

    asyncio.run(story())


def test_two_good_probes_close_and_then_the_ramp_lets_in_a_few(redis_url, patient):
    async def story():
        draw = 0.5
        async with connected(redis_url, rng=lambda: draw) as (redis, here):
            await trip(here)
            await redis.hset(key("p"), "until", 1)
            async with connected(redis_url, rng=lambda: draw) as (_, fresh):
                assert (await call(fresh, S)).probe
                assert (await call(fresh, S)).probe
                turned_away = await fresh.admit("p", lease_s=LEASE_S)
                assert (turned_away.allowed, turned_away.state) == (False, BreakerState.CLOSED)
                assert turned_away.retry_after_s == 0.25
                draw = 0.05
                assert (await fresh.admit("p", lease_s=LEASE_S)).allowed
                (status,) = await fresh.status(["p"])
                assert (status.state, status.health) == (BreakerState.CLOSED, Health.DEGRADED)
                draw = 0.99
                await redis.hset(key("p"), "closed_at", 1)
                assert (await fresh.admit("p", lease_s=LEASE_S)).allowed
                assert (await fresh.status(["p"]))[0].health is Health.HEALTHY

    asyncio.run(story())


def test_what_goes_out_together_is_one_round_trip_and_a_denial_none(redis_url, patient):
    async def story():
        async with connected(redis_url) as (redis, here):
            await call(here, S)
            before = await scripts_run(redis)
            admissions = await asyncio.gather(*(here.admit("p", lease_s=LEASE_S) for _ in range(50)))
            assert await scripts_run(redis) == before + 1
            await asyncio.gather(*(here.report("p", a, S) for a in admissions))
            assert await scripts_run(redis) == before + 2
            assert (await here.status(["p"]))[0].successes == 51
            await call(here, F)
            assert await scripts_run(redis) == before + 4
            await trip(here)
            before = await scripts_run(redis)
            assert not (await here.admit("p", lease_s=LEASE_S)).allowed
            assert await scripts_run(redis) == before

    asyncio.run(story())


def test_a_denial_is_believed_for_a_second_only(redis_url, patient, monkeypatch):
    async def story():
        async with connected(redis_url, 2) as (_, here, there):
            await trip(here)
            assert not (await here.admit("p", lease_s=LEASE_S)).allowed
            await there.force("p", "reset")
            assert not (await here.admit("p", lease_s=LEASE_S)).allowed
            monkeypatch.setattr(breaker, "DENIAL_KEPT_MS", 0)
            assert (await here.admit("p", lease_s=LEASE_S)).allowed

    asyncio.run(story())


def test_reports_that_travel_together_count_in_their_order(redis_url, patient):
    async def story():
        async with connected(redis_url) as (_, here):
            admissions = await asyncio.gather(*(here.admit("p", lease_s=LEASE_S) for _ in range(16)))
            verdicts = [F] * 7 + [S] + [F] * 7 + [S]
            await asyncio.gather(*(here.report("p", a, v) for a, v in zip(admissions, verdicts, strict=True)))
            (status,) = await here.status(["p"])
            assert (status.state, status.failures, status.successes) == (BreakerState.CLOSED, 14, 2)

    asyncio.run(story())


def test_a_denied_call_is_never_reported(redis_url, patient):
    async def story():
        async with connected(redis_url) as (redis, here):
            await trip(here)
            denied = await here.admit("p", lease_s=LEASE_S)
            before = await scripts_run(redis)
            await here.report("p", denied, F)
            assert await scripts_run(redis) == before

    asyncio.run(story())


def test_providers_do_not_touch_each_other(redis_url, patient):
    async def story():
        async with connected(redis_url) as (redis, here):
            await call(here, S, "q")
            before = await redis.dump(key("q"))
            await trip(here, "p")
            await here.force("r", "open")
            assert await redis.dump(key("q")) == before
            admissions = await asyncio.gather(*(here.admit(name, lease_s=LEASE_S) for name in "pqr"))
            assert [a.allowed for a in admissions] == [False, True, False]

    asyncio.run(story())


def test_a_redis_that_lost_its_memory_or_its_scripts_is_served_and_old_reports_do_not_count(redis_url, patient):
    async def story():
        async with connected(redis_url) as (redis, here):
            old = [await here.admit("p", lease_s=LEASE_S) for _ in range(TRIP)]
            await redis.flushall()
            await redis.script_flush()
            new = await here.admit("p", lease_s=LEASE_S)
            assert new.generation > old[0].generation
            for admission in old:
                await here.report("p", admission, F)
            (status,) = await here.status(["p"])
            assert (status.state, status.failures, status.local) == (BreakerState.CLOSED, 0, False)

    asyncio.run(story())


def test_a_retry_after_shuts_the_provider_to_all_without_a_failure(redis_url, patient):
    async def story():
        async with connected(redis_url, 2) as (_, here, there):
            first, second = [await here.admit("p", lease_s=LEASE_S) for _ in range(2)]
            await here.report("p", first, X, block_s=20, reason="rate_limited")
            await here.report("p", second, X, block_s=5)
            denied = await there.admit("p", lease_s=LEASE_S)
            assert (denied.allowed, denied.state) == (False, BreakerState.CLOSED)
            assert 10 < denied.retry_after_s <= 20
            (status,) = await there.status(["p"])
            assert (status.health, status.failures) == (Health.DEGRADED, 0)
            assert status.reason.startswith("it asked to wait")

    asyncio.run(story())


@pytest.mark.parametrize(("block_s", "most_s"), [(1e9, 3600), (float("inf"), 3600), (-5, 0), (float("nan"), 0)])
def test_a_senseless_retry_after_is_at_most_an_hour_and_at_least_nothing(redis_url, patient, block_s, most_s):
    async def story():
        async with connected(redis_url) as (_, here):
            await call(here, X, block_s=block_s)
            (status,) = await here.status(["p"])
            assert most_s - 60 < status.retry_after_s <= most_s

    asyncio.run(story())


def test_a_refused_key_isolates_at_once_and_half_opens_when_its_time_is_over(redis_url, patient):
    async def story():
        async with connected(redis_url) as (redis, here):
            await call(here, X, isolate_s=300, reason="unauthorized")
            denied = await here.admit("p", lease_s=LEASE_S)
            assert (denied.state, denied.retry_after_s > 200) == (BreakerState.ISOLATED, True)
            (status,) = await here.status(["p"])
            assert (status.health, status.reason) == (Health.FAILED, "isolated: unauthorized")
            await redis.hset(key("p"), "until", 1)
            async with connected(redis_url) as (_, fresh):
                assert (await fresh.status(["p"]))[0].state is BreakerState.HALF_OPEN
                assert (await fresh.admit("p", lease_s=LEASE_S)).probe

    asyncio.run(story())


def test_an_operators_word_stands_for_ever_until_the_reset(redis_url, patient):
    async def story():
        async with connected(redis_url, 2) as (redis, here, there):
            await call(here, X, block_s=600)
            assert (await here.force("p", "closed")).health is Health.HEALTHY
            await trip(here)
            await call(here, X, isolate_s=300)
            assert (await here.admit("p", lease_s=LEASE_S)).state is BreakerState.FORCED_CLOSED
            assert await redis.ttl(key("p")) == -1
            assert (await here.force("p", "open")).reason == "opened by an operator"
            denied = await there.admit("p", lease_s=LEASE_S)
            assert (denied.allowed, denied.state) == (False, BreakerState.FORCED_OPEN)
            assert denied.retry_after_s > 0
            assert (await here.force("p", "reset")).health is Health.HEALTHY
            assert (await here.admit("p", lease_s=LEASE_S)).allowed
            assert 86_000 < await redis.ttl(key("p")) <= 86_400

    asyncio.run(story())


def test_what_redis_holds_has_no_text_longer_than_a_code(redis_url, patient):
    async def story():
        async with connected(redis_url) as (redis, here):
            await call(here, X, isolate_s=300, reason="x" * 10_000)
            assert len(await redis.hget(key("p"), "reason")) < 200

    asyncio.run(story())


def test_noticeably_failing_is_degraded_before_it_trips(redis_url, patient):
    async def story():
        async with connected(redis_url) as (_, here):
            for verdict in [S] * 9 + [F] + [S] * 9:
                await call(here, verdict)
            assert (await here.status(["p"]))[0].health is Health.HEALTHY
            await call(here, F)
            assert (await here.status(["p"]))[0].health is Health.DEGRADED
            assert (await here.status(["unknown"]))[0].health is Health.HEALTHY

    asyncio.run(story())


def test_without_any_redis_the_rules_hold_within_the_process():
    async def story():
        here = Breakers(None)
        assert here.seems_closed("p")
        await trip(here)
        assert (await here.admit("p", lease_s=LEASE_S)).state is BreakerState.OPEN
        assert not here.seems_closed("p")
        (status,) = await here.status(["p"])
        assert (status.health, status.local) == (Health.FAILED, True)
        with pytest.raises(Unreachable, match="REDIS_URL"):
            await here.force("p", "open")
        await here.aclose()

    asyncio.run(story())


@pytest.mark.parametrize("trouble", ["cut", "stuck"])
def test_redis_away_or_silent_means_local_mode_said_once_and_asked_no_more(redis_url, trouble, monkeypatch):
    monkeypatch.setattr(breaker, "CHECK_AGAIN_S", 1_000)

    async def story():
        async with relay(redis_url) as (url, become, state), connected(url) as (_, here), asyncio.timeout(60):
            in_flight = await here.admit("q", lease_s=LEASE_S)
            become(trouble)
            with capture_logs() as logs:
                reported = asyncio.create_task(here.report("q", in_flight, S))
                admissions = await asyncio.gather(*(here.admit("p", lease_s=LEASE_S) for _ in range(20)))
                assert all(a.allowed and a.generation < 0 for a in admissions)
                await reported
                if left_behind := [task for task in asyncio.all_tasks() if "_evaluate" in repr(task)]:
                    await asyncio.wait(left_behind)
                came = state["came"]
                await trip(here)
                assert (await here.admit("p", lease_s=LEASE_S)).state is BreakerState.OPEN
                assert (await here.status(["p"]))[0].local
                assert state["came"] == came
                with pytest.raises(Unreachable, match="REDIS_URL"):
                    await here.force("p", "open")
            assert [entry["event"] for entry in logs] == ["coordination_lost"]
            assert redis_url not in json.dumps(logs)

    asyncio.run(story())


def test_local_mode_goes_on_from_what_was_seen_last(redis_url, patient, monkeypatch):
    async def story():
        async with relay(redis_url) as (url, become, _), connected(url) as (_, here):
            in_flight = [await here.admit("p", lease_s=LEASE_S) for _ in range(TRIP)]
            await trip(here, "ill")
            await trip(here, "ill, long ago")
            await call(here, X, "busy", block_s=60)
            become("cut")
            for admission in in_flight:
                await here.report("p", admission, F)
            states = [(await here.admit(name, lease_s=LEASE_S)).state for name in ("p", "ill")]
            assert states == [BreakerState.OPEN, BreakerState.OPEN]
            assert (await here.admit("busy", lease_s=LEASE_S)).retry_after_s > 30
            monkeypatch.setattr(breaker, "SNAPSHOT_KEPT_MS", -1)
            assert (await here.admit("ill, long ago", lease_s=LEASE_S)).allowed

    asyncio.run(story())


def test_when_redis_is_back_local_state_is_dropped(redis_url, patient, hasty):
    async def story():
        async with relay(redis_url) as (url, become, _), connected(url) as (_, here):
            await call(here, S)
            become("cut")
            with capture_logs() as logs:
                late = [await here.admit("p", lease_s=LEASE_S) for _ in range(TRIP)]
                await trip(here)
                assert not (await here.admit("p", lease_s=LEASE_S)).allowed
                become("clear")
                async with asyncio.timeout(60):
                    await here._restoring
                admission = await here.admit("p", lease_s=LEASE_S)
                assert admission.allowed
                assert admission.generation > 0
                for local in late:
                    await here.report("p", local, F)
                (status,) = await here.status(["p"])
                assert (status.failures, status.successes, status.local) == (0, 1, False)
            assert [entry["event"] for entry in logs] == ["coordination_lost", "coordination_restored"]

    asyncio.run(story())


def test_a_reply_that_came_too_late_is_never_taken_for_another(redis_url, monkeypatch, hasty):
    async def story():
        async with relay(redis_url) as (url, become, _), connected(url) as (_, here):
            await trip(here, "ill")
            become("stuck")
            await here.admit("p", lease_s=LEASE_S)
            become("clear")
            monkeypatch.setattr(breaker_store, "ROUND_TRIP_S", 20)
            async with asyncio.timeout(60):
                await here._restoring
            states = [(await here.admit(name, lease_s=LEASE_S)).state for name in ("ill", "p", "ill", "p")]
            assert states == [BreakerState.OPEN, BreakerState.CLOSED] * 2

    asyncio.run(story())


@pytest.mark.parametrize("state", [BreakerState.OPEN, BreakerState.ISOLATED])
def test_a_snapshot_of_an_open_circuit_stays_open_for_the_rest_of_its_time(state):
    circuit = Circuit.from_look(Look(state, 7, 9_000, 1000, False, 3), age_ms=4_000, now=50_000)
    assert circuit.look(50_000).retry_ms == 5_000
    assert circuit.admit(55_000, "me", 1_000).probe
    circuit.report(55_000, Report(8, "me", F), 0)
    assert circuit.look(55_000).retry_ms == 80_000


def test_a_snapshot_of_a_ramp_goes_on_rising():
    circuit = Circuit.from_look(Look(BreakerState.CLOSED, 7, 0, 550, False, 1), age_ms=15_000, now=1_000_000)
    assert circuit.look(1_000_000).permille == 775
    assert circuit.look(1_015_000).permille == 1000


@pytest.mark.parametrize(
    ("verdicts", "slow", "state"),
    [
        ([F] * 7, False, BreakerState.CLOSED),
        ([F] * 8, False, BreakerState.OPEN),
        ([F, S] * 9 + [F], False, BreakerState.CLOSED),
        ([F, S] * 10, False, BreakerState.OPEN),
        ([S, S, F] * 20, False, BreakerState.CLOSED),
        ([S] * 19, True, BreakerState.CLOSED),
        ([S] * 20, True, BreakerState.OPEN),
        ([X] * 1000, True, BreakerState.CLOSED),
        ([F] * 7 + [X] + [F], False, BreakerState.OPEN),
    ],
)
def test_eight_in_a_row_or_half_of_twenty_or_slowness_trips(verdicts, slow, state):
    circuit = Circuit(generation=1)
    for verdict in verdicts:
        circuit.report(1_000_000, Report(1, "", verdict, slow), 0)
    assert circuit.state is state


def test_the_window_forgets_what_is_a_minute_old():
    circuit = Circuit(generation=1)
    for second in range(0, 600, 7):
        circuit.report(1_000_000 + second * 1_000, Report(1, "", F if second % 14 else S), 0)
    assert circuit.state is BreakerState.CLOSED
    assert circuit.window(1_000_000 + 599_000).total <= 9


def test_each_failed_probe_doubles_the_time_open_up_to_five_minutes_and_jitter_only_lengthens():
    circuit, now, waits = Circuit(generation=1), 1_000_000, []
    for _ in range(TRIP):
        circuit.report(now, Report(1, "", F), 200)
    for _ in range(7):
        waits.append(circuit.look(now).retry_ms)
        now += waits[-1]
        look = circuit.admit(now, "me", 1_000)
        assert look.probe
        circuit.report(now, Report(look.generation, "me", F), 200)
    assert waits == [12_000, 24_000, 48_000, 96_000, 192_000, 360_000, 360_000]
