"""`stillhouse up`: a whole platform on one machine, from nothing but this Python environment.

Everything that can be refused is refused before the first process starts: a running deployment, a busy port, missing
packages, a bad setting. Then the queue server, then all services at once, then the wait until each of them has said
that it is there.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from stillhouse.cli import valkey
from stillhouse.cli.console import EXIT_RUNNING, EXIT_USAGE, INSTALL_FIX, VLLM_FIX, CliError, say
from stillhouse.cli.deployment import DEFAULT_HOME, PRIVATE_FILE, Deployment
from stillhouse.cli.down import remove_leftovers
from stillhouse.cli.liveness import HANG_S, Liveness, look_at
from stillhouse.cli.process import ProcessSpec
from stillhouse.cli.registry import live_services
from stillhouse.cli.supervisor import Supervisor
from stillhouse.core.blobs import read_json, write_json
from stillhouse.core.config import ENGINES, Settings, load_settings
from stillhouse.core.errors import NotFoundError, StillhouseError
from stillhouse.core.keys import create_key, hash_key, load_keys, remove_key
from stillhouse.core.launch import torchrun
from stillhouse.core.models import ModelRegistry

READY_TIMEOUT_S: Final = 180.0
"""Services import torch, which takes 5 s warm and may take a minute from a cold disk on two busy cores."""
NEEDED_PACKAGES: Final = ("fastapi", "uvicorn", "torch", "transformers", "safetensors")
"""What the services import; checked here, since a service that cannot import only leaves a traceback in its log."""
_DIRECT: Final = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Asks our own gateway, whatever http_proxy says."""
KEY_NAME: Final = "local"
"""Name of the API key in client.json."""


@dataclass(frozen=True, slots=True)
class UpOptions:
    """What the user asked for."""

    port: int = 8470
    """REST port; 0 = any free one."""
    samplers: int = 1
    teachers: int = 1
    trainers: int = 1
    """Each leads one job at a time, and takes over what another one leaves."""
    trainer_ranks: int = 0
    """Processes of each trainer, which split its student between them; 0 = the setting trainer_ranks."""
    threads: int = 0
    """Compute threads per process; 0 = the cores shared out evenly."""
    sampler_engine: str = ""
    """Engine of the samplers; "" = the setting engine."""
    teacher_engine: str = ""
    """Engine of the teachers; "" = the setting engine."""
    only: str = ""
    """"teacher": no samplers and no trainers, a server for scores."""
    hang: float = HANG_S
    """A process without a sign of life for so many seconds is killed and started again; 0 = never."""

    def workers(self) -> dict[str, int]:
        """Processes by role, the gateway and the queue server left out."""
        numbers = {"sampler": self.samplers, "teacher": self.teachers, "trainer": self.trainers}
        return {role: number for role, number in numbers.items() if self.only in ("", role)}


def up(deployment: Deployment, options: UpOptions, *, detach: bool) -> None:
    """Start a deployment; in the foreground return when it was stopped, detached when it is ready."""
    settings = _check(deployment, options)
    deployment.prepare()
    if detach:
        _run_detached(deployment, options)
        say(summary(deployment, deployment.read_state(), stop="stillhouse down"))
    else:
        _run(deployment, settings, options)


def _check(deployment: Deployment, options: UpOptions) -> Settings:
    """Settings of the deployment, after everything that can be refused was refused."""
    if deployment.supervisor_pid() is not None:
        raise deployment.already_running()
    settings = load_settings({**os.environ, "STILLHOUSE_HOME": str(deployment.home)})
    missing = [name for name in NEEDED_PACKAGES if find_spec(name) is None]
    if missing:
        raise CliError(
            f"the local services need packages that are not installed: {', '.join(missing)}",
            fix=INSTALL_FIX,
            exit_code=EXIT_USAGE,
        )
    if options.only not in ("", "teacher"):
        raise CliError(f"--only {options.only}: there is `--only teacher`, for scores", exit_code=EXIT_USAGE)
    if settings.trainer_nodes > 1:
        raise CliError(
            f"trainer_nodes is {settings.trainer_nodes}, and `stillhouse up` runs everything on this machine",
            fix="start `python -m stillhouse.trainer` on every node, as docs/nodes.md says",
            exit_code=EXIT_USAGE,
        )
    _check_engines(_engines(settings, options))
    valkey.find_binary()
    if "STILLHOUSE_REDIS_URL" in os.environ:
        _report("STILLHOUSE_REDIS_URL is set and not used: `stillhouse up` runs a queue server of its own")
    if options.port:
        _check_port(settings.host, options.port)
    return settings


