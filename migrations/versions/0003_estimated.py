"""Marks calls whose tokens were estimated. An older worker goes on as before: it estimates nothing, and marks nothing."""

from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.execute("ALTER TABLE provider_calls ADD COLUMN estimated BOOLEAN NOT NULL DEFAULT false")


def downgrade() -> None:
    op.execute("ALTER TABLE provider_calls DROP COLUMN estimated")
