"""The truth, as SQLAlchemy tables. Every index stands for the query named beside it.

Who writes what: `submit` inserts jobs, requests and batches; `ledger` alone moves a job's state; `keeper` keeps `workers`;
`dispatch` stamps deliveries. Times are the database's, except the two of a call that its worker measures.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Numeric,
    SmallInteger,
    Table,
    Text,
    Uuid,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)
_Time = DateTime(timezone=True)
_STATES = "'queued','running','succeeded','failed','cancelled','expired'"

lanes = Table(
    "lanes",
    metadata,
    Column("name", Text, primary_key=True),
    Column("paused", Boolean, nullable=False, server_default=text("false")),  # an operator's; dispatch skips it
)

batches = Table(
    "batches",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("tenant", Text, nullable=False, server_default="default"),
    Column("name", Text, nullable=False),
    # loading: rows still stream in, and a run that broke off may go on; open: complete; finished: every job ended
    Column("state", Text, CheckConstraint("state IN ('loading','open','finished')", name="state"), nullable=False),
    Column("fingerprint", Text, nullable=False),  # of template, chain and file name: a resumed file must be the same job
    Column("columns", JSONB),  # header of the tickets, in order; NULL for OpenAI batch lines
    Column("fields", JSONB),  # of the answers' schema, in order: further columns of the results
    Column("weight", Integer, nullable=False, server_default="1"),  # share of the bulk lane beside other batches
    Column("total", BigInteger, nullable=False, server_default="0"),
    Column("succeeded", BigInteger, nullable=False, server_default="0"),
    Column("degraded", BigInteger, nullable=False, server_default="0"),  # of the succeeded: with less than a full answer
    Column("failed", BigInteger, nullable=False, server_default="0"),
    Column("cancelled", BigInteger, nullable=False, server_default="0"),
    Column("expired", BigInteger, nullable=False, server_default="0"),
    Column("created_at", _Time, nullable=False, server_default=func.now()),
    Column("finished_at", _Time),
    Index("uq_batches_tenant_name", "tenant", "name", unique=True),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("tenant", Text, nullable=False, server_default="default"),
    Column("idempotency_key", Text),
    Column("fingerprint", Text),  # SHA-256 of what was submitted under the key: the same key must mean the same request
    Column("batch_id", Uuid, ForeignKey("batches.id", ondelete="CASCADE")),
    Column("ordinal", BigInteger),  # row of the batch's file, from 1: a resumed file inserts each row once
    Column("custom_id", Text),
    Column("chain", Text, nullable=False),
    Column("lane", Text, nullable=False),
    Column("state", Text, CheckConstraint(f"state IN ({_STATES})", name="state"), nullable=False),
    Column("run_at", _Time, nullable=False, server_default=func.now()),  # queued: not before
    Column("deadline_at", _Time, nullable=False),
    Column("deadline_s", Float, nullable=False, server_default="86400"),  # its full time, which a requeue gives anew
    Column("fence", BigInteger, nullable=False, server_default="0"),  # raised by each claim; guards every write
    Column("walk_fence", BigInteger, nullable=False, server_default="1"),  # calls from it on belong to the present walk of the chain
    Column("attempts", SmallInteger, nullable=False, server_default="0"),  # ended without an answer although a provider could be asked
    Column("deaths", SmallInteger, nullable=False, server_default="0"),  # workers that died while they held it
    Column("worker_id", Uuid),  # running: who holds it
    Column("delivery_id", Uuid),  # Celery message that carried it last; its task id
    Column("dispatched_at", _Time),  # queued: when it was published; NULL is ready to be
    Column("cancel_requested", Boolean, nullable=False, server_default=text("false")),
    Column("error", JSONB),  # failed, expired, parked: {"code", "message", "providers": [{"provider", "reason", ...}]}
    Column("metadata", JSONB),
    Column("created_at", _Time, nullable=False, server_default=func.now()),
    Column("finished_at", _Time),
    CheckConstraint("(state = 'running') = (worker_id IS NOT NULL)", name="held_while_running"),
    CheckConstraint(
        "(state IN ('succeeded','failed','cancelled','expired')) = (finished_at IS NOT NULL)", name="finished_when_ended"
    ),
    Index(  # submit
        "uq_jobs_tenant_idempotency_key", "tenant", "idempotency_key", unique=True,
        postgresql_where=text("idempotency_key IS NOT NULL"),
    ),
    Index("ix_jobs_tenant", "tenant", "id"),  # list
    Index("uq_jobs_batch_id_ordinal", "batch_id", "ordinal", unique=True, postgresql_where=text("batch_id IS NOT NULL")),  # submit
    Index(  # dispatch
        "ix_jobs_ready", "lane", "batch_id", "run_at", "id",
        postgresql_where=text("state = 'queued' AND dispatched_at IS NULL"),
    ),
    Index(  # window, dispatch TTL
        "ix_jobs_published", "lane", "dispatched_at", postgresql_where=text("state = 'queued' AND dispatched_at IS NOT NULL")
    ),
    Index("ix_jobs_running", "worker_id", "lane", postgresql_where=text("state = 'running'")),  # rescue, window
    Index("ix_jobs_suspects", "deaths", postgresql_where=text("deaths > 1 AND state IN ('queued', 'running')")),  # dispatch
    Index("ix_jobs_deadline", "deadline_at", postgresql_where=text("state = 'queued'")),  # expire
    postgresql_with={"fillfactor": "80", "autovacuum_vacuum_scale_factor": "0.02", "autovacuum_analyze_scale_factor": "0.02"},
)  # fmt: skip

job_requests = Table(
    "job_requests",
    metadata,
    Column("job_id", Uuid, ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("request", JSONB),  # ChatRequest; NULL where the row could not be used
    Column("row", JSONB),  # the ticket as it stood in the file: {column: value}
)

results = Table(
    "results",
    metadata,
    Column("job_id", Uuid, ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),  # the hard "never twice"
    Column("fence", BigInteger, nullable=False),
    Column("answer", JSONB, nullable=False),  # Answer
)

provider_calls = Table(
    "provider_calls",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("job_id", Uuid, nullable=False),  # no foreign key: the books outlive the jobs
    Column("fence", BigInteger, nullable=False),  # attempt that made it
    Column("provider", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("opened_at", _Time, nullable=False, server_default=func.now()),  # before the request left
    Column("started_at", _Time),  # worker's clock
    Column("ended_at", _Time),  # worker's clock; NULL is open
    Column("latency_ms", Integer),
    Column("outcome", Text),  # Signal; NULL is open
    Column("http_status", SmallInteger),
    Column("error_code", Text),
    Column("input_tokens", Integer),
    Column("output_tokens", Integer),
    Column("cached_tokens", Integer),
    Column("reasoning_tokens", Integer),
    Column("estimated", Boolean, nullable=False, server_default=text("false")),  # the provider counted no tokens, so we did
    Column("billing", Text, CheckConstraint("billing IN ('billed','free','unknown')", name="billing"), nullable=False,
           server_default="unknown"),
    Column("cost_usd", Numeric(20, 12)),  # NULL is not known, and counted as such
    Column("price_source", Text),
    Column("answer", JSONB),  # only of a call whose settle the fence refused: paid for, so the next attempt uses it
    Index("ix_provider_calls_job_id", "job_id"),  # timeline, claim
    Index("ix_provider_calls_opened_at", "opened_at"),  # costs
)  # fmt: skip

workers = Table(
    "workers",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("host", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("lanes", Text, nullable=False),
    Column("slots", Integer, nullable=False),  # bulk jobs it runs at once
    Column("waiting", ARRAY(Uuid), nullable=False, server_default="{}"),  # deliveries it fetched that wait for slots
    Column("state", Text, CheckConstraint("state IN ('live','draining','gone','dead')", name="state"), nullable=False),
    Column("started_at", _Time, nullable=False, server_default=func.now()),
    Column("seen_at", _Time, nullable=False, server_default=func.now()),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("tenant", Text, nullable=False, server_default="default"),
    Column("name", Text, nullable=False),
    Column("prefix", Text, nullable=False),  # what may be shown
    Column("hash", LargeBinary, nullable=False, unique=True),  # SHA-256 of the whole key
    Column("scopes", ARRAY(Text), nullable=False, server_default="{submit,read,operate}"),
    Column("rpm", Integer),  # requests a minute; NULL is not limited
    Column("created_at", _Time, nullable=False, server_default=func.now()),
    Column("last_used_at", _Time),
    Column("revoked_at", _Time),
)

files = Table(
    "files",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("purpose", Text, nullable=False),
    Column("filename", Text, nullable=False),
    Column("state", Text, CheckConstraint("state IN ('uploading','ready')", name="state"), nullable=False),
    Column("bytes", BigInteger, nullable=False, server_default="0"),
    Column("created_at", _Time, nullable=False, server_default=func.now()),
    Column("expires_at", _Time),
    Index("ix_files_tenant", "tenant", "id"),  # list
    Index("ix_files_expires_at", "expires_at", postgresql_where=text("expires_at IS NOT NULL")),  # purge
    Index("ix_files_uploading", "created_at", postgresql_where=text("state = 'uploading'")),  # purge
)

file_chunks = Table(
    "file_chunks",
    metadata,
    Column("file_id", Uuid, ForeignKey("files.id", ondelete="CASCADE"), primary_key=True),
    Column("seq", Integer, primary_key=True),
    Column("data", LargeBinary, nullable=False),
)

# What OpenAI's batches have besides ours.
file_batches = Table(
    "file_batches",
    metadata,
    Column("batch_id", Uuid, ForeignKey("batches.id", ondelete="CASCADE"), primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("state", Text, CheckConstraint(
        "state IN ('validating','in_progress','finalizing','completed','failed','expired','cancelling','cancelled')", name="state"),
        nullable=False),
    Column("input_file_id", Uuid, nullable=False),  # no foreign key: a file may be deleted before its batch
    Column("output_file_id", Uuid),
    Column("error_file_id", Uuid),
    Column("skips_bad_lines", Boolean, nullable=False, server_default=text("false")),
    Column("completion_window", Text, nullable=False),  # as it was asked for
    Column("output_expires_s", Float),  # how long its files are kept; NULL is until they are deleted
    Column("metadata", JSONB),
    Column("errors", JSONB),  # why it failed: [{"code", "line", "message", "param"}]
    Column("usage", JSONB),  # tokens of its answers, once it is over
    Column("fingerprint", Text, nullable=False),  # of what was asked for: what a repeated POST has in common with the first
    Column("idempotency_key", Text),
    Column("created_at", _Time, nullable=False, server_default=func.now()),
    Column("expires_at", _Time, nullable=False),
    Column("in_progress_at", _Time),
    Column("finalizing_at", _Time),
    Column("completed_at", _Time),
    Column("failed_at", _Time),
    Column("expired_at", _Time),
    Column("cancelling_at", _Time),
    Column("cancelled_at", _Time),
    Index("ix_file_batches_tenant", "tenant", "batch_id"),  # list
    Index("ix_file_batches_fingerprint", "tenant", "fingerprint"),  # create
    Index(  # create
        "uq_file_batches_tenant_idempotency_key", "tenant", "idempotency_key", unique=True,
        postgresql_where=text("idempotency_key IS NOT NULL"),
    ),
    Index("ix_file_batches_unfinished", "batch_id",  # the leader's look
          postgresql_where=text("state IN ('validating','in_progress','finalizing','cancelling')")),
)  # fmt: skip

webhooks = Table(
    "webhooks",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("url", Text, nullable=False),
    Column("events", ARRAY(Text), nullable=False),
    Column("secret", Text, nullable=False),  # signs what is sent, so it cannot be kept as a hash
    Column("created_at", _Time, nullable=False, server_default=func.now()),
    Column("failing_since", _Time),  # NULL: what was sent last has arrived
    Column("disabled_at", _Time),
    Index("ix_webhooks_tenant", "tenant", postgresql_where=text("disabled_at IS NULL")),  # settle
)

deliveries = Table(
    "deliveries",
    metadata,
    Column("id", Uuid, primary_key=True, server_default=text("gen_random_uuid()")),
    Column("webhook_id", Uuid, nullable=False),  # no foreign key: a webhook may be deleted while jobs end
    Column("event", Text, nullable=False),
    Column("subject_id", Uuid, nullable=False),  # of the job or the batch
    Column("created_at", _Time, nullable=False, server_default=func.now()),
    Column("run_at", _Time, nullable=False, server_default=func.now()),  # pending: not before
    Column("attempts", SmallInteger, nullable=False, server_default="0"),
    Column("state", Text, CheckConstraint("state IN ('pending','delivered','failed')", name="state"), nullable=False,
           server_default="pending"),
    Column("ended_at", _Time),
    Column("http_status", SmallInteger),  # of the last attempt
    Column("error_code", Text),
    Index("ix_deliveries_due", "webhook_id", "run_at", postgresql_where=text("state = 'pending'")),  # deliver
    Index("ix_deliveries_webhook_id", "webhook_id", "created_at", "id"),  # log
    Index("ix_deliveries_ended_at", "ended_at", postgresql_where=text("ended_at IS NOT NULL")),  # purge
)  # fmt: skip
