"""The commands of README.md and of the pages that name this file, as a reader types them, on one deployment.

What differs from the page stands in `TYPED` and `SHIM`: one `up` for all pages, on a free port; an answer for `chat`.
Models are tiny, jobs short. JOB is the newest job, OTHER the one before.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.e2e.deployment import Stillhouse
from tests.pages import ROOT, Block, run_by
from tests.tiny import make_tiny_model

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]
BLOCKS: Final = run_by("tests/e2e/test_pages.py")
SHIM: Final = """#!/bin/sh
case $1 in
up)
  [ ! -e "$HOME/is_up" ] || exit 0 # a page that begins with `up` finds that of the page before
  touch "$HOME/is_up"
  set -- "$@" --port 0 --threads 1 ;;
down) rm "$HOME/is_up" ;;
esac
exec {python} -m stillhouse.cli.main "$@"
"""
PRELUDE: Final = """
curl() { command curl --fail-with-body --max-time 100 "$@"; }
job() {
  curl -s "$URL/v1/jobs" -H "$AUTH" | python3 -c 'import json, sys
print([job["id"] for job in json.load(sys.stdin)["data"] if job["kind"] != "preflight"][int(sys.argv[1]) - 1])' "$1"
}
"""
TYPED: Final = (
    (r"(?<![\w$])JOB\b", "$(job 1)"),
    (r"(?<![\w$])OTHER\b", "$(job 2)"),
    (r"\$JOB\b", "$(job 1)"),
    (r"(stillhouse chat .*?)( *#.*)?\n", r"\1 <<< 'say one'\n"),
    (r"stillhouse pause", r"! stillhouse pause"),  # on the page the job still runs; here it has ended, which is refused
)
SHORT: Final = {
    "steps: 100": "steps: 3",
    "prompts_per_step: 16": "prompts_per_step: 2",
    "max_tokens: 128": "max_tokens: 8",
}


class Reader:
    """Somebody who follows the pages in a folder that holds models and prompts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entrance = ""
        shim = folder / "bin" / "stillhouse"
        shim.parent.mkdir()
        shim.write_text(SHIM.format(python=sys.executable))
        shim.chmod(0o755)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("STILLHOUSE_")}
        path = f"{shim.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.env = kept | {"HOME": str(folder), "PATH": path, "OMP_NUM_THREADS": "1"}

    def type(self, block: Block) -> str:
        """Run a block as it is, but for TYPED; what it prints."""
        text = block.text
        for pattern, replacement in TYPED:
            text = re.sub(pattern, replacement, text)
        is_up = (self.folder / ".stillhouse" / "client.json").is_file()
        before = self.entrance if is_up and self.entrance not in block.text else ""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", PRELUDE + before + text],
            cwd=self.place(block),
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=200,
        )
        print(f"== {block}\n{text}\n{done.stdout}")
        assert done.returncode == 0, f"{block} ended with {done.returncode}:\n{text}\n{done.stdout[-3000:]}"
        return done.stdout

    def place(self, block: Block) -> Path:
        """Where a block is typed: `init` writes a job file and overwrites none."""
        if "stillhouse init" not in block.text:
            return self.folder
        return Path(tempfile.mkdtemp(dir=self.folder))


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    found = Reader(tmp_path)
    for name, seed in (("my-small-model", 1), ("my-large-model", 2), ("my-model", 3)):
        make_tiny_model(tmp_path / name, seed=seed, max_position_embeddings=1024)
    for name in ("prompts", "heldout"):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"prompt": "{name} {word}"}}\n' for word in "abcdef"))
    (tmp_path / "texts.jsonl").write_text(json.dumps({"prompt": "Why", "text": " not?"}) + "\n")
    page = (ROOT / "README.md").read_text()
    job, request = (
        re.findall(rf"^```{kind}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[0] for kind in ("yaml", "json")
    )
    for long, short in SHORT.items():
        assert long in job
        job = job.replace(long, short)
    (tmp_path / "job.yaml").write_text(job)
    shorter = json.loads(request)
    shorter["stages"][0]["sampling"] = {"max_tokens": 8}
    (tmp_path / "job.json").write_text(json.dumps(shorter))
    found.entrance = page.split("```bash\n")[1].split("\n\n")[0] + "\n"
    assert found.entrance.endswith('AUTH="Authorization: Bearer $KEY"\n')
    try:
        yield found
    finally:
        for line in Stillhouse(tmp_path / ".stillhouse").processes():
            os.kill(int(line.split()[0]), signal.SIGKILL)


def order(block: Block) -> tuple[bool, bool]:
    """As pages have them, but `down` when all else is done, and then the deployment that has only a teacher."""
    return block.page == "docs/scoring.md", re.search(r"stillhouse down\b", block.text) is not None


def test_what_pages_tell_to_type_works(reader: Reader) -> None:
    said = {str(block): reader.type(block) for block in sorted(BLOCKS, key=order)}
    together = "\n".join(said.values())
    assert len(said) >= 12
    for proof in ("step 3/3", "succeeded", "event: job.", "reward 1", "nats"):
        assert proof in together, proof
    assert (reader.folder / "student-v2" / "model.safetensors").is_file()
    assert (reader.folder / "student.tar").stat().st_size > 10_000
    assert "</html>" in (reader.folder / "report.html").read_text()
    assert json.loads((reader.folder / "scores.jsonl").read_text().splitlines()[0])
