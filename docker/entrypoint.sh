#!/bin/sh
# Names this container to the others: they reach it under its own host name, also when a service runs several times.
set -eu
: "${STILLHOUSE_ADVERTISE_HOST:=$(hostname)}"
export STILLHOUSE_ADVERTISE_HOST
exec "$@"
