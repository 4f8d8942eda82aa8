"""Run an example from nothing to its results: models, deployment, jobs, figures. `make example NAME=mopd` calls this.

    python examples/run.py mopd             # a few minutes; results.json, curves.png in runs/examples/mopd
    python examples/run.py mopd --short     # seconds; what the tests run

An example is a folder with job files (`job.yaml`, or `1-....yaml`, `2-....yaml` in order), their prompts, and a
`prepare.py`:

    prepare(models, *, short)   makes model folders in `models`, which all examples share; what exists stays
    write_data(folder)          writes the prompts; they are committed (`--write-data` writes them anew)
    ROOM                        how many of its models fit the teacher at once; default: all
    SHORT                       what --short leaves of each stage; default: the one below
    judge(jobs, *, short)       what is not as promised; default: `judge` below
    probes()                    {name: rows} whose accuracy is measured besides that of the held-out rows
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import yaml
from rich.console import Console

from stillhouse.cli import jobfile
from stillhouse.client.client import Client
from stillhouse.core.models import ModelRegistry, inspect_model

HERE: Final = Path(__file__).resolve().parent
ROOT: Final = HERE.parent
SHORT: Final = {"steps": 8, "prompts_per_step": 16, "num_prompts": 40}
"""Most steps, prompts per step and held-out prompts of a shortened job."""
PLACEHOLDER: Final = "job_placeholder"
"""In a job file: the job before it; `job_placeholder/ckpt_NAME`: its checkpoint at the end of that stage."""
JOB_TIMEOUT_S: Final = 1800.0
"""A full job takes minutes; on a machine with other work several times that."""
POLL_S: Final = 0.5
COMMAND_TIMEOUT_S: Final = 300.0
"""`stillhouse up` waits for its services up to 180 s, `down` for what they have to end."""

Json = dict[str, Any]
console = Console(highlight=False)


@dataclass(frozen=True, slots=True)
class Example:
    """A folder below examples/."""

    folder: Path
    prepare: Any
    """Its module prepare.py."""

    @classmethod
    def load(cls, name: str) -> Example:
        """The example of that name."""
        folder = HERE / name
        spec = importlib.util.spec_from_file_location(f"prepare_{name}", folder / "prepare.py")
        if spec is None or spec.loader is None or not (folder / "prepare.py").is_file():
            raise SystemExit(f"no example '{name}'; there are {', '.join(names())}")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return cls(folder, module)

    @property
    def name(self) -> str:
        return self.folder.name

    def job_files(self) -> list[Path]:
        """In the order in which they run."""
        return sorted(self.folder.glob("*.yaml"))

    def get(self, name: str, default: Any) -> Any:
        """An optional part of prepare.py."""
        return getattr(self.prepare, name, default)

    def settings(self, models: Path) -> Json:
        """What its deployment needs besides the defaults."""
        room = self.get("ROOM", None)
        if room is None:
            return {}
        sizes = [4 * inspect_model(name, models / name).num_parameters for name in self.model_names(models)]
        return {"teacher_memory_gib": (room + 0.5) * max(sizes) / 2**30}

    def model_names(self, models: Path) -> list[str]:
        """The prepared models that its jobs name."""
        documents = [jobfile.load(path).document for path in self.job_files()]
        named = {part["model"] for job in documents for part in (job["student"], *job.get("teachers", {}).values())}
        return sorted(name for name in named if (models / name).is_dir())


def names() -> list[str]:
    """All examples that this file runs."""
    return sorted(path.parent.name for path in HERE.glob("*/prepare.py"))


def stillhouse(*arguments: str, home: Path) -> None:
    """Run a `stillhouse` command for the deployment in `home`, without the variables that are meant for another one."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("STILLHOUSE_")}
    command = [sys.executable, "-m", "stillhouse.cli.main", *arguments]
    done = subprocess.run(
        command,
        env={**kept, "STILLHOUSE_HOME": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=COMMAND_TIMEOUT_S,
    )
    if done.returncode != 0:
        raise SystemExit(f"`stillhouse {' '.join(arguments)}` ended with exit code {done.returncode}: {done.stdout}")


@contextmanager
def deployment(home: Path, settings: Json) -> Iterator[None]:
    """All services, in a new home folder, while the block runs."""
    if (home / "run" / "lock").is_file():  # an earlier run of ours that was interrupted
        stillhouse("down", home=home)
        shutil.rmtree(home)
    home.mkdir(parents=True, exist_ok=True)
    (home / "config.yaml").write_text(yaml.safe_dump(settings))
    try:
        stillhouse("up", "--detach", "--port", "0", home=home)
        yield
    finally:
        stillhouse("down", home=home)


def run(example: Example, home: Path, models: Path, out: Path, *, short: bool) -> Json:
    """Run the jobs of an example, whose models are there, on a deployment that runs. Gives its results."""
    entrance = json.loads((home / "client.json").read_text())
    registry = ModelRegistry(home / "models.yaml")
    for name in example.model_names(models):
        registry.add(inspect_model(name, models / name))
    jobs: list[Json] = []
    with Client(entrance["url"], entrance["api_key"]) as client:
        for path in example.job_files():
            jobs.append(run_job(example, client, path, models, out, jobs, short=short))
    judge_them = example.get("judge", judge)
    return {"example": example.name, "jobs": jobs, "complaints": judge_them(jobs, short=short)}


def run_job(
    example: Example, client: Client, path: Path, models: Path, out: Path, before: list[Json], *, short: bool
) -> Json:
    """Submit a job file, wait for the end, fetch the student and measure it."""
    file = jobfile.load(path)
    document = fill(file.document, client, before)
    if short:
        shorten(document, SHORT | example.get("SHORT", {}))
    spec = jobfile.JobFile(document, file.uploads).upload(lambda rows: client.files.upload(rows)["id"])
    job = follow(client, client.jobs.create(spec)["id"])
    if job["status"] != "succeeded":
        raise SystemExit(f"{path.name}: job {job['id']} {job['status']}: {job['error']}")
    student = out / f"student-{path.stem}"
    shutil.rmtree(student, ignore_errors=True)
    client.jobs.download(job["id"], student)
    start = models / document["student"]["model"]
    if document.get("init_from"):
        start = Path(before[-1]["student"])
    return {
        "file": path.name,
        "job": job,
        "evaluations": client.jobs.evaluations(job["id"]),
        "metrics": client.jobs.metrics(job["id"]),
        "student": str(student),
        "accuracy": accuracies(example, document, file.uploads.get("evaluation.data"), models, start, student),
    }


def fill(value: Any, client: Client, before: list[Json]) -> Any:
    """The document with `job_placeholder` replaced by the job before."""
    if isinstance(value, dict):
        return {key: fill(part, client, before) for key, part in value.items()}
    if isinstance(value, list):
        return [fill(part, client, before) for part in value]
    if not isinstance(value, str) or not value.startswith(PLACEHOLDER):
        return value
    job, stage = before[-1]["job"], value.partition("/ckpt_")[2]
    return f"{job['id']}/{stage_end(client, job, stage)}" if stage else job["id"]


def stage_end(client: Client, job: Json, name: str) -> str:
    """Id of the checkpoint at the end of a stage."""
    step = 0
    for stage in job["spec"]["stages"]:
        step += stage["schedule"]["steps"]
        if stage["name"] == name:
            found = [point["id"] for point in client.jobs.checkpoints(job["id"]) if point["step"] == step]
            if found:
                return found[0]
    raise SystemExit(f"job {job['id']} has no checkpoint at the end of a stage '{name}' (step {step})")


def shorten(document: Json, most: Json) -> None:
    """Leave of every stage and of the evaluation at most so much."""
    for stage in document["stages"]:
        schedule = stage.setdefault("schedule", {})
        for name in ("steps", "prompts_per_step"):
            schedule[name] = min(schedule.get(name, most[name]), most[name])
        stage.setdefault("optimizer", {})["warmup_steps"] = 1
    evaluation = document.get("evaluation")
    if evaluation:
        fewer = min(evaluation.get("num_prompts", 32), most["num_prompts"])
        evaluation |= {"num_prompts": fewer, "every_steps": 0, "show": 0}


def follow(client: Client, job_id: str) -> Json:
    """Wait for the end of a job and show how far it is."""
    deadline = time.monotonic() + JOB_TIMEOUT_S
    with console.status(f"{job_id} starts") as status:
        while time.monotonic() < deadline:
            job = client.jobs.get(job_id)
            if job["is_terminal"]:
                return job
            total = sum(stage["schedule"]["steps"] for stage in job["spec"]["stages"])
            status.update(f"{job_id} {job['status']}, step {job['progress']['step']} of {total}")
            time.sleep(POLL_S)
    client.jobs.cancel(job_id)
    raise SystemExit(f"job {job_id} did not end within {JOB_TIMEOUT_S:g} s")


def accuracies(
    example: Example, document: Json, held_out: Path | None, models: Path, start: Path, student: Path
) -> dict[str, Json]:
    """{domain: {before, after, teacher, num_rows}}: shares of right greedy answers, by the teacher of the rows."""
    from toys.models import accuracy

    groups: dict[str, list[Json]] = {}
    teachers = document.get("teachers", {})
    for line in held_out.read_text().splitlines() if held_out else []:
        row = json.loads(line)
        groups.setdefault(domain(row, teachers), []).append(row)
    found = {}
    for name, rows in {**groups, **example.get("probes", dict)()}.items():
        judged = {"before": accuracy(start, rows), "after": accuracy(student, rows)}
        folder = models / str(teachers.get(name, {}).get("model"))
        if folder.is_dir():
            judged["teacher"] = accuracy(folder, rows, as_teacher=True)
        found[name] = {key: sum(right) / len(right) for key, right in judged.items()} | {"num_rows": len(rows)}
    return found


def domain(row: Json, teachers: Json) -> str:
    """Name of a row's teacher; of several, the one that weighs most."""
    named = row.get("teacher") or next(iter(teachers), "main")
    return named if isinstance(named, str) else max(named, key=named.__getitem__)


def judge(jobs: list[Json], *, short: bool) -> list[str]:
    """What is not as promised: held-out reverse KL falls, by half in a full run, and no domain gets worse there."""
    complaints = []
    for one in jobs:
        kls = [point["reverse_kl"] for point in one["evaluations"]]
        if kls and kls[-1] > (0.95 if short else 0.5) * kls[0]:
            complaints.append(f"{one['file']}: held-out reverse KL went from {kls[0]:.3f} to {kls[-1]:.3f} only")
        for name, share in one["accuracy"].items():
            if not short and share["after"] < share["before"]:
                complaints.append(
                    f"{one['file']}: accuracy of {name} fell: {share['before']:.2f} to {share['after']:.2f}"
                )
    return complaints


def main() -> None:
    """Run an example."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=names(), help="folder below examples/")
    parser.add_argument("--short", action="store_true", help="seconds instead of minutes, and less is promised")
    parser.add_argument("--out", type=Path, help="folder of the results (default: runs/examples/NAME)")
    parser.add_argument("--models", type=Path, help="folder of the models of all examples (default: runs/toys)")
    parser.add_argument("--machine", default=f"{os.cpu_count()} cores", help="what the results say about it")
    parser.add_argument("--write-data", action="store_true", help="write the prompts anew, and nothing else")
    options = parser.parse_args()
    example = Example.load(options.name)
    if options.write_data:
        example.prepare.write_data(example.folder)
        return
    suffix = "-short" if options.short else ""
    out = (options.out or ROOT / "runs" / "examples" / f"{options.name}{suffix}").resolve()
    models = (options.models or ROOT / "runs" / f"toys{suffix}").resolve()
    results = make(example, models, out, short=options.short, machine=options.machine)
    if results["complaints"]:
        raise SystemExit("Not as promised: " + "; ".join(results["complaints"]))


def make(example: Example, models: Path, out: Path, *, short: bool, machine: str) -> Json:
    """Everything that the command does: models, deployment, jobs, results, picture."""
    from toys import report

    out.mkdir(parents=True, exist_ok=True)
    models.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with console.status("models are made (once; a minute for the base, seconds for each of the others)"):
        example.prepare.prepare(models, short=short)
    models_s = time.monotonic() - started
    with deployment(out / "home", example.settings(models)):
        results = run(example, out / "home", models, out, short=short)
    facts = {
        "command": f"python examples/run.py {example.name}{' --short' if short else ''}",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine,
        "models_s": round(models_s, 1),
    }
    summary = report.summarise(results, facts)
    (out / "results.json").write_text(json.dumps(summary, indent=1) + "\n")
    report.draw(summary, results["jobs"], out / "curves.png")
    console.print(*report.tables(summary))
    console.print(f"{out / 'results.json'}, {out / 'curves.png'}")
    return results


if __name__ == "__main__":
    main()