def _engines(settings: Settings, options: UpOptions) -> dict[str, str]:
    """By role."""
    return {
        "sampler": options.sampler_engine or settings.engine,
        "teacher": options.teacher_engine or settings.engine,
    }


def _check_engines(engines: dict[str, str]) -> None:
    for role, engine in engines.items():
        if engine not in ENGINES:
            raise CliError(f"no engine '{engine}' for a {role}; there are {', '.join(ENGINES)}", exit_code=EXIT_USAGE)
    if "vllm" in engines.values() and find_spec("vllm") is None:
        raise CliError("the engine vllm is not installed", fix=VLLM_FIX, exit_code=EXIT_USAGE)


def _check_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise CliError(
                f"port {port} on {host} cannot be used: {error.strerror}",
                fix=f"choose another with --port, for example `stillhouse up --port {port % 65_535 + 1}`",
                exit_code=EXIT_USAGE,
            ) from None


def _run_detached(deployment: Deployment, options: UpOptions) -> None:
    command = [sys.executable, "-m", "stillhouse.cli.main", "up", "--home", str(deployment.home)]
    for name, value in asdict(options).items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    log = deployment.open_log("supervisor")
    try:
        process = subprocess.Popen(
            command,
            env={**os.environ, "STILLHOUSE_HOME": str(deployment.home)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    finally:
        os.close(log)
    try:
        _wait_detached(deployment, process)
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise


def _wait_detached(deployment: Deployment, process: subprocess.Popen[bytes]) -> None:
    while True:
        ended = process.poll() is not None  # looked at before the state, so that its last word is not missed
        state = deployment.read_state()
        is_its_own = state.get("pid") == process.pid
        if is_its_own and state.get("status") == "ready":
            return
        if ended and is_its_own and state.get("error"):
            raise CliError(state["error"], fix=state.get("fix", ""))
        if ended and process.returncode == EXIT_RUNNING:  # another `up` was faster between our look and its lock
            raise deployment.already_running()
        if ended:
            tail = deployment.log_tail("supervisor")
            raise CliError(f"the supervisor ended with {process.returncode}; the end of its log:\n{tail}")
        time.sleep(0.05)


def _run(deployment: Deployment, settings: Settings, options: UpOptions) -> None:
    """Be the supervisor, until a signal ends it."""
    with deployment.lock():
        if left := remove_leftovers(deployment, settings.drain_s):
            _report(f"removed {len(left)} processes that an earlier supervisor left behind")
        before = deployment.read_state()
        valkey_port = valkey.choose_port(before.get("valkey_port"))
        port = options.port or _free_port(settings.host)
        host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host
        url = f"http://{host}:{port}"
        valkey.write_config(deployment, valkey_port)
        _write_client_file(deployment, settings, url)
        supervisor = Supervisor(
            deployment,
            report=_report,
            drain_s=settings.drain_s,
            facts={
                "pid": os.getpid(),
                "url": url,
                "port": port,
                "home": str(deployment.home),
                "valkey_port": valkey_port,
                "drain_s": settings.drain_s,
                "only": options.only,
                "started_at": round(time.time(), 3),
            },
        )
        supervisor.watch(Liveness(look_at(deployment, valkey_port, supervisor.pid_of), options.hang))
        supervisor.handle_signals()
        try:
            if _start(supervisor, deployment, plan(deployment, settings, options, port, valkey_port), url):
                say(summary(deployment, supervisor.facts, stop="Ctrl-C, or `stillhouse down` from elsewhere"))
                supervisor.run()
        except StillhouseError as error:
            supervisor.facts.update(error=error.message, fix=getattr(error, "fix", ""))
            raise
        finally:
            supervisor.stop()
        _report("stopped")


def _start(supervisor: Supervisor, deployment: Deployment, specs: list[ProcessSpec], url: str) -> bool:
    """Bring everything up in order; False if the stop was requested meanwhile."""
    port = supervisor.facts["valkey_port"]
    supervisor.start([valkey.process(deployment)])
    if not supervisor.wait_until(lambda: valkey.answers(deployment, port), READY_TIMEOUT_S, "the queue server"):
        return False
    supervisor.start(specs)
    if not supervisor.wait_until(
        lambda: _is_ready(supervisor, deployment, url), READY_TIMEOUT_S, "all services to be ready"
    ):
        return False
    supervisor.facts["status"] = "ready"
    for child in supervisor.children:
        child.deaths_in_a_row = 0
    supervisor.save()
    return True


def plan(
    deployment: Deployment, settings: Settings, options: UpOptions, port: int, valkey_port: int
) -> list[ProcessSpec]:
    """The services to run. Their variables overrule what the user's shell exports, which is meant for one service."""
    ranks = options.trainer_ranks or settings.trainer_ranks
    threads = str(options.threads or settings.threads or _fair_threads(options, ranks))
    shared = {
        **deployment.environment(valkey_port),
        "STILLHOUSE_SUPERVISED": "1",
        "STILLHOUSE_METRICS_PORT": "0",
        "STILLHOUSE_THREADS": threads,
        "STILLHOUSE_TRAINER_RANKS": str(ranks),
        # read by OpenMP when torch is imported, before any of our code could set it
        "OMP_NUM_THREADS": threads,
    }
    inside = {"STILLHOUSE_HOST": "127.0.0.1", "STILLHOUSE_ADVERTISE_HOST": "127.0.0.1", "STILLHOUSE_PORT": "0"}
    engines = _engines(settings, options)
    names = [("gateway", "gateway-0")]
    names += [(role, f"{role}-{index}") for role, number in options.workers().items() for index in range(number)]
    return [
        ProcessSpec(
            name=name,
            role=role,
            argv=_command(role, ranks, settings.drain_s),
            env={
                **shared,
                **({"STILLHOUSE_PORT": str(port)} if role == "gateway" else inside),
                **({"STILLHOUSE_ENGINE": engines[role]} if role in engines else {}),
                "STILLHOUSE_INSTANCE": name,
            },
        )
        for role, name in names
    ]


def _command(role: str, ranks: int, drain_s: float) -> tuple[str, ...]:
    """How a service is started; a trainer of several ranks by torchrun, which ends all of them when one dies."""
    if role == "trainer" and ranks > 1:
        return torchrun(ranks, drain_s)
    return (sys.executable, "-m", f"stillhouse.{role}")


def _is_ready(supervisor: Supervisor, deployment: Deployment, url: str) -> bool:
    """The gateway says so, and each service is in the registry with the pid we started."""
    try:
        with _DIRECT.open(f"{url}/readyz", timeout=5) as answer:
            if answer.status != 200:
                return False
    except (urllib.error.URLError, OSError):
        return False
    found = {(info.role, info.instance): info.pid for info in asyncio.run(live_services(deployment))}
    return all(
        found.get((child.spec.role, child.spec.name)) == child.pid
        for child in supervisor.children
        if child.spec.role != "valkey"
    )


def _write_client_file(deployment: Deployment, settings: Settings, url: str) -> None:
    """client.json for this machine. The key is made once and kept as long as the gateway knows its hash."""
    try:
        known: dict[str, Any] = read_json(deployment.client_file)
    except NotFoundError:
        known = {}
    key, path = known.get("api_key") or "", settings.keys_path()
    if hash_key(key) not in {entry.sha256 for entry in load_keys(path)}:
        remove_key(path, KEY_NAME)  # its plain text is lost, so nobody can use it
        key = create_key(path, KEY_NAME, scopes=["admin"])
    write_json(deployment.client_file, {"url": url, "api_key": key}, mode=PRIVATE_FILE)


def summary(deployment: Deployment, state: dict[str, Any], *, stop: str) -> str:
    """What a user needs to know next, in a few lines."""
    settings = load_settings({**os.environ, "STILLHOUSE_HOME": str(deployment.home)})
    models = sorted(ModelRegistry(settings.models_path()).all())
    use = "score MODEL --text TEXT" if state.get("only") else "submit job.yaml --watch"
    following = f"stillhouse {use}" if models else "stillhouse models add NAME PATH"
    lines = [
        f"Stillhouse is up: {state['url']}",
        f"  home    {deployment.home}",
        f"  models  {', '.join(models) or 'none yet'}",
        f"  next    {following}",
        f"  stop    {stop}",
    ]
    if deployment.home != Path(DEFAULT_HOME).expanduser().resolve() and not os.environ.get("STILLHOUSE_HOME"):
        lines.insert(2, f"          other commands find it with: export STILLHOUSE_HOME={deployment.home}")
    return "\n".join(lines)


def _fair_threads(options: UpOptions, ranks: int) -> int:
    """Cores shared out evenly: threads of several processes on one core only spin against each other."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = options.workers()
    return max(1, cores // (sum(workers.values()) + workers.get("trainer", 0) * (ranks - 1)))


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def _report(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
