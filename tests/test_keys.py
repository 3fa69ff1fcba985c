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


def test_a_key_holds_the_scopes_and_the_limit_it_was_made_with_and_all_without_a_word(database_url):
    async def story(db: AsyncEngine) -> None:
        narrow = await keys.create(db, name="ci", scopes=[keys.Scope.READ, keys.Scope.SUBMIT], rpm=60)
        wide = await keys.create(db, name="wide")
        assert (narrow.key.scopes, narrow.key.rpm) == (["submit", "read"], 60)
        caller = await keys.verify(db, narrow.secret)
        assert caller is not None
        assert (caller.scopes, caller.rpm) == ({keys.Scope.READ, keys.Scope.SUBMIT}, 60)
        caller = await keys.verify(db, wide.secret)
        assert caller is not None
        assert (caller.scopes, caller.rpm) == (set(keys.Scope), None)

    run(database_url, story)


def test_a_key_that_may_do_nothing_or_has_no_possible_limit_is_not_made(database_url):
    async def story(db: AsyncEngine) -> None:
        with pytest.raises(UsageError, match="scopes of a key"):
            await keys.create(db, name="ci", scopes=[])
        for rpm in (0, -1, keys.MOST_RPM + 1):
            with pytest.raises(UsageError, match="rpm of a key"):
                await keys.create(db, name="ci", rpm=rpm)
        assert await keys.list(db) == []

    run(database_url, story)


def test_a_scope_of_a_newer_version_is_shown_and_allows_nothing(database_url):
    async def story(db: AsyncEngine) -> None:
        new = await keys.create(db, name="ci", scopes=[keys.Scope.READ])
        async with db.connect() as connection:
            await connection.execute(text("UPDATE api_keys SET scopes = '{read,fly}'"))
        caller = await keys.verify(db, new.secret)
        assert caller is not None
        assert caller.scopes == {keys.Scope.READ}
        assert [key.scopes for key in await keys.list(db)] == [["read", "fly"]]

    run(database_url, story)


def test_noting_the_use_of_a_key_waits_for_nobody(database_url):
    async def story(db: AsyncEngine) -> None:
        new = await keys.create(db, name="ci")
        async with db.connect() as other:
            await other.execution_options(isolation_level="READ COMMITTED")
            async with other.begin():
                await other.execute(text("SELECT FROM api_keys FOR UPDATE"))
                async with asyncio.timeout(20):
                    assert await keys.verify(db, new.secret)
        assert [key.last_used_at for key in await keys.list(db)] == [None]

    run(database_url, story)


def test_keys_that_are_asked_for_together_are_each_answered_as_themselves(database_url):
    async def story(db: AsyncEngine) -> None:
        made = {tenant: (await keys.create(db, name=tenant, tenant=tenant)).secret for tenant in ("a", "b", "c", "lost")}
        await keys.revoke(db, "lost")
        asked = [made["b"], keys.MARK + "x", made["a"], made["lost"], "nonsense", made["b"], made["c"]]
        callers = await keys.verify_all(db, asked)
        assert [caller and caller.tenant for caller in callers] == ["b", None, "a", None, None, "b", "c"]

    run(database_url, story)


def test_a_tenant_that_cannot_be_shown_is_refused(database_url):
    async def story(db: AsyncEngine) -> None:
        for tenant in ("", " ", "a\nb", "x" * 101):
            with pytest.raises(UsageError, match="tenant of a key"):
                await keys.create(db, name="ci", tenant=tenant)

    run(database_url, story)
