"""The supervisor with stand-in processes: real forks, real signals, real kill -9.

The supervisor under test runs in a process of its own (DRIVER), since it takes over signals and must be killable.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stillhouse.cli import down, liveness, process, up, valkey
from stillhouse.cli.console import EXIT_RUNNING, EXIT_USAGE, CliError
from stillhouse.cli.deployment import Deployment
from stillhouse.core.config import Settings

BEAT = """
import os, sys, time
while True:
    with open(os.path.join(os.environ["STILLHOUSE_HOME"], "beat"), "w") as beat: beat.write(str(time.monotonic()))
    time.sleep(0.02)
"""
SLEEP = "import time\nwhile True: time.sleep(0.05)"
# starts a child of its own in the same group, as an engine with workers does
PARENT = (
    f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {SLEEP!r}])\nwhile True: time.sleep(0.05)"
)
DRIVER = """
import json, os, sys
from stillhouse.cli.deployment import Deployment
from stillhouse.cli.liveness import Liveness
from stillhouse.cli.process import ProcessSpec
from stillhouse.cli.supervisor import Supervisor
deployment = Deployment(sys.argv[1])
deployment.prepare()
with deployment.lock():
    supervisor = Supervisor(deployment, report=lambda text: print(text, file=sys.stderr, flush=True),
                            drain_s=float(sys.argv[2]), facts={"pid": os.getpid(), "drain_s": float(sys.argv[2])})
    beat = deployment.home / "beat"
    look = lambda: {"sampler-0": beat.read_text() if beat.exists() else None, "teacher-0": os.urandom(8)}
    supervisor.watch(Liveness(look, float(sys.argv[4]), look_s=0.1))
    supervisor.handle_signals()
    stand_ins = json.loads(sys.argv[3])
    supervisor.start([ProcessSpec(name, role, (sys.executable, "-c", code)) for name, role, code in stand_ins])
    supervisor.facts["status"] = "ready"
    supervisor.save()
    supervisor.run()
    supervisor.stop()
"""


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = 15.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if result := condition():
            return result
        time.sleep(0.02)
    raise AssertionError(f"waited {timeout_s} s for {what}")


class Driver:
    """A supervisor of stand-ins, in a process of its own."""

    def __init__(
        self, home: Path, specs: list[tuple[str, str, str]], drain_s: float = 5.0, hang_s: float = 0.0
    ) -> None:
        self.deployment = Deployment(home)
        self.log = home.parent / "driver.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", DRIVER, str(home), str(drain_s), json.dumps(specs), str(hang_s)],
                env={**os.environ, "STILLHOUSE_HOME": str(home)},
                stderr=log,
            )
        wait_until(lambda: self.deployment.read_state().get("status") == "ready", "the supervisor")

    def service(self, name: str) -> dict[str, Any]:
        return next(s for s in self.deployment.read_state()["services"] if s["name"] == name)

    def pid(self, name: str) -> int:
        return wait_until(lambda: self.service(name)["pid"], f"{name} to run")

    def pids(self) -> list[int]:
        return with_home(self.deployment.home, but=self.process.pid)


def with_home(home: Path, *, but: int = 0) -> list[int]:
    """Living processes whose environment names this home: the oracle for orphans, independent of what we recorded."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == but or not process.is_alive(int(entry.name)):
            continue
        try:
            environ = (entry / "environ").read_bytes()
        except OSError:
            continue
        if f"STILLHOUSE_HOME={home}\0".encode() in environ:
            found.append(int(entry.name))
    return found


@pytest.fixture
def drivers(tmp_path: Path) -> Iterator[Callable[..., Driver]]:
    started: list[Driver] = []

    def start(specs: list[tuple[str, str, str]], drain_s: float = 5.0, hang_s: float = 0.0) -> Driver:
        started.append(Driver(tmp_path / "home", specs, drain_s, hang_s))
        return started[-1]

    yield start
    for driver in started:
        driver.process.kill()
        driver.process.wait()
        for pid in with_home(driver.deployment.home):
            os.kill(pid, signal.SIGKILL)


