"""The ledger: batches, jobs, requests, results, provider calls, workers, keys. First of all; no older worker exists."""

from alembic import op

revision = "0001"
down_revision = None

SCHEMA = """
CREATE TABLE api_keys (
    id UUID NOT NULL,
    tenant TEXT DEFAULT 'default' NOT NULL,
    name TEXT NOT NULL,
    prefix TEXT NOT NULL,
    hash BYTEA NOT NULL,
    created_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
    last_used_at TIMESTAMP WITH TIME ZONE,
    revoked_at TIMESTAMP WITH TIME ZONE,
    CONSTRAINT pk_api_keys PRIMARY KEY (id),
    CONSTRAINT uq_api_keys_hash UNIQUE (hash)
);

CREATE TABLE batches (
    id UUID NOT NULL,
    tenant TEXT DEFAULT 'default' NOT NULL,
    name TEXT NOT NULL,
    state TEXT NOT NULL CONSTRAINT ck_batches_state CHECK (state IN ('loading','open','finished')),
    fingerprint TEXT NOT NULL,
    columns JSONB,
    fields JSONB,
    weight INTEGER DEFAULT '1' NOT NULL,
    total BIGINT DEFAULT '0' NOT NULL,
    succeeded BIGINT DEFAULT '0' NOT NULL,
    failed BIGINT DEFAULT '0' NOT NULL,
    cancelled BIGINT DEFAULT '0' NOT NULL,
    expired BIGINT DEFAULT '0' NOT NULL,
    created_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
    finished_at TIMESTAMP WITH TIME ZONE,
    CONSTRAINT pk_batches PRIMARY KEY (id)
);

CREATE UNIQUE INDEX uq_batches_tenant_name ON batches (tenant, name);

CREATE TABLE lanes (
    name TEXT NOT NULL,
    paused BOOLEAN DEFAULT false NOT NULL,
    CONSTRAINT pk_lanes PRIMARY KEY (name)
);

CREATE TABLE provider_calls (
    id UUID NOT NULL,
    job_id UUID NOT NULL,
    fence BIGINT NOT NULL,
    provider TEXT NOT NULL,
    model TEXT NOT NULL,
    opened_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
    started_at TIMESTAMP WITH TIME ZONE,
    ended_at TIMESTAMP WITH TIME ZONE,
    latency_ms INTEGER,
    outcome TEXT,
    http_status SMALLINT,
    error_code TEXT,
    input_tokens INTEGER,
    output_tokens INTEGER,
    cached_tokens INTEGER,
    reasoning_tokens INTEGER,
    billing TEXT DEFAULT 'unknown' NOT NULL CONSTRAINT ck_provider_calls_billing CHECK (billing IN ('billed','free','unknown')),
    cost_usd NUMERIC(20, 12),
    price_source TEXT,
    answer JSONB,
    CONSTRAINT pk_provider_calls PRIMARY KEY (id)
);

CREATE INDEX ix_provider_calls_job_id ON provider_calls (job_id);

CREATE INDEX ix_provider_calls_opened_at ON provider_calls (opened_at);

CREATE TABLE workers (
    id UUID NOT NULL,
    host TEXT NOT NULL,
    pid INTEGER NOT NULL,
    lanes TEXT NOT NULL,
    slots INTEGER NOT NULL,
    waiting UUID[] DEFAULT '{}' NOT NULL,
    state TEXT NOT NULL CONSTRAINT ck_workers_state CHECK (state IN ('live','draining','gone','dead')),
    started_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
    seen_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
    CONSTRAINT pk_workers PRIMARY KEY (id)
);

CREATE TABLE jobs (
    id UUID NOT NULL,
    tenant TEXT DEFAULT 'default' NOT NULL,
    idempotency_key TEXT,
    fingerprint TEXT,
    batch_id UUID,
    ordinal BIGINT,
    custom_id TEXT,
    chain TEXT NOT NULL,
    lane TEXT NOT NULL,
    state TEXT NOT NULL CONSTRAINT ck_jobs_state CHECK (state IN ('queued','running','succeeded','failed','cancelled','expired')),
    run_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
    deadline_at TIMESTAMP WITH TIME ZONE NOT NULL,
    deadline_s FLOAT DEFAULT '86400' NOT NULL,
    fence BIGINT DEFAULT '0' NOT NULL,
    walk_fence BIGINT DEFAULT '1' NOT NULL,
    attempts SMALLINT DEFAULT '0' NOT NULL,
    worker_id UUID,
    delivery_id UUID,
    dispatched_at TIMESTAMP WITH TIME ZONE,
    cancel_requested BOOLEAN DEFAULT false NOT NULL,
    error JSONB,
    metadata JSONB,
    created_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
    finished_at TIMESTAMP WITH TIME ZONE,
    CONSTRAINT pk_jobs PRIMARY KEY (id),
    CONSTRAINT ck_jobs_held_while_running CHECK ((state = 'running') = (worker_id IS NOT NULL)),
    CONSTRAINT ck_jobs_finished_when_ended CHECK ((state IN ('succeeded','failed','cancelled','expired')) = (finished_at IS NOT NULL)),
    CONSTRAINT fk_jobs_batch_id FOREIGN KEY(batch_id) REFERENCES batches (id) ON DELETE CASCADE
)
 WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.02, autovacuum_analyze_scale_factor = 0.02);

CREATE INDEX ix_jobs_deadline ON jobs (deadline_at) WHERE state = 'queued';

CREATE INDEX ix_jobs_published ON jobs (lane, dispatched_at) WHERE state = 'queued' AND dispatched_at IS NOT NULL;

CREATE INDEX ix_jobs_ready ON jobs (lane, batch_id, run_at, id) WHERE state = 'queued' AND dispatched_at IS NULL;

CREATE INDEX ix_jobs_running ON jobs (worker_id, lane) WHERE state = 'running';

CREATE UNIQUE INDEX uq_jobs_batch_id_ordinal ON jobs (batch_id, ordinal) WHERE batch_id IS NOT NULL;

CREATE UNIQUE INDEX uq_jobs_tenant_idempotency_key ON jobs (tenant, idempotency_key) WHERE idempotency_key IS NOT NULL;

CREATE TABLE job_requests (
    job_id UUID NOT NULL,
    request JSONB,
    row JSONB,
    CONSTRAINT pk_job_requests PRIMARY KEY (job_id),
    CONSTRAINT fk_job_requests_job_id FOREIGN KEY(job_id) REFERENCES jobs (id) ON DELETE CASCADE
);

CREATE TABLE results (
    job_id UUID NOT NULL,
    fence BIGINT NOT NULL,
    answer JSONB NOT NULL,
    CONSTRAINT pk_results PRIMARY KEY (job_id),
    CONSTRAINT fk_results_job_id FOREIGN KEY(job_id) REFERENCES jobs (id) ON DELETE CASCADE
);

INSERT INTO lanes (name) VALUES ('interactive'), ('bulk');
"""


def upgrade() -> None:
    op.execute(SCHEMA)
