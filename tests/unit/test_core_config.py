"""Settings: file, environment, and the refusal of what nobody knows."""

from __future__ import annotations

from pathlib import Path

import pytest
from redis.asyncio.connection import parse_url

from stillhouse.core.config import load_settings
from stillhouse.core.errors import ConfigError


def test_the_environment_wins_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("lease_s: 7\nthreads: 3\n")
    settings = load_settings({"STILLHOUSE_HOME": str(tmp_path), "STILLHOUSE_THREADS": "5"})
    assert (settings.lease_s, settings.threads) == (7, 5)
    assert settings.artifacts_dir() == tmp_path / "artifacts"


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"STILLHOUSE_LEASES": "3"}, ["STILLHOUSE_LEASES", "lease_s"]),
        ({"STILLHOUSE_LEASE_S": "-1"}, ["lease_s", "STILLHOUSE_LEASE_S"]),
        ({"STILLHOUSE_REDIS_PASSWORD_FILE": "/nowhere"}, ["/nowhere"]),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, environ: dict[str, str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings({"STILLHOUSE_HOME": str(tmp_path), **environ})
    for word in words:
        assert word in caught.value.message


def test_an_unknown_key_in_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("leese_s: 7\n")
    with pytest.raises(ConfigError, match="leese_s"):
        load_settings({"STILLHOUSE_HOME": str(tmp_path)})


def test_secrets_come_from_files(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("p4ss\n")
    (tmp_path / "token").write_text("a-token-of-the-deployment\n")
    settings = load_settings(
        {
            "STILLHOUSE_HOME": str(tmp_path),
            "STILLHOUSE_REDIS_PASSWORD_FILE": str(tmp_path / "password"),
            "STILLHOUSE_INTERNAL_TOKEN_FILE": str(tmp_path / "token"),
        }
    )
    assert settings.redis_url == "redis://:p4ss@127.0.0.1:6379/0"
    assert settings.internal_token == "a-token-of-the-deployment"
    settings.check_internal_token()


def test_a_password_may_hold_any_character(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("p@ss/w:rd#%\n")
    settings = load_settings(
        {"STILLHOUSE_HOME": str(tmp_path), "STILLHOUSE_REDIS_PASSWORD_FILE": str(tmp_path / "password")}
    )
    options = parse_url(settings.redis_url)
    assert (options.get("password"), options.get("host"), options.get("port")) == ("p@ss/w:rd#%", "127.0.0.1", 6379)


def test_a_service_does_not_start_without_a_credential(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="INTERNAL_TOKEN"):
        load_settings({"STILLHOUSE_HOME": str(tmp_path)}).check_internal_token()
