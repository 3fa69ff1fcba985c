import asyncio

import pytest

from worker.grouping import Group


class Gate:
    """A `send` that waits for leave and keeps what it was given."""

    def __init__(self):
        self.groups = []
        self.open = asyncio.Event()

    async def send(self, items):
        self.groups.append(list(items))
        await self.open.wait()
        return [item * 10 for item in items]


async def asked(group, *items):
    """Tasks whose items stand in the group already."""
    tasks = [asyncio.create_task(group.ask(item)) for item in items]
    for _ in range(3):
        await asyncio.sleep(0)
    return tasks


def test_an_idle_group_sends_at_once_and_a_busy_one_collects():
    async def story():
        gate = Gate()
        group = Group(gate.send)
        first = await asked(group, 1)
        later = await asked(group, 2, 3)
        assert gate.groups == [[1]]
        gate.open.set()
        assert await asyncio.gather(*first, *later) == [10, 20, 30]
        assert gate.groups == [[1], [2, 3]]

    asyncio.run(story())


def test_a_group_is_never_larger_than_it_may_be():
    async def story():
        gate = Gate()
        gate.open.set()
        group = Group(gate.send, most=2)
        assert await asyncio.gather(*await asked(group, *range(5))) == [0, 10, 20, 30, 40]
        assert [len(g) for g in gate.groups] == [2, 2, 1]

    asyncio.run(story())


def test_a_failure_is_raised_to_every_caller_of_its_group_and_to_no_other():
    async def story():
        failures = [ValueError("no")]

        async def send(items):
            await asyncio.sleep(0)
            if failures:
                raise failures.pop()
            return items

        group = Group(send)
        ill = await asked(group, 1, 2)
        well = await asked(group, 3)
        answers = await asyncio.gather(*ill, *well, return_exceptions=True)
        assert [type(a) for a in answers] == [ValueError, ValueError, int]

    asyncio.run(story())


def test_a_cancelled_caller_disturbs_nobody_and_its_item_still_goes_out():
    async def story():
        gate = Gate()
        group = Group(gate.send)
        sent = await asked(group, 1, 2)
        waiting = await asked(group, 3, 4)
        sent[0].cancel()
        waiting[0].cancel()
        gate.open.set()
        answers = await asyncio.gather(*sent, *waiting, return_exceptions=True)
        assert [a if isinstance(a, int) else type(a) for a in answers] == [
            asyncio.CancelledError,
            20,
            asyncio.CancelledError,
            40,
        ]
        assert gate.groups == [[1, 2], [3, 4]]

    asyncio.run(story())


def test_a_send_with_too_few_answers_fails_its_callers_and_the_next_group_works():
    async def story():
        async def send(items):
            return items[1:] if 1 in items else items

        group = Group(send)
        async with asyncio.timeout(10):
            answers = await asyncio.gather(*await asked(group, 1, 2), return_exceptions=True)
            assert [type(a) for a in answers] == [ValueError, ValueError]
            assert await group.ask(3) == 3

    asyncio.run(story())


def test_a_send_that_is_cancelled_leaves_nobody_waiting():
    async def story():
        cut = asyncio.Event()

        async def send(items):
            if not cut.is_set():
                await cut.wait()
                raise asyncio.CancelledError
            return items

        group = Group(send)
        async with asyncio.timeout(10):
            callers = [*await asked(group, 1), *await asked(group, 2)]
            cut.set()
            answers = await asyncio.gather(*callers, return_exceptions=True)
            assert [type(a) for a in answers] == [asyncio.CancelledError] * 2
            assert await group.ask(3) == 3

    asyncio.run(story())


def test_one_group_serves_one_loop_after_another():
    async def send(items):
        return items

    group = Group(send)
    assert asyncio.run(group.ask(1)) == 1
    assert asyncio.run(group.ask(2)) == 2


@pytest.mark.parametrize("callers", [1, 1000])
def test_each_caller_gets_the_answer_to_its_own_item(callers):
    async def story():
        async def send(items):
            await asyncio.sleep(0)
            return [-item for item in items]

        group = Group(send, most=7)
        answers = await asyncio.gather(*(group.ask(item) for item in range(callers)))
        assert answers == [-item for item in range(callers)]

    asyncio.run(story())
