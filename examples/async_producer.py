"""Two questions at once from code that runs on an event loop. Run it beside `backstop up`, from the same directory."""

import asyncio

from worker.producer import AsyncBackstop


async def ask(backstop: AsyncBackstop, question: str) -> str:
    job = await backstop.enqueue(question, max_tokens=100)
    view = await backstop.wait(job, timeout_s=60)
    return f"{view.state}: {view.answer.content if view.answer else view.error}"


async def main() -> None:
    async with AsyncBackstop() as backstop:
        for line in await asyncio.gather(ask(backstop, "What is a queue?"), ask(backstop, "What is a fence?")):
            print(line)


asyncio.run(main())
