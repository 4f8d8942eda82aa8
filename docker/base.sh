#!/bin/sh
# What every image has beside its Python: tini, and the user that all runs as, who owns the folder of the data.
set -eu
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends tini
rm -rf /var/lib/apt/lists/*
groupadd --gid 10001 stillhouse
useradd --uid 10001 --gid 10001 --home-dir /var/lib/stillhouse --no-create-home --shell /usr/sbin/nologin stillhouse
install -d -o 10001 -g 10001 -m 0700 /var/lib/stillhouse
