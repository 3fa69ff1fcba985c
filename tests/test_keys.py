"""API keys against a real Postgres."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from worker import database, keys
from worker.errors import NotFound, UsageError


def run(database_url: str, story: Callable[[AsyncEngine], Awaitable[None]]) -> None:
    async def told() -> None:
        db = database.engine(database_url)
        try:
            await story(db)
        finally:
            await db.dispose()

    asyncio.run(told())


def test_a_new_key_names_its_tenant_and_stands_nowhere_in_the_database(database_url):
    async def story(db: AsyncEngine) -> None:
        new = await keys.create(db, name="ci", tenant="acme")
        caller = await keys.verify(db, new.secret)
        assert caller is not None
        assert (caller.tenant, caller.name, caller.key_id) == ("acme", "ci", new.key.id)
        async with db.connect() as connection:
            kept = (await connection.execute(text("SELECT api_keys::text FROM api_keys"))).scalar_one()
        assert new.secret not in kept
        assert new.secret not in repr(new)
        assert new.secret.startswith(keys.MARK)
        assert len(new.secret) == len(keys.MARK) + 43
        assert new.secret.startswith(new.key.prefix)

    run(database_url, story)


def test_a_revoked_key_is_refused_at_once_and_others_go_on(database_url):
    async def story(db: AsyncEngine) -> None:
        lost, kept = await keys.create(db, name="lost"), await keys.create(db, name="kept")
        assert await keys.verify(db, lost.secret)
        revoked = await keys.revoke(db, "lost")
        assert revoked.revoked_at is not None
        assert await keys.verify(db, lost.secret) is None
        assert await keys.verify(db, kept.secret)

    run(database_url, story)


def test_no_other_key_is_taken_for_one(database_url):
    async def story(db: AsyncEngine) -> None:
        secret = (await keys.create(db, name="ci")).secret
        for other in (secret.upper(), secret[:-1], secret + "a", "", "\x00é", keys.MARK):
            assert await keys.verify(db, other) is None

    run(database_url, story)


def test_revoking_goes_by_id_prefix_or_name_and_refuses_to_guess(database_url):
    async def story(db: AsyncEngine) -> None:
        first, second = await keys.create(db, name="ci"), await keys.create(db, name="ci")
        with pytest.raises(UsageError, match="2 keys are called 'ci'"):
            await keys.revoke(db, "ci")
        await keys.revoke(db, str(first.key.id))
        await keys.revoke(db, "ci")  # one is left
        with pytest.raises(NotFound, match="no working key"):
            await keys.revoke(db, second.key.prefix)
        assert [key.id for key in await keys.list(db)] == [second.key.id, first.key.id]

    run(database_url, story)


def test_use_is_noted_once_a_minute(database_url):
    async def story(db: AsyncEngine) -> None:
        new = await keys.create(db, name="ci")
        await keys.verify(db, new.secret)
        (used,) = await keys.list(db)
        await keys.verify(db, new.secret)
        (again,) = await keys.list(db)
        assert used.last_used_at is not None
        assert again.last_used_at == used.last_used_at

    run(database_url, story)


def test_a_name_that_cannot_be_shown_is_refused(database_url):
    async def story(db: AsyncEngine) -> None:
        for name in ("", " ", "a\nb", "x" * 101):
            with pytest.raises(UsageError, match="name of a key"):
                await keys.create(db, name=name)

    run(database_url, story)
