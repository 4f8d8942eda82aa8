"""The scripts behind `JobStore`: each is one step of the queue server."""

from __future__ import annotations

from typing import Final

from stillhouse.core.queue.client import BEYOND_MAXMEMORY

# KEYS record, jobs, active, idempotency, events
# ARGV id, created_at, idempotency value ('' = none), ttl, first event's id, the event ('' = none), field, value, ...
CREATE: Final = """
if ARGV[3] ~= '' then
  local old = redis.call('GET', KEYS[4])
  if old then return old end
  redis.call('SET', KEYS[4], ARGV[3], 'EX', ARGV[4])
end
if redis.call('EXISTS', KEYS[1]) == 0 then
  redis.call('HSET', KEYS[1], unpack(ARGV, 7))
  redis.call('ZADD', KEYS[2], ARGV[2], ARGV[1])
  redis.call('ZADD', KEYS[3], ARGV[2], ARGV[1])
  if ARGV[6] ~= '' then redis.call('XADD', KEYS[5], ARGV[5], 'event', ARGV[6]) end
end
return ''
"""

# KEYS record, lease, active, turn, turns; ARGV instance, lease_ms, highest epoch in the artifacts, job id, statuses
CLAIM: Final = f"""{BEYOND_MAXMEMORY}
local status = redis.call('HGET', KEYS[1], 'status')
if not status or status == 'succeeded' or status == 'failed' or status == 'cancelled' then
  redis.call('ZREM', KEYS[3], ARGV[4])
  return 0
end
if not string.find(ARGV[5], ',' .. status .. ',', 1, true) then return 0 end
if redis.call('EXISTS', KEYS[2]) == 1 then return 0 end
local epoch = math.max(tonumber(redis.call('HGET', KEYS[1], 'epoch') or '0'), tonumber(ARGV[3])) + 1
redis.call('SET', KEYS[2], ARGV[1] .. ':' .. epoch, 'PX', ARGV[2])
redis.call('HSET', KEYS[1], 'epoch', epoch, 'trainer', ARGV[1])
redis.call('HSET', KEYS[5], redis.call('HGET', KEYS[1], 'owner') or '', redis.call('INCR', KEYS[4]))
return epoch
"""

# KEYS lease, record; ARGV holder, lease_ms, epoch. A wiped or rebuilt record has another epoch: the claim is void.
RENEW: Final = f"""{BEYOND_MAXMEMORY}
if redis.call('HGET', KEYS[2], 'epoch') ~= ARGV[3] then return 0 end
local status = redis.call('HGET', KEYS[2], 'status')
if status == 'succeeded' or status == 'failed' or status == 'cancelled' then return 0 end
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""

# KEYS record, lease, active; ARGV epoch, job id, allowed statuses (',a,b,' or ''), release ('1' or ''), field, value..
UPDATE: Final = f"""{BEYOND_MAXMEMORY}
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return 'EPOCH' end
local status = redis.call('HGET', KEYS[1], 'status')
if ARGV[3] ~= '' and not string.find(ARGV[3], ',' .. status .. ',', 1, true) then return status end
if #ARGV > 4 then redis.call('HSET', KEYS[1], unpack(ARGV, 5)) end
local now = redis.call('HGET', KEYS[1], 'status')
if now == 'succeeded' or now == 'failed' or now == 'cancelled' then redis.call('ZREM', KEYS[3], ARGV[2]) end
if ARGV[4] ~= '' then redis.call('DEL', KEYS[2]) end
return 'DONE'
"""

# KEYS record, active; ARGV job id, allowed statuses, epoch ('' = any), field, value, ...
REQUEST: Final = f"""{BEYOND_MAXMEMORY}
local status = redis.call('HGET', KEYS[1], 'status')
if not status then return 'MISSING' end
if not string.find(ARGV[2], ',' .. status .. ',', 1, true) then return status end
if ARGV[3] ~= '' and redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[3] then return 'EPOCH' end
redis.call('HSET', KEYS[1], unpack(ARGV, 4))
local now = redis.call('HGET', KEYS[1], 'status')
if now == 'succeeded' or now == 'failed' or now == 'cancelled' then redis.call('ZREM', KEYS[2], ARGV[1]) end
return 'DONE'
"""

# KEYS stream; ARGV most entries, field, value. A history is trimmed, so it may grow beyond maxmemory.
TELL: Final = f"""{BEYOND_MAXMEMORY}
return redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[1], '*', ARGV[2], ARGV[3])
"""

# KEYS metrics, record; ARGV epoch, most entries, point. What a zombie measured belongs to no weights.
MEASURE: Final = f"""{BEYOND_MAXMEMORY}
if redis.call('HGET', KEYS[2], 'epoch') ~= ARGV[1] then return 0 end
redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[2], '*', 'point', ARGV[3])
return 1
"""

# KEYS active, turns; ARGV the beginning of a record's key. Of each job: id, status, owner, priority, whether it is led,
# and its owner's newest turn.
ACTIVE: Final = """
local found = {}
for _, id in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
  local fields = redis.call('HMGET', ARGV[1] .. id, 'status', 'owner', 'priority')
  if fields[1] then
    local is_led = redis.call('EXISTS', ARGV[1] .. id .. ':lease')
    local owner = fields[2] or ''
    local turn = redis.call('HGET', KEYS[2], owner) or '0'
    for _, value in ipairs({id, fields[1], owner, fields[3] or '0', is_led, turn}) do table.insert(found, value) end
  end
end
return found
"""
