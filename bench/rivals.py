"""`python -m bench.rivals NAME PLAN OUT`: one contestant without a queue plays a plan, in the environment of the rivals.

It says `ready`, reads from stdin when second 0 is (Unix time), writes how its jobs ended and stays until stdin is closed. Each job
is asked for at its moment, ready or not, and given up at its deadline. That is kinder than life: nobody's process dies here, and
none of them has to write anything down.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

TIMEOUT_S = 4.0  # of a call where a contestant is tuned; Backstop's `timeout_s` in this run
THREADS = 600

Ask = Callable[[str, str], Awaitable[object]]
"""World and prompt; raises when there is no answer."""


async def play(plan: Mapping[str, Any], began: float, ask: Ask) -> list[dict[str, Any]]:
    """How each job ended: `world`, `n`, `ok`, `took_s` since it was due, and `late_s` that this process began it late."""
    ended: list[dict[str, Any]] = []

    async def one(job: Mapping[str, Any]) -> None:
        ok, due = True, began + job["at_s"]
        late_s = time.time() - due
        try:
            async with asyncio.timeout(due + plan["deadline_s"] - time.time()):
                await ask(job["world"], job["prompt"])
        except Exception:  # whatever a client raises, its user has no answer
            ok = False
        ended.append({"world": job["world"], "n": job["n"], "took_s": time.time() - due, "ok": ok, "late_s": late_s})

    async with asyncio.TaskGroup() as jobs:
        for job in plan["jobs"]:
            await asyncio.sleep(max(0.0, began + job["at_s"] - time.time()))
            jobs.create_task(one(job))
    return ended


def single(worlds: Mapping[str, Sequence[str]]) -> Ask:
    """The first provider and nothing else: no retry, 10 s."""
    import httpx

    http = httpx.AsyncClient(timeout=10, limits=httpx.Limits(max_connections=None))

    async def ask(world: str, prompt: str) -> object:
        body = {"model": "sim", "messages": [{"role": "user", "content": prompt}]}
        response = await http.post(f"{worlds[world][0]}/chat/completions", json=body)
        response.raise_for_status()
        return response.json()["choices"][0]["message"]["content"]

    return ask


def naive(worlds: Mapping[str, Sequence[str]]) -> Ask:
    """The tutorial's client, one process with a thread for each job."""
    from bench.naive import NaiveClient

    clients = {world: NaiveClient(urls) for world, urls in worlds.items()}
    threads = ThreadPoolExecutor(THREADS)

    async def ask(world: str, prompt: str) -> object:
        return await asyncio.get_running_loop().run_in_executor(threads, clients[world].chat, prompt)

    return ask


def litellm_defaults(worlds: Mapping[str, Sequence[str]]) -> Ask:
    """A Router as its documentation begins: one group for each provider, fallbacks between them, all else left alone."""
    return _router(worlds, {})


def litellm_tuned(worlds: Mapping[str, Sequence[str]]) -> Ask:
    """As somebody who has read all of it sets it up: a time limit, fallback before retry, a cooldown after few failures."""
    return _router(worlds, {"timeout": TIMEOUT_S, "num_retries": 0, "allowed_fails": 3, "cooldown_time": 10})


def _router(worlds: Mapping[str, Sequence[str]], options: Mapping[str, Any]) -> Ask:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    import litellm

    groups = {world: [f"{world}-{n}" for n, _ in enumerate(urls)] for world, urls in worlds.items()}
    router = litellm.Router(
        model_list=[
            {"model_name": name, "litellm_params": {"model": "openai/sim", "api_base": url, "api_key": "none"}}
            for world, urls in worlds.items()
            for name, url in zip(groups[world], urls, strict=True)
        ],
        fallbacks=[{first: others} for first, *others in groups.values()],
        **options,
    )

    async def ask(world: str, prompt: str) -> object:
        reply = await router.acompletion(model=groups[world][0], messages=[{"role": "user", "content": prompt}])
        return reply.choices[0].message.content

    return ask


CONTESTANTS: Mapping[str, Callable[[Mapping[str, Sequence[str]]], Ask]] = {
    "single": single,
    "naive": naive,
    "litellm": litellm_defaults,
    "litellm-tuned": litellm_tuned,
}


def main(name: str, plan_file: str, out_file: str) -> None:
    plan = json.loads(Path(plan_file).read_text())
    ask = CONTESTANTS[name](plan["worlds"])
    print("ready", flush=True)
    ended = asyncio.run(play(plan, float(sys.stdin.readline()), ask))
    Path(f"{out_file}.part").write_text(json.dumps(ended))
    Path(f"{out_file}.part").rename(out_file)
    sys.stdin.read()
    os._exit(0)  # threads of calls that still hang are of no interest


if __name__ == "__main__":
    main(*sys.argv[1:])
