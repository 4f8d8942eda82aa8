#!/bin/sh
# The queue server: nothing lost (AOF at every write), nothing evicted, one user with the commands that Stillhouse uses.
set -eu
exec redis-server \
  --bind 0.0.0.0 --port 6379 --protected-mode no --daemonize no \
  --dir /data --appendonly yes --appendfsync always --save '' \
  --maxmemory "${REDIS_MAXMEMORY:-256mb}" --maxmemory-policy noeviction \
  --aclfile /secrets/redis-users.acl