def test_a_killed_process_comes_back_and_the_pauses_grow(drivers: Callable[..., Driver]) -> None:
    driver = drivers([("sampler-0", "sampler", SLEEP), ("teacher-0", "teacher", SLEEP)])
    teacher = driver.pid("teacher-0")
    for restarts in (1, 2, 3):
        first = driver.pid("sampler-0")
        os.kill(first, signal.SIGKILL)
        wait_until(lambda n=restarts: driver.service("sampler-0")["restarts"] == n, f"restart {restarts}")
        assert driver.pid("sampler-0") != first
    log = driver.log.read_text()
    assert [line.rpartition("restart in ")[2] for line in log.splitlines()] == ["0.2 s", "0.4 s", "0.8 s"]
    assert "sampler-0 was killed by SIGKILL" in log
    assert driver.pid("teacher-0") == teacher, "the others go on"


def test_a_frozen_process_is_killed_and_comes_back(drivers: Callable[..., Driver]) -> None:
    driver = drivers([("sampler-0", "sampler", BEAT), ("teacher-0", "teacher", SLEEP)], hang_s=1.0)
    frozen, teacher = driver.pid("sampler-0"), driver.pid("teacher-0")
    wait_until((driver.deployment.home / "beat").exists, "its first sign of life")
    os.kill(frozen, signal.SIGSTOP)
    wait_until(lambda: driver.service("sampler-0")["restarts"] == 1, "the restart")
    assert not process.is_alive(frozen)
    assert "sampler-0 gave no sign of life for 1 s and was killed; restart in 0.2 s" in driver.log.read_text()
    assert driver.pid("teacher-0") == teacher, "the others go on"


