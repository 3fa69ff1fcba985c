import asyncio
import json
from contextlib import asynccontextmanager
from decimal import Decimal
from urllib.parse import urlsplit

import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from worker.errors import Unreachable
from worker.job import Lane
from worker.resilience import gate, gate_store
from worker.resilience.breaker_rules import RULES
from worker.resilience.circuit import Circuit, Look, Report
from worker.resilience.gate import BreakerState, Denial, Ending, Extra, Gates, Health, Limits
from worker.resilience.gate_store import key
from worker.signals import Verdict

S, F, X = Verdict.SUCCESS, Verdict.FAILURE, Verdict.NEUTRAL
LEASE_S = 30
TRIP = RULES.fails_in_a_row


@pytest.fixture
def patient(monkeypatch):
    """A busy machine is no reason for local mode in a test that is not about it."""
    monkeypatch.setattr(gate_store, "ROUND_TRIP_S", 20)


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(gate, "CHECK_AGAIN_S", 0.01)


@asynccontextmanager
async def connected(url, number=1, **options):
    """Redis, and so many processes' gates on it. The clients wait for ever: the gates' own limit is tested."""
    clients = [Redis.from_url(url, socket_timeout=None, socket_connect_timeout=None) for _ in range(number + 1)]
    fleet = [Gates(client, **options) for client in clients[1:]]
    try:
        yield clients[0], *fleet
    finally:
        for gates in fleet:
            await gates.aclose()
        for client in clients:
            await client.aclose()


async def call(gates, verdict, provider="p", **signals):
    admission = await gates.admit(provider, lease_s=LEASE_S)
    await gates.report(provider, admission, Ending(verdict=verdict, **signals))
    return admission


async def trip(gates, provider="p"):
    for _ in range(TRIP):
        await call(gates, F, provider, reason="server_error")


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
                await late.report("p", lost, Ending(verdict=F))  # it was alive after all, but no longer the holder
                assert (await fresh.status(["p"]))[0].state is BreakerState.HALF_OPEN
                await fresh.report("p", taken, Ending(verdict=X))
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
            await asyncio.gather(*(here.report("p", a, Ending(verdict=S)) for a in admissions))
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
            monkeypatch.setattr(gate, "DENIAL_KEPT_MS", 0)
            assert (await here.admit("p", lease_s=LEASE_S)).allowed

    asyncio.run(story())


def test_reports_that_travel_together_count_in_their_order(redis_url, patient):
    async def story():
        async with connected(redis_url) as (_, here):
            admissions = await asyncio.gather(*(here.admit("p", lease_s=LEASE_S) for _ in range(16)))
            verdicts = [F] * 7 + [S] + [F] * 7 + [S]
            await asyncio.gather(*(here.report("p", a, Ending(verdict=v)) for a, v in zip(admissions, verdicts, strict=True)))
            (status,) = await here.status(["p"])
            assert (status.state, status.failures, status.successes) == (BreakerState.CLOSED, 14, 2)

    asyncio.run(story())


def test_a_denied_call_is_never_reported(redis_url, patient):
    async def story():
        async with connected(redis_url) as (redis, here):
            await trip(here)
            denied = await here.admit("p", lease_s=LEASE_S)
            before = await scripts_run(redis)
            await here.report("p", denied, Ending(verdict=F))
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
                await here.report("p", admission, Ending(verdict=F))
            (status,) = await here.status(["p"])
            assert (status.state, status.failures, status.local) == (BreakerState.CLOSED, 0, False)

    asyncio.run(story())


def test_a_retry_after_shuts_the_provider_to_all_without_a_failure(redis_url, patient):
    async def story():
        async with connected(redis_url, 2) as (_, here, there):
            first, second = [await here.admit("p", lease_s=LEASE_S) for _ in range(2)]
            await here.report("p", first, Ending(verdict=X, block_s=20, reason="rate_limited"))
            await here.report("p", second, Ending(verdict=X, block_s=5))
            denied = await there.admit("p", lease_s=LEASE_S)
            assert (denied.allowed, denied.state) == (False, BreakerState.CLOSED)
            assert 10 < denied.retry_after_s <= 20
            (status,) = await there.status(["p"])
            assert (status.health, status.failures) == (Health.DEGRADED, 0)
            assert status.reason.startswith("it asked to wait")

    asyncio.run(story())


