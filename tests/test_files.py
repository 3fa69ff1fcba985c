"""Files in pieces: whole or not there, and gone when their time is over."""

import asyncio
import contextlib

import pytest
from stage import blocked, play, rows, transaction

from worker import files
from worker.errors import NotFound, UsageError
from worker.files import PIECE_BYTES, from_wire, one, pieces, purge, uploading, wire_id
from worker.job import new_id


async def a_file(db, content=b"x", *, tenant="default", expires_s=None):
    async with uploading(db, tenant) as upload:
        await upload.write(content)
        return await upload.finish(purpose="batch", filename="a.jsonl", expires_s=expires_s)


async def content(db, file):
    return b"".join([piece async for piece in pieces(db, file)])


def test_a_file_is_invisible_until_it_is_finished(database_url):
    async def story(db):
        async with uploading(db, "default") as upload:
            await upload.write(bytes(2 * PIECE_BYTES))
            assert len(await rows(db, "SELECT FROM file_chunks")) == 2
            assert await one(db, upload.id, "default") is None
            assert await files.listed(db, "default", limit=10) == []
            assert not await files.delete(db, upload.id, "default")
            file = await upload.finish(purpose="batch", filename="a.jsonl", expires_s=None)
        assert await one(db, upload.id, "default") == file
        assert await content(db, file) == bytes(2 * PIECE_BYTES)

    play(database_url, story)


@pytest.mark.parametrize("trouble", [RuntimeError, asyncio.CancelledError])
def test_what_was_not_finished_leaves_nothing_behind(database_url, trouble):
    async def story(db):
        with contextlib.suppress(trouble):
            async with uploading(db, "default") as upload:
                await upload.write(bytes(PIECE_BYTES + 1))
                raise trouble
        assert await rows(db, "SELECT FROM files") == await rows(db, "SELECT FROM file_chunks") == []

    play(database_url, story)


def test_bytes_written_in_any_portions_are_stored_in_pieces_of_one_size(database_url):
    async def story(db):
        whole = bytes(range(256)) * (3 * PIECE_BYTES // 256) + b"end"
        async with uploading(db, "default") as upload:
            for start in range(0, len(whole), 77_777):
                await upload.write(whole[start : start + 77_777])
            file = await upload.finish(purpose="batch", filename="a", expires_s=None)
        sizes = await rows(db, "SELECT length(data) FROM file_chunks ORDER BY seq")
        assert [size for (size,) in sizes] == [PIECE_BYTES] * 3 + [3]
        assert file.bytes == upload.bytes == len(whole)
        assert await content(db, file) == whole

    play(database_url, story)


def test_an_abandoned_upload_is_purged_and_cannot_go_on(database_url):
    async def story(db):
        async with uploading(db, "default") as fresh, uploading(db, "default") as upload:
            await upload.write(bytes(PIECE_BYTES))
            assert await purge(db) == 0
            await rows(db, "UPDATE files SET created_at = now() - interval '6 hours 1 second' WHERE id = :id", id=upload.id)
            assert await purge(db) == 1
            with pytest.raises(UsageError, match="6 hours"):
                await upload.write(bytes(PIECE_BYTES))
            with pytest.raises(UsageError, match="6 hours"):
                await upload.finish(purpose="batch", filename="a", expires_s=None)
            assert [row.id for row in await rows(db, "SELECT id FROM files")] == [fresh.id]
        assert await rows(db, "SELECT FROM file_chunks") == []

    play(database_url, story)


@pytest.mark.parametrize("size", [0, PIECE_BYTES])
def test_an_abandoned_upload_of_which_nothing_is_left_to_store_cannot_be_finished(database_url, size):
    async def story(db):
        async with uploading(db, "default") as upload:
            await upload.write(bytes(size))
            await rows(db, "DELETE FROM files")
            with pytest.raises(UsageError, match="6 hours"):
                await upload.finish(purpose="batch", filename="a", expires_s=None)

    play(database_url, story)


def test_files_past_their_time_are_purged_and_others_kept(database_url):
    async def story(db):
        kept = [await a_file(db), await a_file(db, expires_s=3600)]
        gone = await a_file(db, expires_s=3600)
        await rows(db, "UPDATE files SET expires_at = now() WHERE id = :id", id=gone.id)
        assert await one(db, gone.id, "default") is None
        assert (await purge(db), await purge(db)) == (1, 0)
        assert await files.listed(db, "default", limit=10) == kept[::-1]

    play(database_url, story)


def test_a_purge_takes_so_many_at_most_and_the_next_one_the_others(database_url, monkeypatch):
    monkeypatch.setattr(files, "_PURGED", 2)

    async def story(db):
        for _ in range(3):
            await a_file(db, expires_s=0)
        assert [await purge(db) for _ in range(3)] == [2, 1, 0]

    play(database_url, story)


def test_two_purges_at_once_are_harmless(database_url):
    async def story(db):
        file = await a_file(db, expires_s=0)
        async with transaction(db) as holder:
            await rows(holder, "SELECT FROM files WHERE id = :id FOR UPDATE", id=file.id)
            both = [asyncio.create_task(purge(db)) for _ in range(2)]
            await blocked(db, 2)
        assert sorted(await asyncio.gather(*both)) == [0, 1]

    play(database_url, story)


def test_reading_a_file_that_is_deleted_meanwhile_says_so(database_url):
    async def story(db):
        file = await a_file(db, bytes(2 * PIECE_BYTES))
        reading = pieces(db, file)
        await anext(reading)
        assert await files.delete(db, file.id, "default")
        with pytest.raises(NotFound, match=f"{file.wire_id} was deleted"):
            await anext(reading)
        assert not await files.delete(db, file.id, "default")

    play(database_url, story)


def test_a_file_is_its_tenants_alone(database_url):
    async def story(db):
        file = await a_file(db)
        assert await one(db, file.id, "b") is None
        assert not await files.delete(db, file.id, "b")
        assert await files.listed(db, "b", limit=10) == []
        assert await one(db, file.id, "default") == file

    play(database_url, story)


def test_ids_on_the_wire_are_read_back_and_nothing_else_is():
    file_id = new_id()
    assert from_wire(wire_id(file_id)) == file_id
    hex_ = file_id.hex
    for other in ("", "file-", hex_, f"batch_{hex_}", f"file-{hex_}0", f"file-{hex_.upper()}", f"file-{hex_}\n", f"file-{file_id}"):
        assert from_wire(other) is None
