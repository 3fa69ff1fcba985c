-- Keeps an answer; the oldest ones make room for it.
-- KEYS: the answer, the index by time of store in us, the sizes in bytes. ARGV: body, for how long in ms, most answers, most bytes.
local answer, index, sizes = KEYS[1], KEYS[2], KEYS[3]
local body, keep_ms, most, most_bytes = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]

local function sized(name, bytes)
  local before = tonumber(redis.call('HGET', sizes, name) or 0)
  if bytes > 0 then redis.call('HSET', sizes, name, bytes) else redis.call('HDEL', sizes, name) end
  return redis.call('HINCRBY', sizes, 'all', bytes - before)
end

-- Without its index the sizes are nobody's: what they are of goes when its time has come.
if redis.call('EXISTS', index) == 0 then redis.call('DEL', sizes) end
redis.call('SET', answer, string.format('%.0f ', now) .. body, 'PX', keep_ms)
redis.call('ZADD', index, now, answer)
local all = sized(answer, #body)
while redis.call('ZCARD', index) > most or all > most_bytes do
  local oldest = redis.call('ZPOPMIN', index)[1]
  redis.call('UNLINK', oldest)
  all = sized(oldest, 0)
end