def test_a_wait_that_nobody_named_doubles_until_a_call_is_answered():
    circuit, now, waits = Circuit(generation=1), 0, []
    refused = Report(1, "", X, block_ms=1_000, named=False)
    for _ in range(8):
        circuit.report(now, refused, 0)
        circuit.report(now, refused, 0)  # in flight with the first one
        waits.append(circuit.blocked - now)
        now = circuit.blocked
    assert waits == [1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 60_000, 60_000]
    circuit.report(now, Report(1, "", S), 0)
    circuit.report(now, refused, 0)
    assert circuit.blocked - now == 1_000


def test_half_as_many_time_outs_as_other_failures_open_the_breaker():
    circuit = Circuit(generation=1)
    for _ in range(TRIP // 2):
        assert circuit.state is BreakerState.CLOSED
        circuit.report(0, Report(1, "", F, slow=True), 0)
    assert circuit.state is BreakerState.OPEN


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
        here = Gates(None)
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
    monkeypatch.setattr(gate, "CHECK_AGAIN_S", 1_000)

    async def story():
        async with relay(redis_url) as (url, become, state), connected(url) as (_, here), asyncio.timeout(60):
            in_flight = await here.admit("q", lease_s=LEASE_S)
            become(trouble)
            with capture_logs() as logs:
                reported = asyncio.create_task(here.report("q", in_flight, Ending(verdict=S)))
                admissions = await asyncio.gather(*(here.admit("p", lease_s=LEASE_S) for _ in range(20)))
                assert all(a.allowed and a.generation < 0 for a in admissions)
                await reported
                if left_behind := [task for task in asyncio.all_tasks() if "_evaluate" in repr(task)]:
                    await asyncio.wait(left_behind)
                came = state["came"]
                await asyncio.gather(*(here.report("p", a, Ending(verdict=F)) for a in admissions))
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
                await here.report("p", admission, Ending(verdict=F))
            states = [(await here.admit(name, lease_s=LEASE_S)).state for name in ("p", "ill")]
            assert states == [BreakerState.OPEN, BreakerState.OPEN]
            assert (await here.admit("busy", lease_s=LEASE_S)).retry_after_s > 30
            monkeypatch.setattr(gate, "SNAPSHOT_KEPT_MS", -1)
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
                    await here.report("p", local, Ending(verdict=F))
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
            monkeypatch.setattr(gate_store, "ROUND_TRIP_S", 20)
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
        ([F, S] * 10, False, BreakerState.CLOSED),
        ([F, S] * 10 + [F], False, BreakerState.OPEN),
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


# --- limits, budget, hedges, latencies ---

TIGHT = {"p": Limits(rpm=60, tpm=6_000, concurrency=50)}


def test_two_processes_share_one_limit_and_who_is_too_many_is_told_when(redis_url, patient):
    async def story():
        async with connected(redis_url, 2, limits=TIGHT) as (_, *fleet):
            admissions = await asyncio.gather(*(fleet[n % 2].admit("p", lease_s=LEASE_S, tokens=10, lane=Lane.BULK) for n in range(40)))
            allowed, denied = [a for a in admissions if a.allowed], [a for a in admissions if not a.allowed]
            assert len(allowed) in (7, 8)
            assert len({a.lease for a in allowed}) == len(allowed)
            assert {(a.denied, a.state, a.lease, a.tokens) for a in denied} == {(Denial.LIMITED, BreakerState.CLOSED, "", 0)}
            assert max(a.retry_after_s for a in denied) > 25
            assert len({a.retry_after_s for a in denied}) == len(denied)
            assert (await fleet[0].admit("q", lease_s=LEASE_S, tokens=10**9)).allowed

    asyncio.run(story())


def test_a_denied_large_request_is_no_reason_to_deny_a_small_one(redis_url, patient):
    async def story():
        async with connected(redis_url, limits=TIGHT) as (_, here):
            assert (await here.admit("p", lease_s=LEASE_S, tokens=900)).allowed
            assert (await here.admit("p", lease_s=LEASE_S, tokens=900)).denied is Denial.LIMITED
            assert (await here.admit("p", lease_s=LEASE_S, tokens=20, lane=Lane.BULK)).denied is Denial.LIMITED
            assert (await here.admit("p", lease_s=LEASE_S, tokens=20)).allowed

    asyncio.run(story())


def test_the_status_says_what_is_in_flight_and_left_and_a_report_counts_once(redis_url, patient):
    async def story():
        async with connected(redis_url, 2, limits=TIGHT) as (_, here, there):
            admissions = [await here.admit("p", lease_s=LEASE_S, tokens=100) for _ in range(3)]
            (status,) = await there.status(["p"])
            assert (status.in_flight, status.requests_left, status.rate_multiplier) == (3, 7, 1)
            assert 700 <= status.tokens_left < 800
            for _ in range(2):
                await here.report("p", admissions[0], Ending(verdict=F, sent=False))
            (status,) = await there.status(["p"])
            assert (status.in_flight, status.requests_left, status.failures) == (2, 8, 1)
            await here.report("p", admissions[1], Ending(verdict=X, ease=0.5, remaining_requests=0, remaining_tokens=1))
            (status,) = await there.status(["p"])
            assert (status.in_flight, status.requests_left, status.rate_multiplier) == (1, 0, 0.5)
            assert status.tokens_left < 100
            (status,) = await there.status(["q"])
            assert (status.in_flight, status.requests_left, status.tokens_left) == (0, None, None)

    asyncio.run(story())


def test_congestion_makes_a_provider_strained_until_an_operator_resets_it(redis_url, patient):
    async def story():
        async with connected(redis_url, 2, limits=TIGHT) as (_, here, there):
            admission = await here.admit("p", lease_s=LEASE_S)
            assert not admission.strained
            await here.report("p", admission, Ending(verdict=X, ease=0.3))
            assert (await there.admit("p", lease_s=LEASE_S)).strained
            status = await here.force("p", "reset")
            assert status.rate_multiplier == 1
            assert not (await there.admit("p", lease_s=LEASE_S)).strained

    asyncio.run(story())


def test_retries_end_at_half_of_the_budget_while_first_calls_go_on(redis_url, patient):
    async def story():
        async with connected(redis_url) as (_, here):
            made = [await here.admit("p", lease_s=LEASE_S, extra=Extra.RETRY) for _ in range(20)]
            made += [await here.admit("p", lease_s=LEASE_S, extra=Extra.AFTER_TIMEOUT) for _ in range(17)]
            assert [a.denied for a in made[:33]] == [None] * 33
            assert made[-1].denied is Denial.BUDGET
            assert 0 < made[-1].retry_after_s <= 20
            assert (await here.admit("p", lease_s=LEASE_S)).allowed

    asyncio.run(story())


def test_a_hedge_has_to_be_earned_and_paid_for(redis_url, patient):
    async def story():
        async with connected(redis_url) as (_, here):
            assert not await here.may_hedge("p", cost_usd=Decimal(0))
            for _ in range(2):
                admissions = await asyncio.gather(*(here.admit("p", lease_s=LEASE_S) for _ in range(51)))
                cost = Decimal("0.01")
                await asyncio.gather(*(here.report("p", a, Ending(verdict=S, cost_usd=cost)) for a in admissions))
            assert not await here.may_hedge("p", cost_usd=None)
            assert not await here.may_hedge("p", cost_usd=Decimal("0.06"))
            assert await here.may_hedge("p", cost_usd=Decimal("0.01"))
            assert await here.may_hedge("p", cost_usd=Decimal("0.01"))
            assert not await here.may_hedge("p", cost_usd=Decimal("0.01"))
            assert not await here.may_hedge("q", cost_usd=Decimal("0.01"))

    asyncio.run(story())


def test_the_95th_percentile_is_the_fleets_and_needs_two_hundred_answers(redis_url, patient):
    async def story():
        async with connected(redis_url, 3) as (_, here, there, late):
            for n in range(199):
                admission = await here.admit("p", lease_s=LEASE_S)
                await here.report("p", admission, Ending(verdict=S, took_ms=2_000 if n < 180 else 9_000))
            assert await there.p95_s("p") is None
            await here.report("p", await here.admit("p", lease_s=LEASE_S), Ending(verdict=S, took_ms=9_000))
            assert await there.p95_s("p") is None  # believed for ten seconds
            assert await late.p95_s("p") == pytest.approx(9, rel=0.1)
            for _ in range(200):
                await here.report("q", await here.admit("q", lease_s=LEASE_S), Ending(verdict=S, took_ms=20))
            assert await late.p95_s("q") == 1

    asyncio.run(story())


def test_of_those_who_ask_together_the_cheapest_bulk_job_is_the_probe(redis_url, patient):
    async def story():
        async with connected(redis_url, 2) as (redis, here, there):
            await trip(here)
            await redis.hset(key("p"), "until", 1)
            wants = [(5, Lane.INTERACTIVE), (900, Lane.BULK), (40, Lane.BULK), (70, Lane.BULK)]
            admissions = await asyncio.gather(*(there.admit("p", lease_s=LEASE_S, tokens=t, lane=lane) for t, lane in wants))
            assert [a.probe for a in admissions] == [False, False, True, False]

    asyncio.run(story())


def test_a_probe_that_finds_no_room_leaves_the_lease_to_the_next(redis_url, patient):
    async def story():
        limits = {"p": Limits(tpm=6_000)}
        async with connected(redis_url, 2, limits=limits) as (redis, here, there):
            assert (await here.admit("p", lease_s=LEASE_S, tokens=800)).allowed
            await trip(here)
            await redis.hset(key("p"), "until", 1)
            asked = [there.admit("p", lease_s=LEASE_S, tokens=t, lane=lane) for t, lane in [(5, Lane.INTERACTIVE), (700, Lane.BULK)]]
            person, job = await asyncio.gather(*asked)
            assert (person.probe, job.denied) == (True, Denial.LIMITED)

    asyncio.run(story())


def test_who_is_cancelled_while_it_asks_keeps_nothing(redis_url, patient):
    async def story():
        async with connected(redis_url, limits=TIGHT) as (_, here):
            asking = [asyncio.create_task(here.admit("p", lease_s=LEASE_S, tokens=10)) for _ in range(6)]
            await asyncio.sleep(0)
            for task in asking[:3]:
                task.cancel()
            await asyncio.wait(asking)
            await here.admit("q", lease_s=LEASE_S)
            await asyncio.gather(*here._giving_back)
            (status,) = await here.status(["p"])
            assert (status.in_flight, status.requests_left) == (3, 7)

    asyncio.run(story())


async def fail(gates, admissions):
    """They are back at once, a few at a time."""
    for n in range(0, len(admissions), 20):
        await asyncio.gather(*(gates.report("p", a, Ending(verdict=F)) for a in admissions[n : n + 20]))


@pytest.mark.parametrize("local", [False, True])
def test_instant_faults_of_a_few_do_not_trip_before_the_answers_of_the_many_are_back(redis_url, patient, local):
    async def story():
        async with connected(redis_url) as (_, shared):
            here = Gates(None) if local else shared
            burst = await asyncio.gather(*(here.admit("p", lease_s=LEASE_S) for _ in range(400)))
            await fail(here, burst[4::5])
            assert (await here.status(["p"]))[0].state is BreakerState.CLOSED
            for admission in burst:
                await here.report("p", admission, Ending(verdict=S))  # those that failed are known already
            (status,) = await here.status(["p"])
            assert (status.state, status.failures, status.successes) == (BreakerState.CLOSED, 80, 320)

    asyncio.run(story())


@pytest.mark.parametrize("local", [False, True])
def test_a_total_outage_trips_when_half_of_a_burst_is_back(redis_url, patient, local):
    async def story():
        async with connected(redis_url) as (_, shared):
            here = Gates(None) if local else shared
            burst = await asyncio.gather(*(here.admit("p", lease_s=LEASE_S) for _ in range(400)))
            await fail(here, burst[::-1][:220])
            assert (await here.status(["p"]))[0].state is BreakerState.OPEN

    asyncio.run(story())


def test_on_its_own_a_process_keeps_its_part_of_the_limits_and_never_hedges(redis_url, patient):
    async def story():
        alone = Gates(None, TIGHT, fleet=lambda: 5)
        admissions = [await alone.admit("p", lease_s=LEASE_S, tokens=10) for _ in range(5)]
        assert [a.denied for a in admissions] == [None, None, Denial.LIMITED, Denial.LIMITED, Denial.LIMITED]
        (status,) = await alone.status(["p"])
        assert (status.in_flight, status.requests_left, status.local) == (2, 0, True)
        assert not await alone.may_hedge("p", cost_usd=Decimal(0))
        assert await alone.p95_s("p") is None
        async with relay(redis_url) as (url, become, _), connected(url, limits=TIGHT) as (_, here):
            assert (await here.admit("p", lease_s=LEASE_S)).allowed
            become("cut")
            lost = await here.admit("p", lease_s=LEASE_S)
            assert (lost.denied, lost.generation < 0) == (Denial.LIMITED, True)  # the others may have taken everything

    asyncio.run(story())
