"""Tells other programs when jobs and batches end. What an older worker ends is told to nobody."""

from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.execute("""
    CREATE TABLE webhooks (
        id UUID NOT NULL CONSTRAINT pk_webhooks PRIMARY KEY,
        tenant TEXT NOT NULL,
        url TEXT NOT NULL,
        events TEXT[] NOT NULL,
        secret TEXT NOT NULL,
        created_at TIMESTAMPTZ NOT NULL DEFAULT now(),
        failing_since TIMESTAMPTZ,
        disabled_at TIMESTAMPTZ
    )""")
    op.execute("CREATE INDEX ix_webhooks_tenant ON webhooks (tenant) WHERE disabled_at IS NULL")
    op.execute("""
    CREATE TABLE deliveries (
        id UUID NOT NULL DEFAULT gen_random_uuid() CONSTRAINT pk_deliveries PRIMARY KEY,
        webhook_id UUID NOT NULL,
        event TEXT NOT NULL,
        subject_id UUID NOT NULL,
        created_at TIMESTAMPTZ NOT NULL DEFAULT now(),
        run_at TIMESTAMPTZ NOT NULL DEFAULT now(),
        attempts SMALLINT NOT NULL DEFAULT 0,
        state TEXT NOT NULL DEFAULT 'pending' CONSTRAINT ck_deliveries_state CHECK (state IN ('pending','delivered','failed')),
        ended_at TIMESTAMPTZ,
        http_status SMALLINT,
        error_code TEXT
    )""")
    op.execute("CREATE INDEX ix_deliveries_due ON deliveries (webhook_id, run_at) WHERE state = 'pending'")
    op.execute("CREATE INDEX ix_deliveries_webhook_id ON deliveries (webhook_id, created_at, id)")
    op.execute("CREATE INDEX ix_deliveries_ended_at ON deliveries (ended_at) WHERE ended_at IS NOT NULL")


def downgrade() -> None:
    op.execute("DROP TABLE deliveries")
    op.execute("DROP TABLE webhooks")
