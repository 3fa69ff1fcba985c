-- circuit.py in Redis: read that one for what the rules mean. Part of the script that gate_store.py puts together.
-- Takes the hash of one provider and the time in ms.
local key, now = ...
local stored, changed = {}, {}
local flat = redis.call('HGETALL', key)
for i = 1, #flat, 2 do stored[flat[i]] = flat[i + 1] end

local function number(field) return tonumber(stored[field]) or 0 end

local function text(field) return stored[field] or '' end

local function set(field, value)
  if type(value) == 'number' then value = string.format('%.0f', value) end
  if stored[field] ~= value then stored[field], changed[field] = value, value end
end

now = math.max(now, number('last'))
-- Not from 0: after a lost memory no earlier report may match.
if not stored.generation then set('generation', now) end
if not stored.state then set('state', 'closed') end

local function leased() return text('lease') ~= '' and number('lease_until') > now end

local function because(cause, reason)
  if reason == '' then return cause end
  return cause .. ': ' .. reason
end

local function move(state, reason)
  set('state', state)
  set('generation', number('generation') + 1)
  set('reason', reason)
  set('lease', '')
  for _, field in ipairs({'lease_until', 'passed', 'fails'}) do set(field, 0) end
  for slot = 0, rules.buckets - 1 do
    if stored['b' .. slot] then set('b' .. slot, '-1,0,0,0') end
  end
end

local function wake()
  if (stored.state == 'open' or stored.state == 'isolated') and now >= math.max(number('until'), number('blocked')) then
    move('half_open', text('reason'))
  end
end

local function open(reason, jitter)
  if stored.state == 'closed' and now - number('closed_at') > rules.forget_ms then set('opens', 0) end
  move('open', reason)
  set('opens', number('opens') + 1)
  local open_ms = math.min(rules.open_most_ms, rules.open_ms * 2 ^ math.min(number('opens') - 1, 20))
  set('until', math.max(now + open_ms + math.floor(open_ms * jitter / 1000), number('blocked')))
end

local function isolate(report)
  move('isolated', because('isolated', report.reason))
  set('until', now + math.min(report.isolate_ms, rules.isolate_most_ms))
end

local function wait_ms(report)
  if report.named or report.verdict == 'F' then return math.min(report.block_ms, rules.block_most_ms) end
  if number('blocked') > now then return 0 end
  set('guesses', number('guesses') + 1)
  return math.min(report.block_ms * 2 ^ math.min(number('guesses') - 1, 20), rules.guess_most_ms)
end

local function block(report)
  if report.block_ms == 0 then return end
  set('blocked', math.max(number('blocked'), now + wait_ms(report)))
  if stored.state == 'closed' then set('reason', because('it asked to wait', report.reason)) end
end

local function bucket(slot)
  local period, successes, failures, slow = string.match(text('b' .. slot), '(%-?%d+),(%d+),(%d+),(%d+)')
  return tonumber(period) or -1, tonumber(successes) or 0, tonumber(failures) or 0, tonumber(slow) or 0
end

local function count(report)
  local this = math.floor(now / rules.bucket_ms)
  local slot = this % rules.buckets
  local period, successes, failures, slow = bucket(slot)
  if period ~= this then successes, failures, slow = 0, 0, 0 end
  if report.verdict == 'F' then
    failures = failures + 1
    set('fails', number('fails') + 1 + report.slow)
  else
    successes = successes + 1
    set('fails', 0)
    set('guesses', 0)
  end
  set('b' .. slot, string.format('%.0f,%d,%d,%d', this, successes, failures, slow + report.slow))
end

