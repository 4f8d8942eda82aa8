"""Settings of a process: defaults, then `$STILLHOUSE_HOME/config.yaml`, then `STILLHOUSE_*` environment variables.

One class for all services, so that a ConfigMap or an .env file is one list. Unknown variables with our prefix are an
error: a misspelt setting must not be ignored.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args
from urllib.parse import quote

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stillhouse.core.errors import ConfigError

PREFIX = "STILLHOUSE_"
Engine = Literal["transformers", "vllm"]
ENGINES = get_args(Engine)


class Settings(BaseModel):
    """Settings of one Stillhouse process."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    home: Path = Path("~/.stillhouse")
    """Folder of the deployment: models.yaml, keys, logs, queue data, artifacts."""
    artifacts: Path | None = None
    """Folder of jobs and files; default: `home`/artifacts. All services must see the same one."""
    models_file: Path | None = None
    """Registry of models; default: `home`/models.yaml."""
    redis_url: str = "redis://127.0.0.1:6379/0"
    """The Redis or Valkey server, `redis://[[user]:password@]host:port/db`."""
    redis_password_file: Path | None = None
    """File with the password, where it should not stand in `redis_url`."""
    internal_token: str = ""
    """Credential of every call between services."""
    internal_token_file: Path | None = None
    """File with `internal_token`."""
    auth: Literal["keys", "none"] = "keys"
    """REST authentication: API keys, or none (only for a closed network, on purpose)."""
    api_keys_file: Path | None = None
    """Hashed API keys; default: `home`/api-keys.json."""
    host: str = "127.0.0.1"
    """Address that the process listens on."""
    advertise_host: str = ""
    """Address under which others reach it; default: `host`."""
    port: int = Field(default=0, ge=0, le=65535)
    """Port of the process (REST or gRPC); 0 = any free one, made known through the service registry."""
    metrics_port: int = Field(default=0, ge=0, le=65535)
    """Port of the Prometheus endpoint of a gRPC service; 0 = any free one."""
    instance: str = ""
    """Name of this process among its kind; default: role and a random suffix. In Kubernetes the pod's name."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Least important level that is logged."""
    log_format: Literal["auto", "json", "text"] = "auto"
    """auto = coloured text on a terminal, JSON elsewhere."""
    engine: Engine = "transformers"
    """Engine of sampler and teacher (`stillhouse up --sampler-engine`, `--teacher-engine`)."""
    vllm_tensor_parallel: int = Field(default=1, ge=1, le=64)
    """vLLM: devices that a model is split over."""
    vllm_memory_fraction: float = Field(default=0.9, gt=0, le=1)
    """vLLM on a GPU: share of its memory for weights, cache and work space."""
    vllm_cache_gib: float = Field(default=0, ge=0, le=100_000)
    """vLLM: memory for keys and values; 0 = on a GPU what `vllm_memory_fraction` leaves, on a CPU 1 GiB."""
    vllm_max_length: int = Field(default=0, ge=0, le=100_000_000)
    """vLLM: longest prompt and completion together, tokens; 0 = as long as the model can. The cache has to hold at
    least one of these."""
    vllm_eager: bool = True
    """vLLM: neither compile the model nor record CUDA graphs: starts in seconds instead of minutes, but decodes slower
    on a GPU."""
    threads: int = Field(default=0, ge=0, le=1024)
    """Compute threads of sampler, teacher and trainer; 0 = the library's default."""
    trainer_ranks: int = Field(default=1, ge=1, le=1024)
    """Processes, each with a device of its own, over which a trainer splits its student, those of all its nodes
    together; torchrun starts them (`stillhouse up --trainer-ranks`)."""
    trainer_nodes: int = Field(default=1, ge=1, le=256)
    """Machines or pods that these processes run on, as many on each (docs/nodes.md)."""
    trainer_node: int | None = Field(default=None, ge=0, le=255)
    """Number of this node, from 0; default: `JOB_COMPLETION_INDEX`, else the number at the end of the host's name."""
    trainer_port: int = Field(default=29_500, ge=1, le=65_535)
    """Port of node 0 where the ranks of several nodes meet."""
    trainer_group: str = Field(default="trainer", pattern=r"^[a-z0-9][a-z0-9.-]{0,62}$")
    """Name that the nodes of one trainer share, and no other trainer of several nodes has."""
    lease_s: float = Field(default=15.0, ge=0.2, le=3600)
    """A job, a sampler or a queue entry whose holder shows no sign of life for so long is taken over."""
    hang_s: float = Field(default=300.0, ge=0.2, le=86_400)
    """A computation without progress (no token, batch or micro-batch) for so long ends its process, which is then
    started again. Choose it longer than the slowest forward pass; loading and saving models have ten times as long."""
    drain_s: float = Field(default=20.0, ge=0.1, le=3600)
    """Time after SIGTERM to hand work back and commit."""
    sampler_max_sequences: int = Field(default=32, ge=1, le=4096)
    """Completions a sampler generates at once."""
    sampler_cache_gib: float = Field(default=4.0, gt=0, le=100_000)
    """Most memory for keys and values of a model that writes by the engine transformers; taken as it is needed. What
    does not fit waits, and a request that can never fit is refused."""
    sampler_keep_s: float = Field(default=1.0, ge=0.01, le=3600)
    """How often a sampler keeps what its running completions have so far, on the queue server. Another sampler goes on
    from there if this one dies."""
    trainer_memory_gib: float = Field(default=0.0, ge=0, le=100_000)
    """Most memory that a trainer may take for a job, by the estimate of its pre-flight; 0 = what is free when the job
    begins."""
    preflight_prompts: int = Field(default=8, ge=1, le=256)
    """Prompts that a live pre-flight has answered and judged."""
    preflight_tokens: int = Field(default=64, ge=1, le=32_768)
    """Longest of these answers, tokens."""
    preflight_wait_s: float = Field(default=60.0, ge=0.1, le=3600)
    """So long a live pre-flight waits for a free sampler with the student, and for each answer; what it cannot have by
    then is skipped, with the reason."""
    teacher_memory_gib: float = Field(default=8.0, gt=0, le=100_000)
    """Budget for the weights of teachers, in a teacher and in a sampler where they write; least recently used models
    leave first."""
    teacher_batch_tokens: int = Field(default=4096, ge=16, le=10_000_000)
    """Padded tokens per teacher forward pass."""
    score_cache_mib: int = Field(default=64, ge=0, le=10_000_000)
    """Scores a teacher remembers, so that a sample that is scored again costs nothing; 0 = none. Not used by
    deterministic jobs."""
    blob_memory_mib: int = Field(default=512, ge=1, le=10_000_000)
    """Score payloads a teacher keeps in memory; more spill to disk."""
    reflection: bool = True
    """Serve gRPC reflection (switch off in production)."""
    tls_cert: Path | None = None
    """Certificate of gRPC services; with `tls_key` and `tls_ca` all internal calls use mutual TLS."""
    tls_key: Path | None = None
    """Private key."""
    tls_ca: Path | None = None
    """CA that signed the other services' certificates."""
    tls_name: str = ""
    """Name that all of these certificates carry, where services are dialled by addresses that no certificate can name
    (pods); empty = the certificate names the address."""
    supervised: bool = False
    """Set by `stillhouse up`: stop when the supervisor dies."""
    max_body_mib: float = Field(default=1.0, gt=0, le=1024)
    """Largest REST body, file uploads excepted."""
    max_file_mib: float = Field(default=256.0, gt=0, le=100_000)
    """Largest uploaded file."""
    limit_requests_per_minute: float = Field(default=6000, ge=1, le=1_000_000)
    """Requests of an API key, all replicas together. This limit and the five below hold for keys without the scope
    `admin`; a key may have limits of its own (docs/api.md)."""
    limit_writes_per_minute: float = Field(default=600, ge=1, le=1_000_000)
    """Requests of an API key that may change something (not GET)."""
    limit_active_jobs: int = Field(default=100, ge=1, le=1_000_000)
    """Jobs of an owner that have not ended."""
    limit_job_tokens: float = Field(default=1e11, ge=1, le=1e15)
    """Completion tokens a job may ask for: steps x prompts_per_step x group_size x max_tokens, over its stages."""
    limit_daily_tokens: float = Field(default=1e12, ge=1, le=1e15)
    """The same, of all jobs that an owner submits in a day (UTC)."""
    limit_file_mib: float = Field(default=10_240, gt=0, le=1e12)
    """Uploaded files of an owner, together."""

    def resolved(self) -> Settings:
        """Defaults that depend on `home` filled in, secrets read from their files."""
        home = self.home.expanduser().resolve()
        url = self.redis_url
        if self.redis_password_file is not None:
            url = _with_password(url, _read_secret(self.redis_password_file))
        token = self.internal_token
        if self.internal_token_file is not None:
            token = _read_secret(self.internal_token_file)
        return self.model_copy(
            update={
                "home": home,
                "artifacts": (self.artifacts or home / "artifacts").expanduser().resolve(),
                "models_file": (self.models_file or home / "models.yaml").expanduser().resolve(),
                "api_keys_file": (self.api_keys_file or home / "api-keys.json").expanduser().resolve(),
                "advertise_host": self.advertise_host or self.host,
                "redis_url": url,
                "internal_token": token,
            }
        )

    def artifacts_dir(self) -> Path:
        """Folder of jobs and files, resolved."""
        return self.artifacts or self.home / "artifacts"

    def spill_dir(self) -> Path:
        """Where services put what memory has no room for."""
        return self.home / "spill"

    def models_path(self) -> Path:
        """The registry of models, resolved."""
        return self.models_file or self.home / "models.yaml"

    def keys_path(self) -> Path:
        """The file of hashed API keys, resolved."""
        return self.api_keys_file or self.home / "api-keys.json"

    def tls_options(self) -> list[tuple[str, str]]:
        """What tells a gRPC channel which name to look for in the other side's certificate."""
        return [("grpc.ssl_target_name_override", self.tls_name)] if self.tls_name else []

    def check_internal_token(self) -> None:
        """Refuse to start a service without the internal credential."""
        if len(self.internal_token) < 16:
            raise ConfigError(
                "the internal credential is missing or shorter than 16 characters; set STILLHOUSE_INTERNAL_TOKEN or "
                "STILLHOUSE_INTERNAL_TOKEN_FILE (`stillhouse up` does this for you)"
            )


