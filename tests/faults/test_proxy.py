"""The proxy before an echo server: in every mode clients meet what a real network would do to them."""

import asyncio
from contextlib import asynccontextmanager, suppress

import pytest
from proxy import Proxy

SOON_S = 20  # never waited out by a test that passes
LIMIT = 2**21
NEVER_S = 0.1  # long enough for a loopback to answer


class Echo:
    """Answers each line by itself, and remembers it. What is LONG it has done when its client has nothing more to say."""

    def __init__(self):
        self.heard = []
        self.changed = asyncio.Event()
        self.writers = set()

    async def serve(self, reader, writer):
        self.writers.add(writer)
        try:
            with suppress(ConnectionError):
                while line := await reader.readline():
                    self.heard.append(line)
                    self.changed.set()
                    writer.write(line)
                    if line == b"LONG\n":
                        assert await reader.read() == b""
                        self.heard.append(b"done\n")
        finally:
            writer.close()

    async def until_heard(self, line):
        while line not in self.heard:
            await self.changed.wait()
            self.changed.clear()


@asynccontextmanager
async def an_echo_behind_a_proxy():
    echo = Echo()
    server = await asyncio.start_server(echo.serve, "127.0.0.1", 0, limit=LIMIT)
    try:
        async with Proxy(server.sockets[0].getsockname()[1]) as proxy:
            yield echo, proxy
    finally:
        server.close()
        for writer in echo.writers:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()


def meet(story):
    async def inside():
        async with asyncio.timeout(SOON_S), an_echo_behind_a_proxy() as (echo, proxy):
            await story(echo, proxy)

    asyncio.run(inside())


class Client:
    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer

    @classmethod
    async def of(cls, proxy):
        return cls(*await asyncio.open_connection("127.0.0.1", proxy.port, limit=LIMIT))

    def say(self, line):
        self.writer.write(line)

    async def hear(self):
        return await self.reader.readline()

    async def ask(self, line):
        self.say(line)
        return await self.hear()

    async def hears_nothing(self):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(NEVER_S):
                await self.reader.readline()

    async def is_cut(self):
        """Reset or at its end, and nothing whole came before."""
        with suppress(ConnectionError):
            assert b"\n" not in await self.hear()

    def leave(self):
        self.writer.close()


@asynccontextmanager
async def a_client(proxy):
    client = await Client.of(proxy)
    try:
        yield client
    finally:
        client.leave()
        with suppress(ConnectionError):
            await client.writer.wait_closed()


def test_what_is_said_arrives_and_so_does_the_answer():
    async def story(echo, proxy):
        async with a_client(proxy) as client:
            assert await client.ask(b"hello\n") == b"hello\n"
            big = b"x" * 1_000_000 + b"\n"
            assert await client.ask(big) == big

    meet(story)


def test_a_client_that_leaves_is_seen_to_leave_by_the_server():
    async def story(echo, proxy):
        async with a_client(proxy) as client:
            await client.ask(b"hello\n")
        (writer,) = echo.writers
        await writer.wait_closed()
        assert proxy.connections == set()

    meet(story)


def test_a_server_that_leaves_is_seen_to_leave_by_the_client():
    async def story(echo, proxy):
        async with a_client(proxy) as client:
            await client.ask(b"hello\n")
            for writer in echo.writers:
                writer.close()
            assert await client.hear() == b""

    meet(story)


def test_while_it_refuses_open_connections_end_and_new_ones_are_refused_and_the_port_stays():
    async def story(_, proxy):
        async with a_client(proxy) as client:
            await client.ask(b"hello\n")
            port = proxy.port
            proxy.refuse()
            await client.is_cut()
            for _ in range(3):
                with pytest.raises(ConnectionRefusedError):
                    await Client.of(proxy)
            await proxy.thaw()
            assert proxy.port == port
        async with a_client(proxy) as again:
            assert await again.ask(b"again\n") == b"again\n"

    meet(story)


def test_a_reset_meets_every_open_connection_at_both_ends_and_no_later_one():
    async def story(echo, proxy):
        async with a_client(proxy) as one, a_client(proxy) as two:
            await one.ask(b"one\n")
            await two.ask(b"two\n")
            proxy.reset()
            for client in (one, two):
                with pytest.raises(ConnectionResetError):
                    await client.hear()
            for writer in list(echo.writers):
                with suppress(ConnectionError):
                    await writer.wait_closed()
            async with a_client(proxy) as later:
                assert await later.ask(b"later\n") == b"later\n"

    meet(story)


