"""The pure parts of the resilience benchmark: its weather is a function of the seed, its figures are sums one can check by hand."""

import asyncio
import time
from itertools import pairwise
from urllib.parse import urlsplit

import pytest

from bench import faultmodel, resilience_figures, resilience_fleet, resilience_plan, resilience_stage, rivals
from bench.faultmodel import BROWN_OUT, OUTAGE, PROVIDERS, STORM, Episode, arrivals, dark_share, weather
from bench.resilience_figures import Tally, lower_bound, mixed, tallies
from bench.resilience_plan import DARK, DEAD, DEADLINE_S, FAILOVER, SHORT, Plan
from worker import config
from worker.simulator import script

LONG_S = 400_000.0


def ill_s(episodes, provider, illness):
    return sum(one.to_s - one.from_s for one in episodes if (one.provider, one.illness) == (provider, illness))


def job(world="independent.0", n=0, took_s=0.5, ok=True, **more):
    return {"world": world, "n": n, "took_s": took_s, "ok": ok, "late_s": 0.0, **more}


def line(provider, received_at, outcome="answered", prompt="p", cost="0"):
    return {"provider": provider, "received_at": received_at, "outcome": outcome, "prompt": prompt, "cost": cost}


def test_equal_seeds_give_equal_weather_and_jobs_and_others_give_others():
    assert weather(3, 600, beta=0.2) == weather(3, 600, beta=0.2)
    assert weather(3, 600, beta=0.2) != weather(4, 600, beta=0.2)
    assert arrivals(3, 60, 2) == arrivals(3, 60, 2) != arrivals(4, 60, 2)


def test_a_longer_run_begins_with_the_weather_of_a_shorter_one():
    short, long = weather(5, 2_000, beta=0), weather(5, 4_000, beta=0)
    assert [one for one in long if one.to_s < 2_000] == [one for one in short if one.to_s < 2_000]


def test_the_illnesses_of_a_provider_do_not_follow_each_other():
    episodes = weather(1, LONG_S, beta=0)
    first = [next(one.from_s for one in episodes if one.illness == illness.name) for illness in (OUTAGE, BROWN_OUT, STORM)]
    assert len({round(at_s / illness.every_s, 6) for at_s, illness in zip(first, (OUTAGE, BROWN_OUT, STORM), strict=True)}) == 3


@pytest.mark.parametrize("illness", [OUTAGE, BROWN_OUT, STORM], ids=lambda illness: illness.name)
def test_each_provider_is_ill_for_its_share_of_the_time(illness):
    episodes = weather(1, LONG_S, beta=0)
    for provider in PROVIDERS:
        assert ill_s(episodes, provider, illness.name) / LONG_S == pytest.approx(illness.share, rel=0.15)


@pytest.mark.parametrize("beta", [0.2, 0.5, 1.0])
def test_beta_is_the_share_of_a_provider_s_outages_that_strike_all_three(beta):
    outages = [one for one in weather(2, LONG_S, beta=beta) if one.illness == OUTAGE.name]
    for provider in PROVIDERS:
        own = [one for one in outages if one.provider == provider]
        assert sum(one.common for one in own) / len(own) == pytest.approx(beta, rel=0.25)
        assert len(own) == pytest.approx(LONG_S / (OUTAGE.every_s + OUTAGE.lasts_s), rel=0.15)
    common = {(one.from_s, one.to_s, str(one.look)): 0 for one in outages if one.common}
    for one in outages:
        if one.common:
            common[one.from_s, one.to_s, str(one.look)] += 1
    assert set(common.values()) == {len(PROVIDERS)}


def test_without_common_cause_no_outage_is_shared():
    assert not any(one.common for one in weather(2, LONG_S, beta=0))