class Witness:
    """A liveness with signs and a clock of its own; `look` is what the next look sees."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, hang_s: float = 15.0) -> None:
        self.now = 1000.0
        self.seen: dict[str, Any] | None = {}
        self.children: list[Any] = [
            SimpleNamespace(spec=SimpleNamespace(name=name, role=name.partition("-")[0]), pid=pid)
            for pid, name in enumerate(("valkey", "sampler-0", "trainer-0"), 1)
        ]
        self._liveness = liveness.Liveness(lambda: self.seen, hang_s)
        monkeypatch.setattr(liveness.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(liveness.threading, "Thread", OnTheSpot)

    def look(self, seen: dict[str, Any] | None, after_s: float = 2.0) -> list[str]:
        """Names of the children that are silent for too long."""
        self.now += after_s
        self.seen = seen
        return [child.spec.name for child, _ in self._liveness.silent(self.children)]


class OnTheSpot:
    """A thread that has ended when it starts."""

    def __init__(self, target: Callable[[], None], **_: Any) -> None:
        self.start = target

    def is_alive(self) -> bool:
        return False


def all_well(look: int) -> dict[str, Any]:
    return {"valkey": look, "sampler-0": look, "trainer-0": look}


def test_only_the_silent_one_is_guilty_and_after_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    witness = Witness(monkeypatch)
    assert witness.look(all_well(0)) == []
    verdicts = [witness.look({**all_well(look), "sampler-0": 0}) for look in range(1, 9)]
    assert verdicts == [[]] * 7 + [["sampler-0"]], "silent for 16 s, looked at every 2 s"


def test_a_supervisor_that_slept_accuses_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    witness = Witness(monkeypatch)
    witness.look(all_well(0))
    assert witness.look(all_well(0), after_s=3600) == [], "the others slept with it"
    assert witness.look(all_well(1)) == []


def test_a_silent_queue_server_is_the_only_one_to_blame(monkeypatch: pytest.MonkeyPatch) -> None:
    witness = Witness(monkeypatch)
    witness.look(all_well(0))
    assert [witness.look(None) for _ in range(8)] == [[]] * 7 + [["valkey"]]
    witness.children[0].pid = 77
    back = [witness.look({**all_well(0), "valkey": look}) for look in range(7)]
    assert back == [[]] * 7, "the services have as long as ever to find it again"


def test_heartbeats_that_all_stop_at_once_are_not_the_services_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """A queue server whose disk is full answers and keeps no heartbeat."""
    witness = Witness(monkeypatch)
    witness.look(all_well(0))
    assert [witness.look({**all_well(0), "valkey": look}) for look in range(1, 30)] == [[]] * 29
    assert witness.look({**all_well(0), "valkey": 30, "trainer-0": 30}) == [], "one beat is the first of all"
    late = [witness.look({**all_well(look), "sampler-0": 0}) for look in range(31, 40)]
    assert late.index(["sampler-0"]) == 6, "but who stays silent is found: 15 s after they could beat again"


def test_a_starting_process_has_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    witness = Witness(monkeypatch)
    witness.look(all_well(0))
    witness.children[1].pid = 77
    starting = [witness.look({"valkey": look, "trainer-0": look}) for look in range(1, 100)]
    assert starting.index(["sampler-0"]) == liveness.START_S / liveness.LOOK_S


def test_no_limit_no_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    witness = Witness(monkeypatch, hang_s=0)
    witness.look(all_well(0))
    assert [witness.look({}) for _ in range(100)] == [[]] * 100


def test_a_crash_takes_the_rest_of_its_group_along(drivers: Callable[..., Driver]) -> None:
    driver = drivers([("sampler-0", "sampler", PARENT)])
    old = driver.pid("sampler-0")
    wait_until(lambda: len(driver.pids()) == 2, "the worker of the service")
    os.kill(old, signal.SIGKILL)
    wait_until(lambda: driver.service("sampler-0")["restarts"] == 1, "the restart")
    wait_until(lambda: len(driver.pids()) == 2, "one service and one worker, the old worker gone")


def test_sigterm_stops_in_order_and_leaves_nothing(drivers: Callable[..., Driver], tmp_path: Path) -> None:
    order = tmp_path / "order"
    roles = ("valkey", "trainer", "teacher", "sampler", "gateway")  # started in the opposite order
    driver = drivers([(role, role, polite(order, tmp_path / role, role)) for role in roles])
    wait_until(lambda: all((tmp_path / role).exists() for role in roles), "all handlers")
    driver.process.send_signal(signal.SIGTERM)
    assert driver.process.wait(timeout=20) == 0
    assert order.read_text().split() == ["gateway", "sampler", "teacher", "trainer", "valkey"]
    assert driver.pids() == []
    state = driver.deployment.read_state()
    assert state["status"] == "stopped"
    assert {s["state"] for s in state["services"]} == {"stopped"}


def test_who_does_not_drain_is_killed(drivers: Callable[..., Driver], tmp_path: Path) -> None:
    driver = drivers([("sampler-0", "sampler", stubborn(tmp_path / "deaf"))], drain_s=0.3)
    wait_until((tmp_path / "deaf").exists, "the handler")
    driver.process.send_signal(signal.SIGTERM)
    assert driver.process.wait(timeout=20) == 0
    assert driver.pids() == []
    assert "sampler-0 killed: it did not stop within 0.3 s" in driver.log.read_text()


def test_a_second_signal_ends_the_patience(drivers: Callable[..., Driver], tmp_path: Path) -> None:
    driver = drivers([("sampler-0", "sampler", stubborn(tmp_path / "deaf"))], drain_s=600)
    wait_until((tmp_path / "deaf").exists, "the handler")
    driver.process.send_signal(signal.SIGTERM)
    wait_until(lambda: driver.deployment.read_state()["status"] == "stopping", "the stop to begin")
    driver.process.send_signal(signal.SIGINT)
    assert driver.process.wait(timeout=40) == 0
    assert "killed: a second signal" in driver.log.read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="parent-death signals are Linux's")
def test_nothing_outlives_a_killed_supervisor(drivers: Callable[..., Driver]) -> None:
    driver = drivers([("valkey", "valkey", SLEEP), ("sampler-0", "sampler", SLEEP)])
    wait_until(lambda: len(driver.pids()) == 2, "both")
    driver.process.kill()
    driver.process.wait()
    wait_until(lambda: driver.pids() == [], "the children to follow")
    assert driver.deployment.supervisor_pid() is None, "the kernel dropped the lock"


def test_state_file_tells_what_runs(drivers: Callable[..., Driver]) -> None:
    driver = drivers([("sampler-0", "sampler", SLEEP)])
    state = driver.deployment.read_state()
    assert state["pid"] == driver.process.pid == driver.deployment.supervisor_pid()
    assert abs(state["updated"] - time.time()) < 60
    service = driver.service("sampler-0")
    assert process.is_alive(service["pid"])
    assert (service["role"], service["state"], service["restarts"]) == ("sampler", "running", 0)
    assert os.getpgid(service["pid"]) == os.getsid(service["pid"]) == service["pid"]
    assert (process.memory_bytes(service["pid"]) or 0) > 1_000_000
    assert driver.deployment.state_file.stat().st_mode & 0o077 == 0


def test_down_stops_everything_and_is_harmless_afterwards(
    drivers: Callable[..., Driver], capsys: pytest.CaptureFixture[str]
) -> None:
    driver = drivers([("valkey", "valkey", SLEEP), ("sampler-0", "sampler", PARENT)])
    wait_until(lambda: len(driver.pids()) == 3, "all processes")
    down.down(driver.deployment)
    assert driver.process.wait(timeout=40) == 0
    assert driver.pids() == []
    assert "stopped in" in capsys.readouterr().out
    down.down(driver.deployment)
    assert capsys.readouterr().out == f"nothing is running in {driver.deployment.home}\n"


def test_down_removes_what_a_killed_supervisor_left(
    drivers: Callable[..., Driver], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    driver = drivers([("sampler-0", "sampler", stubborn(tmp_path / "deaf"))], drain_s=0.3)
    wait_until((tmp_path / "deaf").exists, "the handler")
    driver.process.kill()
    driver.process.wait()
    assert len(driver.pids()) == 1, "it ignores the parent-death signal"
    down.down(driver.deployment)
    assert driver.pids() == []
    assert "removed 1 processes" in capsys.readouterr().out


def test_down_spares_strangers_with_a_recycled_pid(tmp_path: Path) -> None:
    deployment = Deployment(tmp_path / "home")
    deployment.prepare()
    stranger = subprocess.Popen([sys.executable, "-c", SLEEP], start_new_session=True, env={"PATH": os.environ["PATH"]})
    try:
        deployment.write_state({"services": [{"name": "sampler-0", "role": "sampler", "pid": stranger.pid}]})
        assert down.remove_leftovers(deployment, drain_s=0.1) == []
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_looking_at_the_lock_disturbs_nobody(tmp_path: Path) -> None:
    import fcntl

    deployment = Deployment(tmp_path / "home")
    deployment.prepare()
    with deployment.lock():
        assert deployment.supervisor_pid() == os.getpid()
    assert deployment.lock_file.read_text() == "", "no number of one that has gone"
    with deployment.lock_file.open() as other:
        fcntl.flock(other, fcntl.LOCK_SH)  # another command looks
        assert deployment.supervisor_pid() is None


def test_down_signals_no_stranger_that_the_lock_file_names(tmp_path: Path) -> None:
    import fcntl

    deployment = Deployment(tmp_path / "home")
    deployment.prepare()
    stranger = subprocess.Popen([sys.executable, "-c", SLEEP])
    try:
        for pid in (0, stranger.pid):
            deployment.lock_file.write_text(str(pid))
            with deployment.lock_file.open() as holder:
                fcntl.flock(holder, fcntl.LOCK_EX)
                with pytest.raises(CliError, match=rf"not by the process it names \(pid {pid or '.'}"):
                    down.down(deployment)
        assert stranger.poll() is None
        with pytest.raises(ValueError, match="no single process"):
            process.send([0], signal.SIGTERM)
    finally:
        stranger.kill()
        stranger.wait()


def test_a_full_disk_does_not_end_the_supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stillhouse.cli.supervisor import Supervisor

    def full(self: Deployment, state: dict[str, Any]) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Deployment, "write_state", full)
    reports: list[str] = []
    Supervisor(Deployment(tmp_path), report=reports.append, drain_s=1).save()
    assert "No space left on device" in reports[0]


def test_the_slower_of_two_ups_says_that_one_runs(tmp_path: Path) -> None:
    loser = subprocess.Popen([sys.executable, "-c", f"raise SystemExit({EXIT_RUNNING})"])
    with pytest.raises(CliError, match="already running") as caught:
        up._wait_detached(Deployment(tmp_path), loser)
    assert caught.value.exit_code == EXIT_RUNNING


def test_up_twice_names_pid_and_home(drivers: Callable[..., Driver]) -> None:
    driver = drivers([("sampler-0", "sampler", SLEEP)])
    with pytest.raises(CliError) as caught:
        up.up(driver.deployment, up.UpOptions(), detach=True)
    assert caught.value.exit_code == EXIT_RUNNING
    assert str(driver.process.pid) in caught.value.message
    assert str(driver.deployment.home) in caught.value.message


def test_busy_port_is_refused_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(up, "NEEDED_PACKAGES", ())
    home = tmp_path / "home"
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(CliError) as caught:
            up.up(Deployment(home), up.UpOptions(port=port), detach=False)
    assert caught.value.exit_code == EXIT_USAGE
    assert str(port) in caught.value.message
    assert "--port" in caught.value.fix
    assert not home.exists()


def test_a_service_that_cannot_start_ends_the_wait_with_its_log(tmp_path: Path) -> None:
    from stillhouse.cli.supervisor import Supervisor

    deployment = Deployment(tmp_path / "home")
    deployment.prepare()
    supervisor = Supervisor(deployment, report=lambda _: None, drain_s=1)
    broken = process.ProcessSpec("gateway-0", "gateway", (sys.executable, "-c", "raise SystemExit('no such setting')"))
    supervisor.start([broken])
    with pytest.raises(CliError, match=r"(?s)gateway-0 died 3 times while starting.*no such setting"):
        supervisor.wait_until(lambda: False, timeout_s=30, what="never")
    supervisor.stop()
    with pytest.raises(CliError, match="cannot start ghost"):
        supervisor.start([process.ProcessSpec("ghost", "ghost", ("/nonexistent/program",))])


def test_restart_pause_doubles_to_its_limit_and_health_resets_it(tmp_path: Path) -> None:
    deployment = Deployment(tmp_path)
    spec = process.ProcessSpec("sampler-0", "sampler", (sys.executable, "-c", ""))
    child = process.Child(spec, deployment, healthy_s=10**9)
    assert [round(child.plan_restart(), 1) for _ in range(8)] == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0]
    healthy = process.Child(spec, deployment, healthy_s=0)
    assert [healthy.plan_restart() for _ in range(3)] == [0.2, 0.2, 0.2]


def test_embedded_queue_server_is_private_and_durable(tmp_path: Path) -> None:
    import redis

    from stillhouse.cli.supervisor import Supervisor

    deployment = Deployment(tmp_path / 'a "quoted" home')
    deployment.prepare()
    port = valkey.choose_port(None)
    valkey.write_config(deployment, port)
    password = deployment.valkey_password.read_text()
    supervisor = Supervisor(deployment, report=lambda _: None, drain_s=5)
    supervisor.start([valkey.process(deployment)])
    try:
        assert supervisor.wait_until(lambda: valkey.answers(deployment, port), 30, "valkey")
        first = supervisor.children[0].pid
        assert first
        assert password not in Path(f"/proc/{first}/cmdline").read_text()
        assert first in process.ours([first], deployment.home), "recognisable by its environment"
        client = redis.Redis(port=port, password=password)
        with pytest.raises(redis.AuthenticationError):
            redis.Redis(port=port).ping()
        for name, value in {"appendfsync": "always", "maxmemory-policy": "noeviction", "save": ""}.items():
            assert client.config_get(name)[name] == value
        client.set("kept", "yes")
        os.kill(first, signal.SIGKILL)
        supervisor.wait_until(lambda: supervisor.children[0].restarts == 1, 30, "the restart")
        supervisor.wait_until(lambda: valkey.answers(deployment, port), 30, "valkey again")
        assert redis.Redis(port=port, password=password).get("kept") == b"yes"
        assert valkey.choose_port(port) != port, "taken"
    finally:
        supervisor.stop()
    assert valkey.choose_port(port) == port, "free again, and remembered"
    for secret in (deployment.valkey_password, deployment.internal_token, deployment.valkey_config):
        assert secret.stat().st_mode & 0o777 == 0o600
    assert deployment.home.stat().st_mode & 0o777 == 0o700


def test_every_service_gets_its_own_address_and_the_shared_secrets_by_file(tmp_path: Path) -> None:
    deployment = Deployment(tmp_path)
    options = up.UpOptions(port=8470, samplers=2, teachers=1, trainers=2, threads=3)
    specs = {spec.name: spec for spec in up.plan(deployment, Settings(), options, 8470, 6400)}
    assert list(specs) == ["gateway-0", "sampler-0", "sampler-1", "teacher-0", "trainer-0", "trainer-1"]
    assert specs["gateway-0"].env["STILLHOUSE_PORT"] == "8470"
    for name, spec in specs.items():
        assert spec.env["STILLHOUSE_INSTANCE"] == name
        assert spec.env["STILLHOUSE_SUPERVISED"] == "1"
        assert spec.env["STILLHOUSE_THREADS"] == spec.env["OMP_NUM_THREADS"] == "3"
        assert "STILLHOUSE_INTERNAL_TOKEN" not in spec.env
        assert spec.argv[1:] == ("-m", f"stillhouse.{spec.role}")
        if spec.role != "gateway":
            assert spec.env["STILLHOUSE_PORT"] == "0", "a port in the user's shell is meant for the gateway"


def test_samplers_and_teachers_have_engines_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def engines(settings: Settings, options: up.UpOptions) -> list[str | None]:
        specs = up.plan(Deployment(tmp_path), settings, options, 8470, 6400)
        return [spec.env.get("STILLHOUSE_ENGINE") for spec in specs]

    assert engines(Settings(), up.UpOptions()) == [None, "transformers", "transformers", None]
    assert engines(Settings(engine="vllm"), up.UpOptions(teacher_engine="transformers")) == [
        None,
        "vllm",
        "transformers",
        None,
    ]
    monkeypatch.setattr(up, "find_spec", lambda name: None if name == "vllm" else object())
    for engine, said in (("vllm", "not installed"), ("vlm", "there are transformers, vllm")):
        with pytest.raises(CliError, match=said):
            up.up(Deployment(tmp_path / "home"), up.UpOptions(sampler_engine=engine), detach=False)


def test_a_server_for_scores_has_neither_samplers_nor_trainers(tmp_path: Path) -> None:
    options = up.UpOptions(teachers=2, only="teacher")
    specs = up.plan(Deployment(tmp_path), Settings(trainer_ranks=3), options, 8470, 6400)
    assert [spec.name for spec in specs] == ["gateway-0", "teacher-0", "teacher-1"]
    cores = len(os.sched_getaffinity(0))
    assert specs[1].env["STILLHOUSE_THREADS"] == str(max(1, cores // 2)), "cores are shared by what runs"
    with pytest.raises(CliError, match="--only teacher"):
        up.up(Deployment(tmp_path / "home"), up.UpOptions(only="trainer"), detach=False)


def test_overlong_logs_are_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stillhouse.cli import deployment as module

    monkeypatch.setattr(module, "LOG_LIMIT_BYTES", 10)
    deployment = Deployment(tmp_path)
    deployment.prepare()
    for round_number in range(6):
        fd = deployment.open_log("sampler-0")
        os.write(fd, f"round {round_number}, twelve bytes".encode())
        os.close(fd)
    kept = {path.name: path.read_text() for path in deployment.logs.iterdir()}
    assert sorted(kept) == ["sampler-0.log", "sampler-0.log.1", "sampler-0.log.2", "sampler-0.log.3"]
    assert [kept[name][6] for name in sorted(kept)] == ["5", "4", "3", "2"]


def polite(order: Path, ready: Path, role: str) -> str:
    """Notes its name when asked to stop."""
    return f"""
import pathlib, signal, sys, time
def stop(*_):
    with open({str(order)!r}, "a") as file:
        file.write({role!r} + "\\n")
    sys.exit()
signal.signal(signal.SIGTERM, stop)
pathlib.Path({str(ready)!r}).touch()
while True: time.sleep(0.05)
"""


def stubborn(ready: Path) -> str:
    """Ignores SIGTERM."""
    return f"""
import pathlib, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path({str(ready)!r}).touch()
while True: time.sleep(0.05)
"""
