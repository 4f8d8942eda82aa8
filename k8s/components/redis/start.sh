#!/bin/sh
# One user with the commands that Stillhouse uses; nobody knows the password of the default user, as whom the log is replayed.
set -eu
digest=$(tr -d '[:space:]' < /secrets/redis-password | sha256sum | cut -d ' ' -f 1)
nobody=$(head -c 32 /dev/urandom | sha256sum | cut -d ' ' -f 1)
cat > /tmp/users.acl <<ACL
user default on #$nobody ~* &* +@all
user stillhouse on #$digest ~sh:* &* +@all -@admin -@dangerous +info
ACL
exec redis-server \
  --bind 0.0.0.0 --port 6379 --protected-mode no --daemonize no \
  --dir /data --appendonly yes --appendfsync always --save '' \
  --maxmemory "${REDIS_MAXMEMORY:-512mb}" --maxmemory-policy noeviction \
  --aclfile /tmp/users.acl
