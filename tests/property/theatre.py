"""Where the machine plays: one loop and one set of connections for all examples."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
from psycopg.rows import namedtuple_row

from worker import database
from worker.wiring import redis_client


class Theatre:
    """`eyes` looks on, past the product's own way to Postgres."""

    def __init__(self, database_url, redis_url):
        self.runner = asyncio.Runner()
        self.db = database.engine(database_url)
        self.eyes = psycopg.connect(database_url, autocommit=True, row_factory=namedtuple_row)
        self.redis = redis_client(redis_url)
        self.leaders = [self.run(self.db.connect().__aenter__()) for _ in range(2)]

    def run(self, awaitable):
        async def within():
            return await awaitable

        return self.runner.run(within())

    def rows(self, sql, **values):
        cursor = self.eyes.execute(sql, values)
        return cursor.fetchall() if cursor.description else []

    def close(self):
        for leader in self.leaders:
            self.run(leader.close())
        self.eyes.close()
        self.run(self.redis.aclose())
        self.run(self.db.dispose())
        self.runner.close()


@contextmanager
def a_theatre(database_url, redis_url) -> Iterator[Theatre]:
    theatre = Theatre(database_url, redis_url)
    try:
        yield theatre
    finally:
        theatre.close()
