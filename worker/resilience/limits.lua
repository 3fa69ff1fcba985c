-- limits.py in Redis: read that one for what the rules mean. Part of the script that gate_store.py puts together.
-- Takes the hash of the levels, the sorted set of calls in flight, the time in ms, and {rpm, tpm, concurrency} (0: none).
local key, flying, now, limits = ...
local stored = {}
local flat = redis.call('HGETALL', key)
for i = 1, #flat, 2 do stored[flat[i]] = flat[i + 1] end

local function number(field, otherwise) return tonumber(stored[field]) or otherwise end

now = math.max(now, number('at', now))
local elapsed = now - number('at', now)
local m, eased_at, room = number('multiplier', 1), number('eased_at', 0), number('room', 0)
local promised_calls, call_ms, concurrency = number('promised_calls', 0), number('call_ms', rules.call_ms), limits[3]
local in_flight -- counted once, when somebody wants to know
local takers = {}

local function burst(limit) return math.max(1, limit / rules.bursts_a_minute) end

local function pace(bucket) return bucket.limit * rules.used_percent / 6000000 * m end

local function filled(name, limit)
  if limit == 0 then return nil end
  local bucket = {limit = limit, burst = burst(limit), promised = number('promised_' .. name, 0)}
  local gain = elapsed * pace(bucket)
  bucket.level = math.min(bucket.burst, number(name, bucket.burst) + gain)
  bucket.promised = math.max(0, bucket.promised - gain)
  return bucket
end

local function ceiling()
  return math.min(concurrency > 0 and concurrency or math.huge, room > 0 and room or math.huge)
end

local requests, tokens = filled('requests', limits[1]), filled('tokens', limits[2])
if ceiling() < math.huge then promised_calls = math.max(0, promised_calls - elapsed * (ceiling() / call_ms)) end
m = math.min(1, m + elapsed * rules.recovery_per_ms)

local function add(bucket, amount)
  bucket.level = math.max(-bucket.burst, math.min(bucket.burst, bucket.level + amount))
end

local function sweep()
  redis.call('ZREMRANGEBYSCORE', flying, '-inf', now)
  in_flight = redis.call('ZCARD', flying)
end

local function promise(demand)
  for _, pair in ipairs({{requests, 1}, {tokens, demand}}) do
    local bucket = pair[1]
    if bucket then bucket.promised = math.min(bucket.promised + pair[2], pace(bucket) * rules.hint_most_ms) end
  end
  if ceiling() < math.huge then
    promised_calls = math.min(promised_calls + 1, ceiling() / call_ms * rules.hint_most_ms)
  end
end

local function top(bulk)
  if bulk and ceiling() < math.huge then return math.max(1, math.floor(ceiling() * (1 - rules.bulk_leaves))) end
  return ceiling()
end

local function is_pinched() return room > 0 and (concurrency == 0 or room < concurrency) end

local function is_congested(bulk) return is_pinched() and in_flight + 1 > top(bulk) end

local function reserve(lease, ends, demand, bulk)
  local alone, queued = 0, 0
  local function need(bucket, wanted)
    if not bucket then return end
    local leaves = bulk and rules.bulk_leaves * bucket.burst or 0
    local missing = math.min(bucket.burst, wanted + leaves) - bucket.level
    if missing > rules.close then
      alone = math.max(alone, math.ceil(missing / pace(bucket)))
      queued = math.max(queued, math.ceil((missing + bucket.promised) / pace(bucket)))
    end
  end
  need(requests, 1)
  need(tokens, demand)
  if in_flight + 1 > top(bulk) then
    alone = math.max(alone, math.ceil(call_ms / ceiling()))
    local most = is_pinched() and rules.ease_every_ms or rules.hint_most_ms
    queued = math.max(queued, math.min(most, math.ceil((1 + promised_calls) * call_ms / ceiling())))
  end
  if alone > 0 and not bulk then return alone, 0 end
  if alone > 0 then
    promise(demand)
    return math.max(alone, math.min(queued, rules.hint_most_ms)), 0
  end
  local charge = demand
  if requests then add(requests, -1) end
  if tokens then
    charge = math.min(demand, math.floor(2 * tokens.burst))
    add(tokens, -charge)
  end
  in_flight = in_flight + 1
  takers[#takers + 1] = string.format('%.0f', now + ends)
  takers[#takers + 1] = lease
  return 0, charge
end

local function ease(by, flew)
  m = math.max(rules.least_multiplier, m * by)
  room = math.max(1, math.min(room > 0 and room or math.huge, by * flew))
  eased_at = now
end

local function widen()
  room = room + 1 / room
  if room > (concurrency > 0 and concurrency or rules.most_room) then room = 0 end
end

local function given(value) return value ~= nil and value ~= cjson.null end

local function put_right(tell)
  if requests then
    if not tell.sent then add(requests, 1) end
    if given(tell.remaining_requests) then requests.level = math.min(requests.level, tell.remaining_requests) end
  end
  if tokens then
    local used = given(tell.used) and tell.used or tell.reserved
    if not tell.sent then used = 0 end
    add(tokens, tell.reserved - used)
    if given(tell.remaining_tokens) then tokens.level = math.min(tokens.level, tell.remaining_tokens) end
  end
end

local function settle(tell)
  local ends = tell.verdict == 'F' and redis.call('ZSCORE', flying, tell.lease) or 0
  if redis.call('ZREM', flying, tell.lease) == 0 then return nil end
  put_right(tell)
  if given(tell.took_ms) then call_ms = call_ms + (math.max(1, tell.took_ms) - call_ms) * rules.call_weight end
  if tell.ease < 1 and now - eased_at >= rules.ease_every_ms then
    ease(tell.ease, redis.call('ZCARD', flying) + 1)
  elseif tell.verdict == 'S' and room > 0 and (redis.call('ZCARD', flying) + 1) * 2 >= room then
    widen()
  end
  return tonumber(ends)
end

local function survivors(ends)
  if ends <= now then return 0 end
  return redis.call('ZCOUNT', flying, '(' .. string.format('%.0f', now), string.format('%.0f', ends))
end

local function reset()
  m, eased_at, room, promised_calls = 1, 0, 0, 0
  if requests then requests.promised = 0 end
  if tokens then tokens.promised = 0 end
end

local function save()
  if #takers > 0 then
    redis.call('ZADD', flying, unpack(takers))
    redis.call('PEXPIRE', flying, rules.limits_ttl_ms)
  end
  local fields = {'at', string.format('%.0f', now), 'eased_at', string.format('%.0f', eased_at)}
  local function keep(name, value)
    fields[#fields + 1] = name
    fields[#fields + 1] = string.format('%.17g', value)
  end
  keep('multiplier', m)
  keep('room', room)
  keep('promised_calls', promised_calls)
  keep('call_ms', call_ms)
  for name, bucket in pairs({requests = requests, tokens = tokens}) do
    keep(name, bucket.level)
    keep('promised_' .. name, bucket.promised)
  end
  redis.call('HSET', key, unpack(fields))
  redis.call('PEXPIRE', key, rules.limits_ttl_ms)
end

return {
  sweep = sweep, reserve = reserve, is_congested = is_congested, settle = settle, survivors = survivors, reset = reset, save = save,
  permille = function() return math.floor(m * 1000) end,
}
