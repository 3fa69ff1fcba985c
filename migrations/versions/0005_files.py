"""Keeps uploaded and written files, in pieces. Older processes do not know of them."""

from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.execute("""
    CREATE TABLE files (
        id UUID NOT NULL CONSTRAINT pk_files PRIMARY KEY,
        tenant TEXT NOT NULL,
        purpose TEXT NOT NULL,
        filename TEXT NOT NULL,
        state TEXT NOT NULL CONSTRAINT ck_files_state CHECK (state IN ('uploading','ready')),
        bytes BIGINT NOT NULL DEFAULT 0,
        created_at TIMESTAMPTZ NOT NULL DEFAULT now(),
        expires_at TIMESTAMPTZ
    )""")
    op.execute("CREATE INDEX ix_files_tenant ON files (tenant, id)")
    op.execute("CREATE INDEX ix_files_expires_at ON files (expires_at) WHERE expires_at IS NOT NULL")
    op.execute("CREATE INDEX ix_files_uploading ON files (created_at) WHERE state = 'uploading'")
    op.execute("""
    CREATE TABLE file_chunks (
        file_id UUID NOT NULL CONSTRAINT fk_file_chunks_file_id REFERENCES files (id) ON DELETE CASCADE,
        seq INTEGER NOT NULL,
        data BYTEA NOT NULL,
        CONSTRAINT pk_file_chunks PRIMARY KEY (file_id, seq)
    )""")
    op.execute("ALTER TABLE file_chunks ALTER COLUMN data SET STORAGE EXTERNAL")  # substr of a piece, without unpacking it first


def downgrade() -> None:
    op.execute("DROP TABLE file_chunks")
    op.execute("DROP TABLE files")
