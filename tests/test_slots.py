"""Slots of a lane: taken by the pack, in order, never more at once than there are."""

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from worker.slots import Slots


@given(count=st.integers(1, 8), packs=st.lists(st.integers(0, 12), max_size=12))
def test_packs_run_in_order_within_the_slots_and_all_of_them_get_their_turn(count, packs):
    async def story():
        slots, running, began = Slots(count), 0, []

        async def pack(number, size):
            nonlocal running
            await slots.take(size)
            began.append(number)
            running += size
            assert running <= max(count, size), "a pack began beside another one although there was no room"
            for _ in range(size):
                await asyncio.sleep(0)
                running -= 1
                slots.give_back()

        async with asyncio.timeout(5):
            await asyncio.gather(*(pack(number, size) for number, size in enumerate(packs)))
        assert began == sorted(began)
        assert running == 0

    asyncio.run(story())


def test_a_pack_that_is_cancelled_while_it_waits_takes_nothing():
    async def story():
        slots = Slots(2)
        await slots.take(1)
        waiting = asyncio.create_task(slots.take(2))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await slots.take(1)
        slots.give_back(2)
        await slots.take(2)

    asyncio.run(story())
