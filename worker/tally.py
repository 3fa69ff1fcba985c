"""What the end of jobs means for others: it is counted in their batches, and whoever asked for it is told."""

from __future__ import annotations

from sqlalchemy import text

# Of the CTE `news(tenant, event, subject_id)`. Where no webhook exists the news are not even looked at. Nothing refers to
# `webhooks` by a foreign key: one that is deleted at this moment must not undo the end of a job.
TOLD = """
told AS (
    INSERT INTO deliveries (webhook_id, event, subject_id)
    SELECT w.id, n.event, n.subject_id FROM news n JOIN webhooks w ON w.tenant = n.tenant AND n.event = ANY(w.events)
    WHERE w.disabled_at IS NULL AND EXISTS (SELECT FROM webhooks WHERE disabled_at IS NULL)
)"""

# Shared tail of all statements whose CTE `moved(id, batch_id, state, degraded)` ends jobs; those it calls queued have
# not ended. A job of a batch is no news, its batch is.
COUNTED = f"""
counted AS (
    UPDATE batches b SET
        succeeded = b.succeeded + n.succeeded, degraded = b.degraded + n.degraded, failed = b.failed + n.failed,
        cancelled = b.cancelled + n.cancelled, expired = b.expired + n.expired,
        state = CASE WHEN n.closes THEN 'finished' ELSE b.state END,
        finished_at = CASE WHEN n.closes THEN now() ELSE b.finished_at END
    FROM (
        SELECT o.id, m.*, o.state = 'open' AND
            o.succeeded + o.failed + o.cancelled + o.expired + m.ended >= o.total AS closes
        FROM (
            SELECT batch_id, count(*) FILTER (WHERE state <> 'queued') AS ended,
                count(*) FILTER (WHERE state = 'succeeded') AS succeeded, count(*) FILTER (WHERE degraded) AS degraded,
                count(*) FILTER (WHERE state = 'failed') AS failed,
                count(*) FILTER (WHERE state = 'cancelled') AS cancelled, count(*) FILTER (WHERE state = 'expired') AS expired
            FROM moved WHERE batch_id IS NOT NULL GROUP BY batch_id
        ) m JOIN batches o ON o.id = m.batch_id WHERE m.ended > 0 ORDER BY o.id FOR NO KEY UPDATE OF o
    ) n WHERE b.id = n.id RETURNING b.id, b.tenant, n.closes
), news AS (
    SELECT j.tenant, 'job.' || m.state AS event, m.id AS subject_id FROM moved m JOIN jobs j ON j.id = m.id
    WHERE m.batch_id IS NULL
    UNION ALL
    SELECT tenant, 'batch.finished', id FROM counted WHERE closes
), {TOLD}"""


# Takes no more rows, and is finished once all of its jobs have ended.
CLOSE_BATCH = text(f"""
WITH closed AS (
    UPDATE batches SET
        state = CASE WHEN succeeded + failed + cancelled + expired >= total THEN 'finished' ELSE 'open' END,
        finished_at = CASE WHEN succeeded + failed + cancelled + expired >= total THEN now() END
    WHERE id = :id AND state = 'loading' RETURNING id, tenant, state
), news AS (
    SELECT tenant, 'batch.finished' AS event, id AS subject_id FROM closed WHERE state = 'finished'
), {TOLD}
SELECT id FROM closed
""")
