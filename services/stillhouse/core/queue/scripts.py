"""The scripts of the work queue, in Lua: each is one step on the server, done or not done.

A stream that is not in the epoch's set was closed (or never opened): adding to it would leave it behind for ever.
"""

from __future__ import annotations

from typing import Final

# KEYS record, streams set, stream; ARGV epoch, group
OPEN_STREAM: Final = """
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return 'CLOSED' end
redis.call('SADD', KEYS[2], KEYS[3])
local ok = redis.pcall('XGROUP', 'CREATE', KEYS[3], ARGV[2], '0', 'MKSTREAM')
if type(ok) == 'table' and ok.err and not string.find(ok.err, 'BUSYGROUP') then return ok end
return 'DONE'
"""

# KEYS record, marks, target, streams set; ARGV epoch, mark, payload
ADD: Final = """
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return 'CLOSED' end
if redis.call('SISMEMBER', KEYS[4], KEYS[3]) == 0 then return 'CLOSED' end
if redis.call('HSETNX', KEYS[2], ARGV[2], 1) == 0 then return 'DUP' end
redis.call('XADD', KEYS[3], '*', 'p', ARGV[3])
return 'DONE'
"""

# KEYS record, marks, target, source, dead, streams set, partial, partials set
# ARGV epoch, mark, payload, source group, source id ('' = keep it), dead payload ('' = none)
HAND_OVER: Final = """
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return 'CLOSED' end
if redis.call('SISMEMBER', KEYS[6], KEYS[3]) == 0 then return 'CLOSED' end
local outcome = 'DUP'
if redis.call('HSETNX', KEYS[2], ARGV[2], 1) == 1 then
  redis.call('XADD', KEYS[3], '*', 'p', ARGV[3])
  if ARGV[6] ~= '' then redis.call('XADD', KEYS[5], '*', 'p', ARGV[6]) end
  outcome = 'DONE'
end
if ARGV[5] ~= '' and redis.call('XACK', KEYS[4], ARGV[4], ARGV[5]) == 1 then
  redis.call('XDEL', KEYS[4], ARGV[5])
  if redis.call('SREM', KEYS[8], KEYS[7]) == 1 then redis.call('UNLINK', KEYS[7]) end
end
return outcome
"""

# The number of parts that the holder knows of fences two holders of one name. A part that is there already was appended
# by the call whose answer was lost. Progress: deliveries count anew.
# KEYS record, streams set, source, partial, partials set
# ARGV epoch, source group, source id, consumer, number of parts, part
APPEND_PARTIAL: Final = """
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return 'CLOSED' end
if redis.call('SISMEMBER', KEYS[2], KEYS[3]) == 0 then return 'CLOSED' end
local own = redis.pcall('XPENDING', KEYS[3], ARGV[2], ARGV[3], ARGV[3], 1, ARGV[4])
if own.err and not string.find(own.err, 'NOGROUP') then return own end
if own.err or #own == 0 then return 'LOST' end
local there = redis.call('LLEN', KEYS[4])
if there == ARGV[5] + 1 and redis.call('LINDEX', KEYS[4], -1) == ARGV[6] then return 'DONE' end
if there ~= ARGV[5] + 0 then return 'LOST' end
redis.call('SADD', KEYS[5], KEYS[4])
redis.call('RPUSH', KEYS[4], ARGV[6])
redis.call('XCLAIM', KEYS[3], ARGV[2], ARGV[4], 0, ARGV[3], 'RETRYCOUNT', 1, 'JUSTID')
return 'DONE'
"""

# KEYS stream, partials set, partial of each; ARGV group, ids...
ACK_DELETE: Final = """
local n = 0
for i = 2, #ARGV do
  if redis.call('XACK', KEYS[1], ARGV[1], ARGV[i]) == 1 then
    redis.call('XDEL', KEYS[1], ARGV[i])
    if redis.call('SREM', KEYS[2], KEYS[i + 1]) == 1 then redis.call('UNLINK', KEYS[i + 1]) end
    n = n + 1
  end
end
return n
"""

# KEYS stream; ARGV group, consumer, ids...  Answers the ids that are no longer the consumer's.
# JUSTID leaves the delivery count alone: renewing is no new attempt.
RENEW: Final = """
local lost = {}
for i = 3, #ARGV do
  local own = redis.pcall('XPENDING', KEYS[1], ARGV[1], ARGV[i], ARGV[i], 1, ARGV[2])
  if own.err and not string.find(own.err, 'NOGROUP') then return own end
  if not own.err and #own == 1 then
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[i], 'JUSTID')
  else
    lost[#lost + 1] = ARGV[i]
  end
end
return lost
"""

# KEYS stream; ARGV group, consumer, consumer for what is handed back, idle ms, then id and delivery count of each
HAND_BACK: Final = """
local n = 0
for i = 5, #ARGV, 2 do
  local own = redis.pcall('XPENDING', KEYS[1], ARGV[1], ARGV[i], ARGV[i], 1, ARGV[2])
  if own.err and not string.find(own.err, 'NOGROUP') then return own end
  if not own.err and #own == 1 then
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[3], 0, ARGV[i], 'IDLE', ARGV[4], 'RETRYCOUNT', ARGV[i + 1], 'JUSTID')
    n = n + 1
  end
end
return n
"""

# What nobody claimed, and one more if a claim was silent for too long. An entry is claimed or new: it leaves the stream
# when it is acknowledged.  KEYS streams; ARGV group, idle ms.  Answers a number for each, -1 = not there.
WAITING: Final = """
local found = {}
for i, key in ipairs(KEYS) do
  local claimed = redis.pcall('XPENDING', key, ARGV[1])
  if claimed.err and not string.find(claimed.err, 'NOGROUP') then return claimed end
  if claimed.err then
    found[i] = -1
  else
    local silent = redis.call('XPENDING', key, ARGV[1], 'IDLE', ARGV[2], '-', '+', 1)
    found[i] = redis.call('XLEN', key) - claimed[1] + #silent
  end
end
return found
"""

# KEYS streams set, partials set, then the epoch's other keys
CLOSE_EPOCH: Final = """
for set = 1, 2 do
  for _, key in ipairs(redis.call('SMEMBERS', KEYS[set])) do redis.call('UNLINK', key) end
end
for i = 1, #KEYS do redis.call('UNLINK', KEYS[i]) end
return 1
"""
