"""A trainer on two machines, each a network namespace of its own with one rank (gloo on CPUs).

One machine's processes are killed, all meet again and the job ends; then a machine loses its network. The weights are
those of two ranks on one machine.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from stillhouse.client.client import Client
from stillhouse.core.blobs import Artifacts, JobArtifacts
from stillhouse.core.models import ModelRegistry, inspect_model
from stillhouse.core.oracle.verify import verify_job
from tests.cluster import TOKEN, job_spec
from tests.conftest import free_port, start_valkey, stop_valkey
from tests.e2e.deployment import wait_until
from tests.e2e.hosts import Host, hosts
from tests.tiny import make_tiny_model

pytestmark = [pytest.mark.full, pytest.mark.timeout(400)]
STEPS = 12
TOLERANCE = 1e-5
"""Of weights: sums over ranks are taken in the same order, batches of sampler and teacher may not be the same."""
LEASE_S = 3.0


class Machines:
    """Queue server, gateway, sampler and teacher here; trainers where they are started."""

    def __init__(self, folder: Path, here: Host, valkey_port: int) -> None:
        self.folder = folder
        self.here = here
        self.artifacts = Artifacts(folder / "artifacts")
        self.port = free_port()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("STILLHOUSE_")} | {
            "STILLHOUSE_ARTIFACTS": str(folder / "artifacts"),
            "STILLHOUSE_MODELS_FILE": str(folder / "models.yaml"),
            "STILLHOUSE_REDIS_URL": f"redis://{here.address}:{valkey_port}/0",
            "STILLHOUSE_INTERNAL_TOKEN": TOKEN,
            "STILLHOUSE_AUTH": "none",
            "STILLHOUSE_LEASE_S": str(LEASE_S),
            "STILLHOUSE_THREADS": "1",
            "STILLHOUSE_DRAIN_S": "20",
            "OMP_NUM_THREADS": "1",
        }
        self.client = Client(f"http://{here.address}:{self.port}", "none")

    def start(self, name: str, role: str, host: Host, **settings: Any) -> None:
        """A service, as a container on that machine would start it."""
        own = {"home": self.folder / name, "host": host.address, "instance": name, "log_format": "text", **settings}
        env = self.env | {f"STILLHOUSE_{key.upper()}": str(value) for key, value in own.items()}
        with (self.folder / f"{name}.log").open("ab") as log:
            command = [*host.prefix, sys.executable, "-m", f"stillhouse.{role}"]
            self.processes[name] = subprocess.Popen(
                command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def start_node(self, number: int, host: Host) -> None:
        """One of two nodes: the same command and settings on both."""
        self.start(f"trainer-{number}", "trainer", host, trainer_nodes=2, trainer_ranks=2, trainer_node=number)

    def ended(self, name: str) -> int:
        """The exit code of a process that ends."""
        return self.processes[name].wait(timeout=60)

    def of(self, name: str) -> list[int]:
        """Living processes of a service, its ranks too."""
        wanted, found = f"STILLHOUSE_HOME={self.folder / name}\0".encode(), []
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if entry.name.isdigit() and wanted in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
        return found

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def close(self) -> None:
        for name, process in self.processes.items():
            for pid in self.of(name):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait(timeout=20)

    # -- jobs ---------------------------------------------------------------------------------------------------------

    def submit(self) -> str:
        spec = job_spec(
            seed=7,
            stages__0__schedule={"steps": STEPS, "prompts_per_step": 3, "max_staleness": 0, "micro_batch_tokens": 64},
        )
        return self.client.jobs.create(spec).id

    def step(self, job_id: str) -> int:
        return self.client.jobs.get(job_id).progress.step

    def has_step(self, job_id: str, step: int) -> None:
        wait_until(lambda: self.step(job_id) >= step, f"step {step} of {job_id}\n{self.log('trainer-0')[-3000:]}")

    def weights(self, job_id: str) -> dict[str, np.ndarray]:
        """Of the student that the job made, once the oracle agrees that all is well."""
        job = wait_until(lambda: (found := self.client.jobs.get(job_id)).finished_at and found, "the job to end")
        assert job.status == "succeeded", job
        artifacts: JobArtifacts = self.artifacts.job(job_id)
        report = verify_job(artifacts)
        assert report.ok, report.violations
        return load_file(artifacts.export(artifacts.highest_epoch()) / "model.safetensors")


@contextmanager
def deployment(folder: Path, here: Host) -> Iterator[Machines]:
    registry = ModelRegistry(folder / "models.yaml")
    for seed, name in enumerate(("student", "teacher")):
        registry.add(inspect_model(name, make_tiny_model(folder / name, seed=seed)))
    process, url = start_valkey(folder, 0, "--bind", f"127.0.0.1 {here.address}", "--protected-mode", "no")
    machines = Machines(folder, here, int(url.rpartition(":")[2].partition("/")[0]))
    try:
        machines.start("gateway", "gateway", here, port=machines.port)
        machines.start("sampler", "sampler", here)
        machines.start("teacher", "teacher", here)
        yield machines
    finally:
        machines.close()
        stop_valkey(process)


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces: root and iproute2")
def test_a_trainer_on_two_machines(tmp_path: Path) -> None:
    with hosts(2) as (here, both), deployment(tmp_path, here) as machines:
        machines.start_node(1, both[1])
        wait_until(lambda: "missing='node 0 (never seen)'" in machines.log("trainer-1"), "node 1 to say whom it misses")
        machines.start_node(0, both[0])
        job_id = machines.submit()
        machines.has_step(job_id, 4)
        os.kill(machines.processes["trainer-1"].pid, signal.SIGKILL)
        assert machines.ended("trainer-0") == 1
        assert machines.of("trainer-0") == machines.of("trainer-1") == [], "no rank is left on either machine"

        for number, host in enumerate(both):
            machines.start_node(number, host)
        weights = machines.weights(job_id)
        assert machines.artifacts.job(job_id).highest_epoch() == 2, "the job went on under a second claim"

        both[1].cut(off=True)  # no side is told: connections stay open
        assert machines.ended("trainer-0") == 1
        assert "without node 1" in machines.log("trainer-0").splitlines()[-1]
        both[1].cut(off=False)
        assert machines.ended("trainer-1") == 1

        machines.start("alone", "trainer", here, trainer_ranks=2)
        alone = machines.weights(machines.submit())
        assert weights.keys() == alone.keys()
        assert max(float(np.abs(weights[name] - alone[name]).max()) for name in weights) <= TOLERANCE
        start = load_file(tmp_path / "student" / "model.safetensors")
        assert max(float(np.abs(weights[name] - start[name]).max()) for name in start) > 100 * TOLERANCE, "it learned"