local function cause(report)
  local total, failed, slowed = 0, 0, 0
  local oldest = math.floor(now / rules.bucket_ms) - rules.buckets
  for slot = 0, rules.buckets - 1 do
    local period, successes, failures, slow = bucket(slot)
    if period > oldest then
      total, failed, slowed = total + successes + failures, failed + failures, slowed + slow
    end
  end
  local many = total >= rules.min_calls
  if report.verdict == 'F' then
    if number('fails') >= rules.fails_in_a_row and number('fails') >= report.survivors() then
      return string.format('%d failures in a row', number('fails'))
    end
    local half = failed * 100 >= rules.fail_percent * total
    if many and half and failed * 100 >= rules.fail_percent * (total + report.survivors()) then
      return string.format('%d of %d calls failed', failed, total)
    end
  end
  if report.slow > 0 and many and slowed * 100 >= rules.slow_percent * total then
    return string.format('%d of %d calls were slow', slowed, total)
  end
end

local function judge(report, jitter)
  block(report)
  if report.isolate_ms > 0 and stored.state == 'closed' then
    isolate(report)
  elseif report.verdict ~= 'X' then
    count(report)
    local tripped = cause(report)
    if tripped and stored.state == 'closed' then open(because(tripped, report.reason), jitter) end
  end
end

local function judge_probe(report, jitter)
  set('lease', '')
  set('lease_until', 0)
  block(report)
  if report.isolate_ms > 0 then
    isolate(report)
  elseif report.verdict == 'F' then
    open(because('the probe failed', report.reason), jitter)
  elseif report.verdict == 'S' then
    set('guesses', 0)
    set('passed', number('passed') + 1)
    if number('passed') >= rules.good_probes then
      move('closed', '')
      set('closed_at', now)
    end
  end
end

local function hear(report, jitter)
  if report.generation ~= number('generation') then return end
  if stored.state == 'half_open' then
    if report.lease ~= '' and report.lease == text('lease') then judge_probe(report, jitter) end
  elseif stored.state == 'closed' or stored.state == 'forced_closed' then
    judge(report, jitter)
  end
end

local function force(word)
  set('blocked', 0)
  set('guesses', 0)
  if word == 'open' then
    move('forced_open', 'opened by an operator')
  elseif word == 'closed' then
    move('forced_closed', 'closed by an operator')
  else
    move('closed', '')
    for _, field in ipairs({'until', 'opens', 'closed_at'}) do set(field, 0) end
  end
end

local function look(probe)
  local state, retry_ms, permille = stored.state, 0, 1000
  if state == 'forced_open' then
    retry_ms = rules.forced_wait_ms
  elseif state == 'open' or state == 'isolated' then
    retry_ms = math.max(0, number('until') - now, number('blocked') - now)
  elseif number('blocked') > now then
    retry_ms = number('blocked') - now
  elseif state == 'half_open' and not probe and leased() then
    retry_ms = math.min(number('lease_until') - now, rules.probe_wait_ms)
  end
  local closed_at, start = number('closed_at'), rules.ramp_from_permille
  if state == 'closed' and closed_at > 0 and now < closed_at + rules.ramp_ms then
    permille = start + math.floor((1000 - start) * (now - closed_at) / rules.ramp_ms)
  end
  return {state, number('generation'), retry_ms, permille, probe and 1 or 0, number('opens')}
end

local function save()
  -- A clean admit writes nothing: it has no part in replication, in the append-only file, or in the clock.
  if not next(changed) then return end
  set('last', now)
  local pairs_to_set = {}
  for field, value in pairs(changed) do
    pairs_to_set[#pairs_to_set + 1] = field
    pairs_to_set[#pairs_to_set + 1] = value
  end
  redis.call('HSET', key, unpack(pairs_to_set))
  if stored.state == 'forced_open' or stored.state == 'forced_closed' then
    redis.call('PERSIST', key)
  else
    redis.call('PEXPIRE', key, rules.ttl_ms)
  end
end

local function admit(lease, lease_ms)
  wake()
  local probe = stored.state == 'half_open' and number('blocked') <= now and not leased()
  if probe then
    set('lease', lease)
    set('lease_until', now + lease_ms)
  end
  return look(probe)
end

local function release()
  set('lease', '')
  set('lease_until', 0)
end

local function report(told, jitter)
  set('last', now)
  hear(told, jitter)
end

return {
  wake = wake, admit = admit, release = release, report = report, force = force, look = look, save = save,
  state = function() return stored.state end,
}
