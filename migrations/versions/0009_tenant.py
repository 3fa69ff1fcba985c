"""The jobs of one tenant, newest first, without a look at everybody else's."""

from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    op.create_index("ix_jobs_tenant", "jobs", ["tenant", "id"])


def downgrade() -> None:
    op.drop_index("ix_jobs_tenant", "jobs")