# Variables with our prefix that are not settings of a service: the client's.
_CLIENT_VARIABLES = {"STILLHOUSE_URL", "STILLHOUSE_API_KEY"}
# Variables that only tests and the build read.
_FOREIGN_PREFIXES = ("STILLHOUSE_TEST_",)


def load_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """Settings from file and environment.

    Raises:
        ConfigError: unknown key or variable, or a value out of range; names it.
    """
    env = dict(os.environ if environ is None else environ)
    values: dict[str, object] = {}
    home = Path(env.get(PREFIX + "HOME", "~/.stillhouse")).expanduser()
    file = home / "config.yaml"
    if file.is_file():
        loaded = yaml.safe_load(file.read_text()) or {}
        if not isinstance(loaded, dict):
            raise ConfigError(f"{file} must hold `key: value` lines, got a {type(loaded).__name__}")
        values.update(loaded)
    for name, value in env.items():
        if not name.startswith(PREFIX) or name in _CLIENT_VARIABLES or name.startswith(_FOREIGN_PREFIXES):
            continue
        key = name.removeprefix(PREFIX).lower()
        if key not in Settings.model_fields:
            raise ConfigError(
                f"unknown environment variable {name}; settings are {', '.join(sorted(Settings.model_fields))}"
            )
        values[key] = value
    try:
        return Settings.model_validate(values).resolved()
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"setting {key} ({PREFIX}{key.upper()} or {file}): {first['msg']}", param=key) from None


def _read_secret(path: Path) -> str:
    try:
        return path.expanduser().read_text().strip()
    except OSError as error:
        raise ConfigError(f"cannot read the secret file {path}: {error.strerror}") from None


def _with_password(url: str, password: str) -> str:
    """The url with a password, unless it has one; `redis://name@host` is a user without one."""
    scheme, _, rest = url.partition("://")
    user, at, host = rest.rpartition("@")
    if at and ":" in user:
        return url
    return f"{scheme}://{user}:{quote(password, safe='')}@{host}"