def test_in_a_blackhole_nothing_arrives_and_all_of_it_does_when_it_is_gone():
    async def story(echo, proxy):
        async with a_client(proxy) as old:
            await old.ask(b"before\n")
            proxy.blackhole()
            async with a_client(proxy) as new:
                old.say(b"old\n")
                new.say(b"new\n")
                await old.hears_nothing()
                await new.hears_nothing()
                assert echo.heard == [b"before\n"]
                await proxy.thaw()
                assert (await old.hear(), await new.hear()) == (b"old\n", b"new\n")

    meet(story)


def test_who_left_during_a_blackhole_is_gone_when_it_ends():
    async def story(echo, proxy):
        async with a_client(proxy) as client:
            await client.ask(b"hello\n")
            proxy.blackhole()
        (writer,) = echo.writers
        assert not writer.is_closing()
        await proxy.thaw()
        await writer.wait_closed()

    meet(story)


def test_with_deaf_clients_requests_arrive_and_replies_wait():
    async def story(echo, proxy):
        async with a_client(proxy) as client:
            proxy.deafen()
            client.say(b"obeyed\n")
            await echo.until_heard(b"obeyed\n")
            await client.hears_nothing()
            await proxy.thaw()
            assert await client.hear() == b"obeyed\n"

    meet(story)


def test_a_reply_that_waited_is_lost_with_its_connection():
    async def story(echo, proxy):
        async with a_client(proxy) as client:
            proxy.deafen()
            client.say(b"obeyed\n")
            await echo.until_heard(b"obeyed\n")
            proxy.reset()
            await proxy.thaw()
            await client.is_cut()

    meet(story)


def test_delayed_pieces_come_late_and_in_order():
    async def story(_, proxy):
        loop = asyncio.get_running_loop()
        async with a_client(proxy) as client:
            proxy.delay(0.05)
            began_s = loop.time()
            for number in range(5):
                client.say(b"%d\n" % number)
                await asyncio.sleep(0)
            assert [await client.hear() for _ in range(5)] == [b"%d\n" % number for number in range(5)]
            assert loop.time() - began_s >= 0.1  # there and back

    meet(story)


def test_a_connection_is_cut_in_the_middle_of_the_reply_that_is_too_long():
    async def story(echo, proxy):
        async with a_client(proxy) as client:
            await client.ask(b"before\n")
            proxy.cut_after(10)
            assert await client.ask(b"short\n") == b"short\n"
            client.say(b"too long\n")
            await client.is_cut()
            assert b"too long\n" in echo.heard
        async with a_client(proxy) as other:
            assert await other.ask(b"short\n") == b"short\n"

    meet(story)


def test_the_named_request_is_obeyed_and_its_reply_is_lost_once():
    async def story(echo, proxy):
        async with a_client(proxy) as bystander, a_client(proxy) as client:
            await bystander.ask(b"hello\n")
            lost = proxy.lose_reply(b"COMMIT")
            assert await client.ask(b"BEGIN\n") == b"BEGIN\n"
            assert not lost.is_set()
            client.say(b"COMMIT 1\n")
            with pytest.raises(ConnectionResetError):
                await client.hear()
            await lost.wait()
            assert echo.heard[-1] == b"COMMIT 1\n"
            assert await bystander.ask(b"COMMIT 2\n") == b"COMMIT 2\n"

    meet(story)


def test_a_request_whose_reply_is_lost_is_obeyed_to_its_end_although_the_reply_has_begun():
    async def story(echo, proxy):
        async with a_client(proxy) as client:
            lost = proxy.lose_reply(b"LONG")
            client.say(b"LONG\n")
            await lost.wait()
            assert echo.heard == [b"LONG\n", b"done\n"]
            with pytest.raises(ConnectionResetError):
                await client.hear()

    meet(story)


def test_a_loss_that_was_not_met_is_forgotten_when_it_thaws():
    async def story(_, proxy):
        async with a_client(proxy) as client:
            lost = proxy.lose_reply(b"COMMIT")
            await proxy.thaw()
            assert await client.ask(b"COMMIT\n") == b"COMMIT\n"
            assert not lost.is_set()

    meet(story)


def test_without_a_server_a_client_is_reset_and_with_one_again_it_is_served():
    async def story(echo, proxy):
        port, proxy.to_port = proxy.to_port, 1
        async with a_client(proxy) as client:
            client.say(b"anybody?\n")
            await client.is_cut()
        proxy.to_port = port
        async with a_client(proxy) as client:
            assert await client.ask(b"hello\n") == b"hello\n"

    meet(story)
