#!/bin/sh
# Loading its log, it answers LOADING: not ready.
REDISCLI_AUTH=$(tr -d '[:space:]' < /secrets/redis-password) redis-cli --user stillhouse ping | grep -q PONG
