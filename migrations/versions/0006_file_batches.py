"""Keeps what OpenAI's batches have besides Backstop's own. Older processes do not know of them, and load none."""

from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.execute("""
    CREATE TABLE file_batches (
        batch_id UUID NOT NULL CONSTRAINT pk_file_batches PRIMARY KEY
            CONSTRAINT fk_file_batches_batch_id REFERENCES batches (id) ON DELETE CASCADE,
        tenant TEXT NOT NULL,
        state TEXT NOT NULL CONSTRAINT ck_file_batches_state CHECK (
            state IN ('validating','in_progress','finalizing','completed','failed','expired','cancelling','cancelled')),
        input_file_id UUID NOT NULL,
        output_file_id UUID,
        error_file_id UUID,
        skips_bad_lines BOOLEAN NOT NULL DEFAULT false,
        completion_window TEXT NOT NULL,
        output_expires_s DOUBLE PRECISION,
        metadata JSONB,
        errors JSONB,
        usage JSONB,
        fingerprint TEXT NOT NULL,
        idempotency_key TEXT,
        created_at TIMESTAMPTZ NOT NULL DEFAULT now(),
        expires_at TIMESTAMPTZ NOT NULL,
        in_progress_at TIMESTAMPTZ,
        finalizing_at TIMESTAMPTZ,
        completed_at TIMESTAMPTZ,
        failed_at TIMESTAMPTZ,
        expired_at TIMESTAMPTZ,
        cancelling_at TIMESTAMPTZ,
        cancelled_at TIMESTAMPTZ
    )""")
    op.execute("CREATE INDEX ix_file_batches_tenant ON file_batches (tenant, batch_id)")
    op.execute("CREATE INDEX ix_file_batches_fingerprint ON file_batches (tenant, fingerprint)")
    op.execute("""
    CREATE UNIQUE INDEX uq_file_batches_tenant_idempotency_key ON file_batches (tenant, idempotency_key)
        WHERE idempotency_key IS NOT NULL""")
    op.execute("""
    CREATE INDEX ix_file_batches_unfinished ON file_batches (batch_id)
        WHERE state IN ('validating','in_progress','finalizing','cancelling')""")


def downgrade() -> None:
    op.execute("DROP TABLE file_batches")
