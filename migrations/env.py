"""Runs the migrations on one connection, under an advisory lock, so that many processes may start at once."""

from alembic import context
from sqlalchemy import create_engine, text

from worker.tables import metadata

LOCK = 0x6261636B  # "back"


def run() -> None:
    engine = create_engine(context.config.attributes["url"], connect_args={"connect_timeout": 5})
    with engine.connect() as connection:
        connection.execute(text("SELECT pg_advisory_lock(:lock)"), {"lock": LOCK})
        connection.commit()
        try:
            context.configure(connection=connection, target_metadata=metadata)
            with context.begin_transaction():
                context.run_migrations()
            connection.commit()
        finally:
            connection.rollback()
            connection.execute(text("SELECT pg_advisory_unlock(:lock)"), {"lock": LOCK})
            connection.commit()
    engine.dispose()


run()
