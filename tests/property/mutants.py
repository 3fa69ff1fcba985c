"""The ledger with one of its guards taken out, by the act of the tour that is to notice."""

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import tour
from sqlalchemy import TextClause, text

from worker import calls, dispatch, intervene, ledger, rescue, submit


class Mutant(NamedTuple):
    name: str
    module: ModuleType
    constant: str
    changes: tuple[tuple[str, str], ...]

    def value(self) -> Any:
        """What takes the constant's place. Raises AssertionError when the guard is written in other words by now."""
        sound = getattr(self.module, self.constant)
        sql = sound.text if isinstance(sound, TextClause) else sound
        for old, new in self.changes:
            assert old in sql, f"{self.name}: {self.constant} does not say {old!r} any more"
            sql = sql.replace(old, new)
        return text(sql) if isinstance(sound, TextClause) else sql


def _without(name: str, module: ModuleType, constant: str, *changes: str | tuple[str, str]) -> Mutant:
    """A pair replaces, a text alone is taken out."""
    return Mutant(name, module, constant, tuple((change, "") if isinstance(change, str) else change for change in changes))


MUTANTS: Mapping[Callable[..., Any], tuple[Mutant, ...]] = {
    tour.publishing: (
        _without("claim without raising the fence", ledger, "_CLAIM", ("fence = j.fence + 1", "fence = j.fence")),
        _without("claim opens no call", ledger, "_CLAIM", ("WHERE c.fence = c.walk_fence", "WHERE false")),
        _without("settle forgets the result", ledger, "_SETTLE", ("WHERE m.state = 'succeeded'", "WHERE false")),
        _without("every attempt is counted", ledger, "_SETTLE", ("j.attempts + e.counted", "j.attempts + 1")),
        _without("answers are kept twice", ledger, "_SETTLE", ("CASE WHEN o.id IS NOT NULL THEN NULL WHEN", "CASE WHEN")),
        _without("costs are not booked", ledger, "_SETTLE", "cost_usd = c.cost_usd,"),
        _without("settle counts no success", ledger, "_SETTLE", ("b.succeeded + n.succeeded", "b.succeeded")),
        _without("settle closes no batch", ledger, "_SETTLE", ("CASE WHEN n.closes THEN 'finished' ELSE b.state END", "b.state")),
        _without("settle closes batches too late", ledger, "_SETTLE", "+ m.ended"),
        _without("rows are not counted", submit, "_ADD_ROWS", "total = batches.total + n.total,"),
        _without("expire too early", rescue, "_EXPIRE", "AND deadline_at <= now()"),
        _without("dispatch without window", dispatch, "_WINDOWS", ("SELECT count(*)", "SELECT 0 * count(*)")),
        _without("no dispatch TTL", dispatch, "_WITHDRAW_LOST", ("dispatched_at <", "false AND dispatched_at <")),
        _without("what waits for slots is lost", dispatch, "_WITHDRAW_LOST",
                 ("SELECT unnest(waiting)", "SELECT NULL::uuid FROM workers WHERE false UNION SELECT unnest(waiting)"),
                 ("WHERE state IN ('live', 'draining')", "WHERE false")),
        _without("the epoch is ignored", dispatch, "_WITHDRAW_ALL", ("AND true", "AND false")),
        _without("a broken broker keeps jobs", dispatch, "_WITHDRAW", ("delivery_id = ANY", "false AND delivery_id = ANY")),
    ),
    tour.a_pause: (
        _without("claim from a paused lane", ledger, "_CLAIM", ("AND l.paused", "AND false")),
        _without("dispatch into a paused lane", dispatch, "_WINDOWS", ("l.paused", "false AS paused")),
    ),
    tour.an_attempt_after_the_other: (
        _without("claim of what is not queued", ledger, "_CLAIM", "AND state = 'queued'"),
        _without("claim before its time", ledger, "_CLAIM", "AND run_at <= now()"),
        _without("claim always opens a call", ledger, "_CLAIM", "WHERE c.fence = c.walk_fence"),
        _without("claim forgets what was asked", ledger, "_CLAIM", ("CASE WHEN c.fence > c.walk_fence", "CASE WHEN false")),
        _without("claim remembers earlier walks", ledger, "_CLAIM", "AND p.fence >= c.walk_fence"),
        _without("calls are not opened", calls, "_OPEN", ("ON CONFLICT", "LIMIT 0 ON CONFLICT")),
        _without("what ended is not booked on the way", calls, "_OPEN", ("AND p.outcome IS NULL", "AND false")),
        _without("calls are opened once only", calls, "_OPEN", "ON CONFLICT (id) DO NOTHING"),
        _without("settle of what does not run", ledger, "_SETTLE", "AND j.state = 'running'"),
        _without("settle again counts again", ledger, "_SETTLE", ("AND j.state = 'running'", "AND (j.state = 'running' OR :again)")),
        _without("settle again is not recognised", ledger, "_SETTLE", ("WHERE :again", "WHERE false")),
        _without("attempts are not counted", ledger, "_SETTLE", "+ e.counted"),
        _without("no new walk", ledger, "_SETTLE", ("CASE WHEN e.new_walk", "CASE WHEN false")),
        _without("attempted again at once", ledger, "_SETTLE", "+ make_interval(secs => e.run_after_s)"),
        _without("attempted again as still published", ledger, "_SETTLE", ", dispatched_at = NULL"),
        _without("calls never made stay on the books", ledger, "_SETTLE",
                 ("DELETE FROM provider_calls WHERE", "DELETE FROM provider_calls WHERE false AND")),
    ),
    tour.a_success_and_its_repetition: (
        _without("requeue of answered jobs", intervene, "_REQUEUEABLE", ("'failed',", "'failed', 'succeeded',")),
    ),
    tour.late_settles: (
        _without("claim by the dead", ledger, "_CLAIM", "AND w.state IN ('live', 'draining')"),
        _without("claim by nobody known", ledger, "_CLAIM",
                 "AND EXISTS (SELECT FROM workers w WHERE w.id = :worker AND w.state IN ('live', 'draining'))"),
        _without("calls are opened by anybody", calls, "_OPEN", " AND c.fence = j.fence", ("AND j.state = 'running'", "")),
        _without("calls are opened after the job was lost", calls, "_OPEN", "AND j.state = 'running'"),
        _without("calls are opened under an old fence", calls, "_OPEN", " AND c.fence = j.fence"),
        _without("what was orphaned is booked on the way", calls, "_OPEN", "AND p.outcome IS NULL"),
        _without("claim forgets paid answers", ledger, "_CLAIM", ("p.outcome, p.answer", "p.outcome, NULL")),
        _without("settle without fence", ledger, "_SETTLE",
                 ("ON e.id = j.id AND e.fence = j.fence\n    WHERE j.id = ANY", "ON e.id = j.id\n    WHERE j.id = ANY"),
                 ("ON e.id = h.id AND e.fence = h.fence WHERE j.id = h.id", "ON e.id = h.id WHERE j.id = h.id")),
        _without("settle again is taken for granted", ledger, "_SETTLE", "AND j.fence = e.fence AND j.state = e.state"),
        _without("result without a success", ledger, "_SETTLE",
                 ("SELECT m.id, m.fence, e.answer FROM moved m JOIN ending e ON e.id = m.id AND e.fence = m.fence",
                  "SELECT e.id, e.fence, e.answer FROM ending e"),
                 ("WHERE m.state = 'succeeded'", "WHERE e.state = 'succeeded' ON CONFLICT DO NOTHING")),
        _without("costs of late workers are lost", ledger, "_SETTLE", ("LEFT JOIN ours", "JOIN ours")),
        _without("late answers are lost", ledger, "_SETTLE", ("WHEN c.settled THEN e.answer", "WHEN c.settled THEN NULL")),
        _without("rescue counts nothing", rescue, "_RESCUE",
                 ("b.failed + n.failed", "b.failed"),
                 ("b.cancelled + n.cancelled", "b.cancelled")),
        _without("cancel counts what runs", intervene, "_CANCEL",
                 ("CASE WHEN j.state = 'running' THEN 'queued' ELSE j.state END AS state", "'cancelled' AS state")),
        _without("rescue of the living", rescue, "_RESCUE", "AND w.state IN ('dead', 'gone')"),
        _without("rescue ignores a cancel", rescue, "_RESCUE",
                 ("WHEN j.cancel_requested THEN", "WHEN false THEN"),
                 ("CASE WHEN j.cancel_requested OR", "CASE WHEN"),
                 "NOT j.cancel_requested AND "),
        _without("deaths are not counted", rescue, "_RESCUE", ("deaths = t.deaths,", "deaths = j.deaths,")),
        _without("rescue leaves calls open", rescue, "_RESCUE", ("p.outcome IS NULL", "false")),
        _without("rescue overwrites the books", rescue, "_RESCUE", " AND p.outcome IS NULL"),
        _without("cancel ignores what runs", intervene, "_CANCEL", ("IN ('queued', 'running')", "IN ('queued')")),
        _without("cancel ends what runs", intervene, "_CANCEL",
                 ("CASE WHEN j.state = 'queued' THEN", "CASE WHEN true THEN"),
                 ("SET\n        cancel", "SET worker_id = NULL,\n        cancel")),
    ),
    tour.strays: (
        _without("release counts nothing", rescue, "_RELEASE", ("b.cancelled + n.cancelled", "b.cancelled")),
        _without("release without fence", rescue, "_RELEASE", " AND t.fence = j.fence"),
        _without("release of what does not run", rescue, "_RELEASE",
                 ("j.state = 'running' AND j.worker_id = :worker", "true")),
        _without("release ignores a cancel", rescue, "_RELEASE",
                 ("CASE WHEN j.cancel_requested THEN 'cancelled' ELSE", "CASE WHEN false THEN 'cancelled' ELSE"),
                 ("CASE WHEN j.cancel_requested THEN now() END", "NULL")),
        _without("release leaves calls open", rescue, "_RELEASE", ("p.outcome IS NULL", "false")),
    ),
    tour.a_worker_leaves_strays_behind: (
        _without("rescue only after a death", rescue, "_RESCUE", ("IN ('dead', 'gone')", "IN ('dead')")),
        _without("retiring is dying", rescue, "_RESCUE", ("(w.state = 'dead')::int", "1")),
        _without("rescued as still published", rescue, "_RESCUE", "dispatched_at = NULL, "),
    ),
    tour.deadlines: (
        _without("claim after the deadline", ledger, "_CLAIM", "AND deadline_at > now()"),
        _without("expire counts nothing", rescue, "_EXPIRE", ("b.expired + n.expired", "b.expired")),
        _without("expire of what runs", rescue, "_EXPIRE",
                 ("state = 'queued'", "state IN ('queued', 'running')"),
                 ("finished_at = now(), error", "finished_at = now(), worker_id = NULL, error")),
        _without("requeue keeps the deadline", intervene, "_REQUEUE", ", deadline_at = now() + make_interval(secs => j.deadline_s)"),
    ),
    tour.cancels_and_requeues: (
        _without("settle ignores a cancel", ledger, "_SETTLE",
                 ("e.state = 'queued' AND j.cancel_requested", "false"), " AND NOT j.cancel_requested"),
        _without("cancel counts nothing", intervene, "_CANCEL", ("b.cancelled + n.cancelled", "b.cancelled")),
        _without("cancel of what has ended", intervene, "_CANCEL",
                 ("IN ('queued', 'running')", "IN ('queued', 'running', 'failed')"),
                 ("WHEN j.state = 'queued' THEN", "WHEN j.state <> 'running' THEN")),
        _without("requeue goes on in the old walk", intervene, "_REQUEUE", ", walk_fence = j.fence + 1"),
        _without("requeue keeps attempts", intervene, "_REQUEUE", "attempts = 0, "),
        _without("requeue keeps the cancel", intervene, "_REQUEUE", "cancel_requested = false, "),
        _without("requeue does not count back", intervene, "_REQUEUE", ("b.cancelled - n.cancelled", "b.cancelled")),
        _without("requeue leaves the batch finished", intervene, "_REQUEUE",
                 ("CASE b.state WHEN 'finished' THEN 'open' ELSE b.state END", "b.state")),
    ),
    tour.files: (
        _without("settle closes loading batches", ledger, "_SETTLE", "o.state = 'open' AND"),
        _without("close never finishes", submit, "CLOSE_BATCH",
                 ("THEN 'finished' ELSE 'open'", "THEN 'open' ELSE 'open'"),
                 ("THEN now()", "THEN CAST(NULL AS timestamptz)")),
        _without("close opens what is finished", submit, "CLOSE_BATCH", " AND state = 'loading'", ("THEN 'finished'", "THEN 'open'")),
        _without("rows for closed batches", submit, "_ADD_ROWS", "AND state = 'loading'"),
        _without("unusable rows are not counted", submit, "_ADD_ROWS", ", failed = batches.failed + n.failed"),
        _without("a cancelled file is never finished", intervene, "CLOSE_BATCH",
                 ("THEN 'finished' ELSE 'open'", "THEN 'open' ELSE 'open'"),
                 ("THEN now()", "THEN CAST(NULL AS timestamptz)")),
        _without("requeue of unusable rows", intervene, "_REQUEUEABLE", " AND r.request IS NOT NULL"),
    ),
    tour.poison: (
        _without("rescue gives nothing up", rescue, "_RESCUE", ("t.deaths >= :max_deaths", "t.deaths >= 100 * :max_deaths")),
        _without("requeue keeps deaths", intervene, "_REQUEUE", "deaths = 0, "),
        _without("all suspects at once", dispatch, "_SUSPECTS", "AND n <= CASE WHEN deaths = 2 THEN :suspects ELSE 1 END"),
        _without("no suspect ever", dispatch, "_SUSPECTS", ("WHERE due", "WHERE false AND due")),
    ),
}  # fmt: skip
