-- local.py in Redis: read that one for what the rules mean. The last part of the script that gate_store.py puts together.
-- KEYS: breaker, limits, flying, budget, latency. ARGV[1] operation, ARGV[2] now in ms ('' for the server's clock; tests
-- pass one), ARGV[3] JSON:
--   admit   {limits, asks}             report  {limits, jitter, tells}
--   force   {limits, open | closed | reset}    hedge  cost
-- Answers JSON: {look, multiplier in thousandths, answers}; 1 or 0 to hedge.
local operation, now, said = ARGV[1], tonumber(ARGV[2]), cjson.decode(ARGV[3])
if not now then
  local time = redis.call('TIME')
  now = time[1] * 1000 + math.floor(time[2] / 1000)
end
local budget = budget_of(KEYS[4], now)
if operation == 'hedge' then
  local allowed = budget.hedge(said)
  budget.save()
  return allowed and 1 or 0
end
local circuit, meter = circuit_of(KEYS[1], now), meter_of(KEYS[2], KEYS[3], now, said[1])

local function cheapest_first(asks)
  local order = {}
  for i = 1, #asks do order[i] = i end
  if circuit.state() == 'half_open' then
    table.sort(order, function(one, other)
      local a, b = asks[one], asks[other]
      if a[4] ~= b[4] then return a[4] end
      if a[3] ~= b[3] then return a[3] < b[3] end
      return one < other
    end)
  end
  return order
end

local function denied(look)
  if look[3] == 0 then return nil end
  if look[1] == 'closed' or look[1] == 'forced_closed' then return 'blocked' end
  return 'breaker'
end

local function decide(ask)
  local lease, lease_ms, tokens, bulk, extra, draw = unpack(ask)
  local look = circuit.admit(lease, lease_ms)
  if look[3] > 0 then return {denied(look), look[3], false, 0} end
  if draw >= look[4] then return {'ramping', rules.ramp_wait_ms, false, 0} end
  local why, wait_ms, charge = 'budget', extra > 0 and budget.wait_ms() or 0, 0
  if wait_ms == 0 then
    why = 'limited'
    wait_ms, charge = meter.reserve(lease, lease_ms, tokens, bulk)
  end
  if wait_ms > 0 then
    if look[5] == 1 then circuit.release() end
    if why == 'limited' and meter.is_congested(bulk) then why = 'congested' end
    return {why, wait_ms, false, 0}
  end
  if extra > 0 then budget.draw(extra) end
  return {'', 0, look[5] == 1, charge}
end

local function admit(asks)
  local answers = {}
  circuit.wake()
  meter.sweep()
  for _, i in ipairs(cheapest_first(asks)) do answers[i] = decide(asks[i]) end
  return answers
end

local counts = {}

local function forget_latencies(before)
  for _, field in ipairs(redis.call('HKEYS', KEYS[5])) do
    local of = tonumber(string.match(field, '^(%d+):'))
    if of and of <= before then redis.call('HDEL', KEYS[5], field) end
  end
end

local function save_latencies()
  if not next(counts) then return end
  local period = math.floor(now / rules.period_ms)
  if period > tonumber(redis.call('HGET', KEYS[5], 'newest') or 0) then
    forget_latencies(period - rules.periods)
    redis.call('HSET', KEYS[5], 'newest', string.format('%.0f', period))
    redis.call('PEXPIRE', KEYS[5], rules.period_ms * (rules.periods + 1))
  end
  for bucket, number in pairs(counts) do
    redis.call('HINCRBY', KEYS[5], string.format('%.0f:%.0f', period, bucket), number)
  end
end

local names = {
  'lease', 'generation', 'probe', 'verdict', 'slow', 'block_ms', 'isolate_ms', 'reason', 'reserved', 'used', 'sent',
  'ease', 'remaining_requests', 'remaining_tokens', 'bucket', 'first', 'cost', 'took_ms', 'named',
}

local function hear(tell, jitter)
  local told = {}
  for i, name in ipairs(names) do told[name] = tell[i] end
  local ends = meter.settle(told)
  if not ends then return end
  circuit.report({
    generation = told.generation, lease = told.probe and told.lease or '', verdict = told.verdict,
    slow = told.slow and 1 or 0, block_ms = told.block_ms, isolate_ms = told.isolate_ms, reason = told.reason,
    named = told.named,
    survivors = function() return meter.survivors(ends) end,
  }, jitter)
  if told.first then budget.earn(told.verdict == 'S', told.sent, told.cost) end
  if told.bucket ~= cjson.null then counts[told.bucket] = (counts[told.bucket] or 0) + 1 end
end

local answers
if operation == 'admit' then
  answers = admit(said[2])
elseif operation == 'report' then
  for _, tell in ipairs(said[3]) do hear(tell, said[2]) end
else
  circuit.force(said[2])
  if said[2] == 'reset' then meter.reset() end
end
circuit.save()
meter.save()
budget.save()
save_latencies()
return cjson.encode({circuit.look(false), meter.permille(), answers or cjson.null})
