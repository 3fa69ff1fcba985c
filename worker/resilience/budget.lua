-- budget.py in Redis: read that one for what the rules mean. Part of the script that gate_store.py puts together.
-- Takes the hash of one provider's budget and the time in ms.
local key, now = ...
local kept = redis.call('HMGET', key, 'at', 'retries', 'hedges', 'money')
local at = tonumber(kept[1]) or 0
local retries, hedges = tonumber(kept[2]) or rules.retries_most, tonumber(kept[3]) or 0
local money, touched = tonumber(kept[4]) or 0, false
now = math.max(now, at)
retries = math.min(rules.retries_most, retries + (now - at) * rules.retries_per_ms)

local function wait_ms()
  if retries > rules.retries_least then return 0 end
  return math.floor((rules.retries_least - retries) / rules.retries_per_ms) + 1
end

local function draw(cost)
  retries, touched = math.max(0, retries - cost), true
end

local function earn(answered, sent, cost)
  touched = true
  if answered then retries = math.min(rules.retries_most, retries + rules.retry_earned) end
  if sent then
    hedges = math.min(rules.hedges_most, hedges + rules.hedges_earned)
    money = money + cost * rules.money_earned_percent / 100
  end
end

local function hedge(cost)
  touched = true
  money = math.min(money, rules.hedges_most * cost)
  if hedges < 1 or money < cost or wait_ms() > 0 then return false end
  hedges, money = hedges - 1, money - cost
  draw(1)
  return true
end

local function save()
  if not touched then return end
  redis.call('HSET', key, 'at', string.format('%.0f', now), 'retries', string.format('%.17g', retries),
    'hedges', string.format('%.17g', hedges), 'money', string.format('%.17g', money))
  redis.call('PEXPIRE', key, rules.budget_ttl_ms)
end

return {wait_ms = wait_ms, draw = draw, earn = earn, hedge = hedge, save = save}
