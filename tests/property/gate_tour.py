"""A walk through everything a gate has to do, a few steps for each: what no longer works without one of its guards is seen here."""

from worker.resilience.limits import Limits
from worker.resilience.local import Ask
from worker.signals import Verdict

S, F, X = Verdict.SUCCESS, Verdict.FAILURE, Verdict.NEUTRAL


def calls(machine, number, *, tokens=10, lease_ms=90_000, **more):
    """So many ask, one after the other; returns what was answered."""
    return [machine.asked([Ask(machine.lease(), lease_ms, tokens, **more)])[0] for _ in range(number)]


def end(machine, verdict=S, which=0, **more):
    """The call at this place of those in flight has ended."""
    machine.reported([machine.tell_of(machine.held.pop(which), verdict)._replace(**more)])


def tripped(machine):
    calls(machine, 8)
    for _ in range(8):
        end(machine, F, which=-1)


def an_outage(machine):
    machine.begin(Limits())
    calls(machine, 1)
    late = machine.held.pop()
    tripped(machine)
    machine.now += 13_000
    calls(machine, 2)  # one probe, and one who is turned away
    end(machine, F)
    machine.now += 13_000
    calls(machine, 1)  # open for twice as long
    machine.now += 13_000
    calls(machine, 1, lease_ms=2_000)
    machine.now += 3_000
    calls(machine, 1)  # the prober has died
    end(machine, X, which=-1)
    for _ in range(2):
        calls(machine, 1)
        end(machine, which=-1)
    machine.held.append(late)
    end(machine, F, which=-1)
    calls(machine, 1, draw=999)
    calls(machine, 1, draw=1)
    machine.the_clock_steps_back(5_000)
    end(machine, X, which=-1)


def waits_a_provider_asks_for(machine):
    machine.begin(Limits())
    calls(machine, 3)
    end(machine, X, block_ms=30_000)
    end(machine, X, block_ms=700)
    calls(machine, 1)


def waits_nobody_names(machine):
    machine.begin(Limits())
    for _ in range(8):
        calls(machine, 2)
        end(machine, X, block_ms=1_000, named=False)
        machine.now += 100
        end(machine, X, block_ms=1_000, named=False)
        machine.now = machine.gate.circuit.blocked
    calls(machine, 2)
    end(machine, F, block_ms=1_000, named=False)
    machine.now = machine.gate.circuit.blocked
    end(machine, S)
    calls(machine, 1)
    end(machine, X, block_ms=1_000, named=False)


def hangs(machine):
    machine.begin(Limits())
    calls(machine, 4)
    for _ in range(4):
        end(machine, F, which=-1, slow=True)


def a_burst_with_instant_faults(machine):
    machine.begin(Limits())
    calls(machine, 40)
    for _ in range(8):
        end(machine, F)


def who_probes(machine):
    machine.begin(Limits(60, 6_000, 5))
    for _ in range(2):
        calls(machine, 4)
        for _ in range(4):
            end(machine, F, which=-1)
    machine.now += 13_000
    wants = [(500, False), (20, False), (800, True), (300, True)]
    machine.asked([Ask(machine.lease(), 30_000, tokens, bulk) for tokens, bulk in wants])
    end(machine, X, which=-1)
    calls(machine, 1, tokens=1_000)  # more than the burst has left
    calls(machine, 1, tokens=1)


def requests_and_tokens(machine):
    machine.begin(Limits(60, 6_000))
    calls(machine, 8, bulk=True)
    calls(machine, 12)
    machine.now += 5_000
    calls(machine, 1, tokens=1_500)  # too large, waits for a full bucket
    calls(machine, 3, tokens=900)
    machine.now += 100_000
    calls(machine, 1, tokens=5_000)
    machine.the_clock_steps_back(5_000)
    calls(machine, 2)
    machine.one_waits_as_told(0, 5_000, False)


def settlements(machine):
    machine.begin(Limits(60, 6_000))
    calls(machine, 6, tokens=100)
    machine.a_report_comes_twice(0, 0, S)
    end(machine, used=400)
    machine.a_report_comes_twice(0, 0, S)
    end(machine, used=9_000)
    end(machine, sent=False)
    end(machine, remaining_requests=0, remaining_tokens=3)
    end(machine, remaining_requests=100_000, remaining_tokens=100_000)
    machine.now += 60_000
    end(machine, sent=False)
    calls(machine, 1)
    end(machine, remaining_tokens=3)
    calls(machine, 2, lease_ms=2_000)
    machine.now += 3_000
    calls(machine, 1)


def congestion(machine):
    machine.begin(Limits(600))
    calls(machine, 30)
    end(machine, X, ease=0.7)
    end(machine, X, ease=0.5)
    machine.now += 11_000
    end(machine, X, ease=0.1)
    machine.now += 11_000
    end(machine, X, ease=0.5)
    while len(machine.held) > 1:
        end(machine)
    calls(machine, 4)
    calls(machine, 1, bulk=True)
    end(machine)
    machine.now += 60_000
    calls(machine, 1)
    machine._force(0, "reset")


def concurrency(machine):
    machine.begin(Limits(concurrency=4))
    calls(machine, 4, bulk=True)
    calls(machine, 4)
    end(machine, X, ease=0.7)
    for _ in range(12):
        end(machine)
        calls(machine, 3)


def retries(machine):
    machine.begin(Limits())
    calls(machine, 27, extra=2)
    machine.now += 1_000
    calls(machine, 1, extra=1)
    end(machine, S)
    calls(machine, 1)
    end(machine, S, which=-1)


def hedges(machine):
    machine.begin(Limits())
    for cost in (0, 20_000, 0, 0, 0, 0, 0, 0):
        calls(machine, 100)
        machine.reported([machine.tell_of(held, S)._replace(cost=cost, bucket=3) for held in machine.held])
        machine.held = []
        if len(machine.told) <= 200:
            machine.hedge(0, 1_000)
        machine.now += 150_000
    machine.hedge(0, 20_000)
    calls(machine, 27, extra=2)
    machine.hedge(0, 100)
    for _ in range(12):
        machine.hedge(0, 0)


def a_first_hedge(machine):
    machine.begin(Limits())
    machine.hedge(0, 0)


TOUR = (
    an_outage, waits_a_provider_asks_for, waits_nobody_names, hangs, a_burst_with_instant_faults, who_probes,
    requests_and_tokens, settlements, congestion, concurrency, retries, hedges, a_first_hedge,
)  # fmt: skip
