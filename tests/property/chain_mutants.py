"""The chain with one of its guards taken out: what it says, and what a careless edit would make of it."""

import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import scripted

MODULES = ("reach", "step", "hedge", "degrade", "chain")  # each may import those before it


@contextmanager
def mutated(module: str, old: str, new: str) -> Iterator[None]:
    """The stage plays with this text changed. Raises AssertionError when the guard is written in other words by now."""
    with pytest.MonkeyPatch.context() as patch:
        for name in MODULES:
            full = f"worker.{name}"
            path = Path(importlib.import_module(full).__file__ or "")
            source = path.read_text("utf-8")
            if name == module:
                assert source.count(old) == 1, f"{module} does not say {old!r} any more, or more than once"
                source = source.replace(old, new)
            twin = ModuleType(full)
            patch.setitem(sys.modules, full, twin)
            exec(compile(source, str(path), "exec"), twin.__dict__)
        step, chain = sys.modules["worker.step"], sys.modules["worker.chain"]
        for holder, name in ((chain, "Chain"), (step, "Steps"), (step, "Station")):
            patch.setattr(scripted, name, getattr(holder, name))
        patch.setattr(scripted, "step_module", step)
        yield


MUTANTS: Mapping[str, tuple[str, str, str]] = {
    # The walk.
    "an answer that was paid for is forgotten": ("chain", "if asked.answer is not None:", "if False:"),
    "an earlier refusal is forgotten": (
        "chain",
        "for asked in walk.claim.asked:\n        if _is_final",
        "for asked in ():\n        if _is_final",
    ),
    "no look for doubt before a provider": (
        "chain",
        "        if walk.in_doubt():\n            return Doubtful()\n        if walk.remaining_s()",
        "        if walk.remaining_s()",
    ),
    "no look for doubt at the end": (
        "chain",
        "        if walk.in_doubt():\n            return Doubtful()\n        unheard",
        "        unheard",
    ),
    "no look at the clock": (
        "chain",
        "        if walk.remaining_s() <= LEAST_CALL_S:\n            return OutOfTime()\n        if not self",
        "        if not self",
    ),
    "who was asked is asked again": ("chain", "if name not in done]", "]"),
    "who was interrupted is not asked again": ("chain", " if not policy(asked.outcome).interrupted}", "}"),
    "refusals are shopped around": (
        "chain",
        "return next((Refused(reply.signal) for reply in heard if _is_final(reply.signal)), None)",
        "return None",
    ),
    "small windows are tried": ("chain", "if not _window_fits(walk, station, self._stations):", "if False:"),
    "small windows are hedged": ("chain", "if _fits_window(walk, other, self._stations)]", "]"),
    "shared fates keep their place": ("chain", "untried if reply is None else sorted(untried", "untried if True else sorted(untried"),
    "parks for the longest wait": ("chain", "Parked(min(waits, default=PARKED_S)", "Parked(max(waits, default=PARKED_S)"),
    "parks without a wait": ("chain", "Parked(min(waits, default=PARKED_S)", "Parked(0"),
    "who was full is a failure": ("chain", "if not asked or (full and", "if not asked or (False and"),
    "who was full is not asked again": ("chain", "new_walk=bool(full)", "new_walk=False"),
    "all failures are parked": ("chain", "if not asked or", "if True or"),
    "the deadline is a failure": (
        "chain",
        "    if walk.remaining_s() <= LEAST_CALL_S:\n        return OutOfTime()\n    if walk.reasons",
        "    if walk.reasons",
    ),
    "what is hopeless is tried again": ("chain", "if walk.reasons and all(_is_hopeless", "if False and all(_is_hopeless"),
    "waits for room at any price": ("chain", "if walk.claim.lane is not Lane.BULK or route.overflow or", "if route.overflow or"),
    "a race of one": ("chain", "_ending(await race(self._steps, walk, stations))", "_ending(await race(self._steps, walk, stations[:1]))"),
    "books that are away are a fault": (
        "chain",
        "except SQLAlchemyError:\n            return Parked(PARKED_S, ours=True)",
        "except SQLAlchemyError:\n            return Exhausted()",
    ),
    "a park for nothing": ("chain", "reason.retry_after_s or policy(reason.reason).block_s or PARKED_S", "reason.retry_after_s or 0"),
    "not sent is taken for denied": ("chain", "any(reason.reason == NOT_SENT for reason in walk.reasons)", "False"),
    # The step.
    "a denial is overlooked": (
        "step",
        "if admission.allowed:\n            return admission",
        "if admission:\n            return admission",
    ),
    "a denial leaves no reason": ("step", "walk.reasons.append(_refused_entry(step, admission))", ""),
    "no word for who was asked": ("step", "if reply is not None and reply.signal is not Signal.ANSWERED:", "if False:"),
    "retries what must not be": ("step", "return POLICIES[reply.signal].retry and", "return reply.signal is not Signal.ANSWERED and"),
    "retries in doubt": ("step", "and not walk.in_doubt() and walk.may", "and walk.may"),
    "extras without end": ("step", "and walk.may_have_extra(MOST_EXTRAS)", ""),
    "extras are not counted": ("step", "        walk.extras += 1\n", ""),
    "a probe is retried": ("step", "admission is None or admission.probe or", "admission is None or"),
    "Retry-After is ignored": ("step", "rng=self._rng), reply.retry_after_s or 0)", "rng=self._rng), 0)"),
    "a retry past the deadline": ("step", "min(RETRY_CAP_S, walk.remaining_s() - LEAST_CALL_S) else None", "math.inf else None"),
    "a retry denied is made": (
        "step",
        "        if not admission.allowed:\n            return None\n        walk.extras",
        "        walk.extras",
    ),
    "what is cancelled is not reported": (
        "step",
        "            await self.gates.report(name, admission, Ending(verdict=Verdict.NEUTRAL, sent=left))\n",
        "",
    ),
    "what is not booked is not reported": (
        "step",
        "        except BaseException:\n            left",
        "        except asyncio.CancelledError:\n            left",
    ),
    "what is not sent is not reported": (
        "step",
        "        if called is None:\n            await self.gates.report(name, admission, Ending(verdict=Verdict.NEUTRAL, sent=False))\n",
        "        if called is None:\n",
    ),
    "what has ended is not reported": (
        "step",
        "        await self.gates.report(name, admission, _ending(reply, call, ours=self.reach.is_ours(reply)))\n",
        "",
    ),
    "what has ended is reported twice": (
        "step",
        "        self.reach.heard(step.station.config.host, reply)\n",
        (
            "        self.reach.heard(step.station.config.host, reply)\n"
            "        await self.gates.report(name, admission, _ending(*called, ours=False))\n"
        ),
    ),
    "who loses is not booked": (
        "step",
        "            walk.calls.append(watch.book(Reply(signal=Signal.CANCELLED",
        "            (watch.book(Reply(signal=Signal.CANCELLED",
    ),
    "calls are not booked": ("step", "        walk.calls.append(call)\n", ""),
    "sent is taken for unsent": ("step", "        walk.unsent.remove(call_id)\n", ""),
    "a row of its own is opened for each call": ("step", "if claim.opened_id in walk.unsent and", "if False and"),
    "another one's row is used": ("step", " and claim.opened_provider == provider.name:", ":"),
    "sent although it is not on the books": (
        "step",
        "return call.id if await _to_its_end(self._open_call.ask(call)) else None",
        "await _to_its_end(self._open_call.ask(call))\n        return call.id",
    ),
    "sent although its time is over": ("step", "if walk.remaining_s() <= LEAST_CALL_S or not", "if not"),
    "a row comes after its removal": (
        "step",
        "    task = asyncio.ensure_future(work)\n    try:\n        return await asyncio.shield(task)",
        "    task = asyncio.ensure_future(work)\n    try:\n        return await task",
    ),
    "a broken adapter breaks the walk": (
        "step",
        "except Exception as error:  # a fault of ours",
        "except ZeroDivisionError as error:  # a fault of ours",
    ),
    "prompts in the log": ("step", "error=type(error).__name__, origin=origin(error)", "error=repr(error)"),
    "no reserve for the others": (
        "step",
        "min(step.station.config.timeout_s, remaining_s - reserve_s, step.most_s)",
        "min(step.station.config.timeout_s, remaining_s, step.most_s)",
    ),
    "no deadline": (
        "step",
        "min(step.station.config.timeout_s, remaining_s - reserve_s, step.most_s)",
        "min(step.station.config.timeout_s, step.most_s)",
    ),
    "our deadline is the provider's fault": ("step", "return replace(reply, signal=Signal.OUT_OF_TIME)", "return reply"),
    "any shape fits": ("step", "if not fits(walk.claim.request, reply.answer):", "if False:"),
    "a cut answer is whole": ("step", 'if reply.answer.finish_reason == "length" and not walk.takes_truncated:', "if False:"),
    "a lesser answer is not marked": (
        "step",
        "return replace(reply, answer=replace(reply.answer, degraded=step.degraded)) if step.degraded else reply",
        "return reply",
    ),
    "our own fault is the provider's": ("step", "verdict=Verdict.NEUTRAL if ours else policy.verdict", "verdict=policy.verdict"),
    "nobody is isolated": ("step", "isolate_s=policy.isolate_s or 0,", ""),
    "shared fate of strangers": ("step", "return by_account and same_host and", "return by_account and"),
    "a revoked key is one host's affair": ("step", "by_account = reply.signal is Signal.QUOTA_EXHAUSTED or", "by_account ="),
    # Several at once.
    "a failure cancels the others": ("hedge", "while running and not any(map(_answered, replies)):", "while running and not replies:"),
    "nobody is waited for": (
        "hedge",
        "        await _ended(running, OVERTAKEN if any(map(_answered, replies)) else None)\n",
        "        pass\n",
    ),
    "losers are not awaited": ("hedge", "    await asyncio.gather(*tasks, return_exceptions=True)\n", ""),
    "losers have no name": ("hedge", "task.cancel(why)", "task.cancel()"),
    "a cancelled hedge leaks": ("hedge", "        await _ended([first])\n        raise", "        raise"),
    "the same endpoint is hedged": ("hedge", "elsewhere = other.config.base_url != slow.config.base_url", "elsewhere = True"),
    "a dear hedge": ("hedge", "and (cheap or route.hedge_dearer) and", "and"),
    "a hedge without allowance": ("hedge", "if hedge is None or not await", "if hedge is None or await"),
    "a hedge at once": ("hedge", "asyncio.wait({first}, timeout=delay_s)", "asyncio.wait({first}, timeout=0)"),
    "a hedge after all the retries": ("hedge", "return bool(done) or not walk.may_have_extra(MOST_EXTRAS)", "return bool(done)"),
    "a hedge is asked again": ("hedge", "    others.remove(hedge)\n", ""),
    "a hedge is no extra": ("hedge", "    walk.extras += 1\n", ""),
    "a race without limit": ("hedge", "most_s=RACE_S, retries=False", "retries=False"),
    "a race with retries": ("hedge", "most_s=RACE_S, retries=False", "most_s=RACE_S"),
    # The ladder.
    "less at once": ("degrade", "if not _is_time(walk, outcome):", "if False:"),
    "less although nobody may answer": (
        "degrade",
        "        case OutOfTime():\n            return True\n        case _:\n            return False",
        "        case _:\n            return True",
    ),
    "less in doubt": ("degrade", "        if walk.in_doubt():\n            return Doubtful()\n", ""),
    "a last attempt after the deadline": ("degrade", "return wait_s + DISPATCH_S >= walk.remaining_s()", "return False"),
    "what was not sent counts as sent": ("step", "left = call_id is not None and call_id not in walk.unsent", "left = True"),
    "a race blames nobody": (
        "step",
        "timeout_s < min(step.station.config.timeout_s, step.most_s)",
        "timeout_s < step.station.config.timeout_s",
    ),
    "all unreachable is a failure": ("chain", "if unheard and self._steps", "if False and self._steps"),
    "any failure is the network's": ("chain", "if unheard and self._steps", "if self._steps"),
    "a rung has the last word": (
        "chain",
        "if _is_final(asked.outcome) and asked.provider in route.providers:",
        "if _is_final(asked.outcome):",
    ),
    "less for nobody": ("degrade", "return person or last or", "return True or"),
    "never less for bulk": ("degrade", "return person or last or", "return person or"),
    "no patience": ("degrade", "return replace(outcome, patient=True) if isinstance(outcome, Exhausted) else outcome", "return outcome"),
    "the static text is a full answer": ("degrade", 'usage=nothing, degraded="static"', "usage=nothing"),
    "a kept answer is a full one": ("degrade", 'replace(found.answer, degraded="cache", age_s', "replace(found.answer, age_s"),
    "the key forgets the tenant": (
        "degrade",
        "key(claim.tenant, claim.chain, claim.request), at_most_s",
        'key("one", claim.chain, claim.request), at_most_s',
    ),
    "the key forgets the chain": (
        "degrade",
        "key(claim.tenant, claim.chain, claim.request), at_most_s",
        'key(claim.tenant, "default", claim.request), at_most_s',
    ),
    "stale for ever": ("degrade", "at_most_s=route.cache.stale_s", "at_most_s=1e9"),
    "the other tenant's fresh answer": ("chain", "key(walk.claim.tenant, walk.claim.chain,", 'key("one", walk.claim.chain,'),
    "lesser answers are kept": (
        "chain",
        "            return await self._ladder.degraded(walk, route, await self._kept(walk, route, name))\n",
        "            less = await self._ladder.degraded(walk, route, await self._kept(walk, route, name))\n"
        "            if isinstance(less, Answered):\n"
        "                await self._cache.put(name, replace(less.answer, degraded=None, age_s=None), keep_s=600)\n"
        "            return less\n",
    ),
    "each answer is the same": ("chain", "cacheable(walk.claim.request, any_temperature=route.cache.any_temperature)", "True"),
    "fresh for ever": ("chain", "alone(name, at_most_s=route.cache.fresh_s,", "alone(name, at_most_s=1e9,"),
    # What is in reach.
    "one host is the network": ("reach", "HOSTS = 2", "HOSTS = 1"),
    "a refusal is silence": ("reach", '"no_route"})', '"no_route", "refused"})'),
    "silence is remembered": ("reach", "self._silent.clear()", "pass"),
    "silence of long ago": ("reach", "self._clock() - at <= WINDOW_S", "True"),
    "ports are hosts": ("reach", 'return urlsplit(f"//{host}").hostname or host', "return str(id(host))"),
}