def test_jobs_come_as_often_as_said_and_at_random():
    times = arrivals(1, 10_000, 2)
    gaps = [later - earlier for earlier, later in pairwise(times)]
    mean_s = sum(gaps) / len(gaps)
    assert mean_s == pytest.approx(0.5, rel=0.05)
    spread_s = (sum((gap - mean_s) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert spread_s == pytest.approx(mean_s, rel=0.1)  # as of an exponential; 0 if they came like clockwork


def test_an_episode_is_told_to_a_simulator_in_the_simulator_s_own_time():
    episode = Episode("alpha", OUTAGE.name, 10, 14, {"kind": "reset"})
    assert episode.outage(-5) == {"kind": "reset", "from_s": 15, "to_s": 19}
    assert episode.outage(12) == {"kind": "reset", "from_s": 0, "to_s": 2}
    assert episode.outage(14) is None


def test_it_is_dark_only_while_all_three_are_out():
    out = [Episode(name, OUTAGE.name, at_s, 10, {}) for name, at_s in zip(PROVIDERS, (0, 2, 4), strict=True)]
    half = [*out[:2], Episode(PROVIDERS[2], BROWN_OUT.name, 0, 10, {})]
    assert dark_share(out, [1, 3, 5, 9.9, 10]) == pytest.approx(2 / 5)
    assert dark_share(half, [1, 3, 5]) == 0


def test_the_simulator_and_the_configuration_take_what_the_plan_writes(tmp_path):
    plan = Plan.of(SHORT)
    (tmp_path / "script.toml").write_text(plan.script())
    played = script.load(tmp_path / "script.toml")
    assert set(played.providers) == {world.provider(name) for world in plan.played for name in PROVIDERS}
    for world in plan.played:
        for name in PROVIDERS:
            outages = [one.outage(-1) for one in world.episodes if one.provider == name]
            script.changed(played.providers[world.provider(name)], {"outages": outages}, name)
    urls = {world.name: [f"http://127.0.0.1:1/{world.provider(name)}/v1" for name in PROVIDERS] for world in plan.played}
    (tmp_path / "backstop.toml").write_text(resilience_fleet.configuration({"ordered": urls}))
    chains = config.load(tmp_path / "backstop.toml").chains
    assert chains[f"ordered.{DEAD}"].providers == tuple(f"ordered.{DEAD}.{name}" for name in PROVIDERS)


def test_the_scenes_come_after_the_worlds_and_end_before_the_run_does():
    plan = Plan.of(SHORT)
    for jobs in map(plan.jobs, range(resilience_plan.TURNS)):
        assert jobs == sorted(jobs, key=lambda job: job["at_s"])
        assert len({job["prompt"] for job in jobs}) == len(jobs)
        scenes = [job["at_s"] for job in jobs if job["world"] in (FAILOVER, DEAD, DARK)]
        assert SHORT.length_s < min(scenes) < max(scenes) + DEADLINE_S < plan.length_s + 1e-6


def test_each_contestant_has_the_scenes_that_measure_time_to_itself():
    plan, taken = Plan.of(SHORT), []
    for turn in range(resilience_plan.TURNS):
        moments = [job["at_s"] for job in plan.jobs(turn) if job["world"] in (FAILOVER, DEAD)]
        taken.append((min(moments), max(moments)))
    dark_s = min(job["at_s"] for job in plan.jobs(0) if job["world"] == DARK)
    assert all(before[1] < after[0] for before, after in zip(taken, [*taken[1:], (dark_s, dark_s)], strict=True))


def test_a_good_answer_is_a_full_one_in_time():
    jobs = [job(), job(ok=False), job(degraded=True), job(took_s=DEADLINE_S + 0.1), job("common.9")]
    assert tallies(jobs) == {"independent.0": Tally(1, 4), "common.9": Tally(1, 1)}


def test_losses_are_mixed_by_the_share_of_common_causes():
    independent, common = [Tally(999, 1_000)], [Tally(950, 1_000)]
    assert mixed(independent, common, 0) == pytest.approx(0.999)
    assert mixed(independent, common, 0.2) == pytest.approx(1 - 0.8 * 0.001 - 0.2 * 0.05)
    assert mixed(independent, common, 1) == pytest.approx(0.95)


def test_the_bound_follows_whole_worlds_and_never_beats_the_rule_of_three():
    even, uneven = [Tally(99, 100)] * 20, [Tally(100, 100)] * 19 + [Tally(80, 100)]
    assert lower_bound(even, [], 0) == pytest.approx(0.99 if 0.99 < 1 - 3 / 2_000 else 1 - 3 / 2_000)
    assert lower_bound(uneven, [], 0) < 0.98 < lower_bound(even, [], 0)  # the same losses, in one burst
    assert lower_bound([Tally(1_000, 1_000)] * 20, [], 0) == pytest.approx(1 - 3 / 20_000)


def test_what_is_added_is_told_from_what_a_healthy_provider_takes():
    middle_s = faultmodel.LATENCY["median_ms"] / 1000
    assert resilience_figures.latency_alone_s(0.5) == pytest.approx(middle_s)
    assert resilience_figures.latency_alone_s(0.99) == pytest.approx(faultmodel.LATENCY["p99_ms"] / 1000)
    assert resilience_figures.added_ms([job(took_s=middle_s + 0.02)] * 9, 0.5) == pytest.approx(20)
    lost = [job(took_s=0.1, ok=False)] * 9
    assert resilience_figures.added_ms(lost, 0.5) == pytest.approx((DEADLINE_S - middle_s) * 1000)


def test_a_second_is_good_when_every_job_of_it_ended_well():
    jobs = [job(n=0, ok=False), job(n=1), job(n=2), job("independent.1", n=1)]
    due_s = {0: 4.1, 1: 4.9, 2: 5.0}
    assert resilience_figures.good_seconds(jobs, lambda one: due_s[one["n"]]) == pytest.approx(2 / 3)


def test_waste_and_cost_come_from_the_bill_of_the_independent_worlds():
    plan = Plan.of(SHORT)
    jobs = [job(n=n, ok=n < 8) for n in range(10)] + [job("common.12"), job(DEAD)]
    asked = [line("independent.0.alpha", n, cost="0.0002") for n in range(12)] + [line("common.12.alpha", 1, cost="9")]
    found = resilience_figures.contestant(plan, jobs, asked)
    assert (found["jobs"], found["lost"]) == (10, 2)
    assert found["wasted_per_1000"] == pytest.approx(400)
    assert found["usd_per_1000"] == "0.3000"
    assert found["shares"]["20%"][0] == pytest.approx(1 - 0.8 * 0.2)


def test_the_gap_after_a_dropped_call_is_the_time_to_the_job_s_next_request():
    dropped = [line("failover.alpha", 1.0, "reset", "a"), line("failover.alpha", 1.01, "reset", "b")]
    then = [line("failover.beta", 1.03, prompt="a"), line("failover.beta", 1.02, prompt="b"), line("failover.alpha", 3.0, prompt="c")]
    found = resilience_figures.scenes(Plan.of(SHORT), [job(DEAD, took_s=0.52)], [*then, *dropped])
    assert (found["failovers"], found["dead_host_ms"]) == (2, pytest.approx(520))
    assert found["failover_p99_ms"] == pytest.approx(30)


def test_the_lag_runs_from_the_eighth_failure_to_the_last_request_before_the_probe():
    at = [0.1 * n for n in range(8)]
    calls = [line(f"{DARK}.alpha", one) for one in [*at, 0.75, 10.9]] + [line(f"{DARK}.beta", one) for one in at[:3]]
    assert resilience_figures.lag_ms(calls) == pytest.approx(50)
    assert resilience_figures.lag_ms(calls[-3:]) is None


def test_a_job_that_is_not_answered_by_its_deadline_has_no_answer_and_one_is_given_at_once_when_it_is_due():
    async def ask(world, prompt):
        if prompt == "hang":
            await asyncio.Event().wait()
        if prompt == "fail":
            raise ValueError

    jobs = [{"world": "w", "n": n, "at_s": 0.0, "prompt": prompt} for n, prompt in enumerate(("hang", "fail", "answer"))]
    ended = asyncio.run(rivals.play({"deadline_s": 0.2, "jobs": jobs}, time.time(), ask))
    assert {one["n"]: one["ok"] for one in ended} == {0: False, 1: False, 2: True}


def test_a_dead_host_takes_no_connection_and_does_not_refuse_one():
    async def connect(url):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.open_connection("127.0.0.1", urlsplit(url).port), 0.2)

    with resilience_stage.dead_host() as url:
        asyncio.run(connect(url))
