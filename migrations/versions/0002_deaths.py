"""Counts the workers that died over a job. An older worker goes on as before: it charges such a death as three attempts."""

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.execute("ALTER TABLE jobs ADD COLUMN deaths SMALLINT NOT NULL DEFAULT 0")
    op.execute("CREATE INDEX ix_jobs_suspects ON jobs (deaths) WHERE deaths > 1 AND state IN ('queued', 'running')")
