"""The gate's script with one of its guards taken out: what it says, and what a careless edit would make of it."""

from collections.abc import Mapping

_ADD = "math.max(-bucket.burst, math.min(bucket.burst, bucket.level + amount))"

MUTANTS: Mapping[str, tuple[str, str]] = {
    # The breaker. Who is no holder any more is not in flight either, so that guard is seen missing only when the breaker stands
    # alone: tests/contract/test_gate_store.py.
    "no generation check": ("if report.generation ~= number('generation') then return end", ""),
    "no probe exclusion": ("and number('blocked') <= now and not leased()", "and number('blocked') <= now"),
    "no lease expiry": ("text('lease') ~= '' and number('lease_until') > now", "text('lease') ~= ''"),
    "no clock clamp of the breaker": ("now = math.max(now, number('last'))", ""),
    "no verdict counts": ("elseif report.verdict ~= 'X' then", "else"),
    "a later block is shorter": ("set('blocked', math.max(number('blocked'), now", "set('blocked', math.max(0, now"),
    "open time does not grow": ("rules.open_ms * 2 ^ math.min(number('opens') - 1, 20)", "rules.open_ms"),
    "one good probe closes": (">= rules.good_probes", ">= 1"),
    "no ramp": ("if draw >= look[4] then", "if false then"),
    "who is in flight stands for nothing": ("and number('fails') >= report.survivors()", ""),
    "a probe that found no room keeps the lease": ("if look[5] == 1 then circuit.release() end", ""),
    "the dearest is the probe": ("return a[3] < b[3]", "return a[3] > b[3]"),
    "people are the probe": ("if a[4] ~= b[4] then return a[4] end", "if a[4] ~= b[4] then return b[4] end"),
    # The limiter.
    "no clock clamp of the levels": ("now = math.max(now, number('at', now))", ""),
    "no settle-once": ("if redis.call('ZREM', flying, tell.lease) == 0 then return nil end", "redis.call('ZREM', flying, tell.lease)"),
    "refund above burst": (_ADD, "math.max(-bucket.burst, bucket.level + amount)"),
    "debt without bound": (_ADD, "math.min(bucket.burst, bucket.level + amount)"),
    "idle time is saved up": ("math.min(bucket.burst, number(name, bucket.burst) + gain)", "number(name, bucket.burst) + gain"),
    "eased whenever told": ("and now - eased_at >= rules.ease_every_ms", ""),
    "the multiplier has no floor": ("m = math.max(rules.least_multiplier, m * by)", "m = m * by"),
    "the multiplier never recovers": ("m = math.min(1, m + elapsed * rules.recovery_per_ms)", ""),
    "congestion raises the ceiling": ("math.min(room > 0 and room or math.huge, by * flew)", "by * flew"),
    "the ceiling never grows": ("room = room + 1 / room", ""),
    "the ceiling stays for ever": ("if room > (concurrency > 0 and concurrency or rules.most_room) then room = 0 end", ""),
    "bulk share of the levels ignored": ("bulk and rules.bulk_leaves * bucket.burst or 0", "0"),
    "bulk share of the flight ignored": ("if bulk and ceiling() < math.huge then", "if false then"),
    "concurrency ignored": ("  if in_flight + 1 > top(bulk) then", "  if false then"),
    "tokens ignored": ("  need(tokens, demand)\n", ""),
    "requests are taken before tokens are there": ("  need(tokens, demand)\n",
                                                   "  if requests then add(requests, -1) end\n  need(tokens, demand)\n"),
    "too large waits for ever": ("math.min(bucket.burst, wanted + leaves) - bucket.level", "wanted + leaves - bucket.level"),
    "the dead stay in flight": ("redis.call('ZREMRANGEBYSCORE', flying, '-inf', now)", ""),
    "everybody is told the same time": ("(missing + bucket.promised) / pace(bucket)", "missing / pace(bucket)"),
    "promises are for ever": ("bucket.promised = math.max(0, bucket.promised - gain)", ""),
    "what the vendor says raises": ("math.min(requests.level, tell.remaining_requests)", "tell.remaining_requests"),
    "the vendor is not heard": ("if given(tell.remaining_tokens) then", "if false then"),
    "what was not sent is charged": ("if not tell.sent then used = 0 end", ""),
    "what was used is not charged": ("add(tokens, tell.reserved - used)", ""),
    "reset keeps the multiplier": ("m, eased_at, room, promised_calls = 1, 0, 0, 0", ""),
    # The budget.
    "retries without a budget": ("extra > 0 and budget.wait_ms() or 0", "0"),
    "a retry costs nothing": ("if extra > 0 then budget.draw(extra) end", ""),
    "retries down to the last": ("if retries > rules.retries_least then", "if retries > 0 then"),
    "a quiet system may not retry": ("(now - at) * rules.retries_per_ms", "0"),
    "an answer earns nothing": ("if answered then retries", "if false then retries"),
    "a retry earns too": ("if told.first then budget.earn", "if true then budget.earn"),
    "hedges are saved up": ("math.min(rules.hedges_most, hedges + rules.hedges_earned)", "hedges + rules.hedges_earned"),
    "hedges without an allowance": ("if hedges < 1 or", "if"),
    "hedges without money": ("or money < cost", ""),
    "money is saved up": ("money = math.min(money, rules.hedges_most * cost)", ""),
    "hedges when retries run out": ("or wait_ms() > 0 then return false", "then return false"),
    "latencies of yesterday count": ("if of and of <= before then", "if false then"),
}  # fmt: skip
