-- GCRA: one time per key, when all that was asked for would have come if it had come evenly. Takes the requests a minute.
-- Gives how many more may come at once, and how long to wait in ms; 0 is no wait, the request has counted.
local minute, rpm = 60e6, tonumber(ARGV[1])
local clock = redis.call('TIME')
local now = clock[1] * 1e6 + clock[2]
local even = math.max(now, tonumber(redis.call('GET', KEYS[1]) or 0)) + minute / rpm
local wait = even - now - minute
if wait > 0.5 then return {0, math.ceil(wait / 1000)} end
redis.call('SET', KEYS[1], string.format('%.0f', even), 'PX', math.ceil((even - now) / 1000))
return {math.max(0, math.floor((minute - (even - now)) * rpm / minute + 0.001)), 0}
