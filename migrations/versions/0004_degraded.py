"""Counts degraded answers of a batch apart. An older worker goes on as before: what it settles as degraded is not counted as such."""

from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.execute("ALTER TABLE batches ADD COLUMN degraded BIGINT NOT NULL DEFAULT 0")


def downgrade() -> None:
    op.execute("ALTER TABLE batches DROP COLUMN degraded")
