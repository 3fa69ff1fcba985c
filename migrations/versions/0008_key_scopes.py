"""Bounds what a key may do, and how often. An older API does not look: upgrade all of them before keys with less are handed out."""

from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.execute("ALTER TABLE api_keys ADD COLUMN scopes TEXT[] NOT NULL DEFAULT '{submit,read,operate}', ADD COLUMN rpm INTEGER")


def downgrade() -> None:
    op.execute("ALTER TABLE api_keys DROP COLUMN scopes, DROP COLUMN rpm")
