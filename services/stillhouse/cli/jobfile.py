"""Job files on disk: YAML or JSON, with `data.path` in place of `data.file`, checked before anything is sent.

stages:
  - data: {path: prompts.jsonl}     # relative to the job file; uploaded at submit, then `file: file_...`
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import ValidationError

from stillhouse.cli.console import EXIT_USAGE, CliError
from stillhouse.core import spec
from stillhouse.core.explain import explain

PLACEHOLDER: Final = "file_00000000"
"""Stands for a file that is not uploaded yet, so that the rest of the job can be checked first."""
MAX_PROBLEMS: Final = 10
"""Problems shown at once; more is a wrong file rather than a typo."""


@dataclass(frozen=True, slots=True)
class JobFile:
    """A checked job file."""

    document: dict[str, Any]
    """As read, `name` overridden."""
    uploads: dict[str, Path]
    """Field of the data section (`stages.0.data`) -> prompts on this machine."""

    def upload(self, send: Callable[[Path], str]) -> dict[str, Any]:
        """The job with every `path` replaced by the id that `send` gives for it; a file used twice is sent once."""
        document = copy.deepcopy(self.document)
        ids: dict[Path, str] = {}
        for where, data in _data_sections(document):
            if where in self.uploads:
                path = self.uploads[where]
                if path not in ids:
                    ids[path] = send(path)
                del data["path"]
                data["file"] = ids[path]
        return document


def load(path: Path, *, name: str = "") -> JobFile:
    """Read and check a job file.

    Raises:
        CliError: every problem on a line: path of the field, what is wrong, what was meant.
    """
    document = _read(path)
    if name:
        document["name"] = name
    uploads: dict[str, Path] = {}
    checked = copy.deepcopy(document)
    for where, data in _data_sections(checked):
        if "path" not in data:
            continue
        uploads[where] = _prompts(path, where, data.pop("path"))
        if "file" in data or "rows" in data:
            raise _refused(path, [f"{where}: give exactly one of 'path', 'file' and 'rows'"])
        data["file"] = PLACEHOLDER
    try:
        spec.JobSpec.model_validate(checked)
    except ValidationError as error:
        raise _refused(path, describe(error, checked)) from None
    return JobFile(document, uploads)


def describe(error: ValidationError, document: Any) -> list[str]:
    """One line per problem, in the words of the gateway: `stages.0.schedule.steps: 0 is out of range; use ...`."""
    found = [{**problem, "loc": ("body", *problem["loc"])} for problem in error.errors()]
    return [finding.text() for finding in explain(found, document)]


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise CliError(f"cannot read {path}: {reason}", exit_code=EXIT_USAGE) from None
    try:
        document = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        detail = " ".join(str(error).split())
        raise CliError(f"{path} is not valid {_format(path)}: {detail}", exit_code=EXIT_USAGE) from None
    if not isinstance(document, dict):
        raise CliError(
            f"{path} must hold `key: value` lines, got {type(document).__name__}",
            fix="a job has at least student, teachers and stages; see the files in examples/",
            exit_code=EXIT_USAGE,
        )
    return document


def _data_sections(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(field, section) of every data section; whatever is not of that shape is left to the validation."""
    stages = document.get("stages")
    for index, stage in enumerate(stages if isinstance(stages, list) else []):
        if isinstance(stage, dict) and isinstance(stage.get("data"), dict):
            yield f"stages.{index}.data", stage["data"]
    evaluation = document.get("evaluation")
    if isinstance(evaluation, dict) and isinstance(evaluation.get("data"), dict):
        yield "evaluation.data", evaluation["data"]


def _prompts(job_path: Path, where: str, value: Any) -> Path:
    if not isinstance(value, str):
        raise _refused(job_path, [f"{where}.path: must be the name of a JSONL file, got {_short(value)}"])
    path = (job_path.parent / Path(value).expanduser()).resolve()
    if not path.is_file():
        raise _refused(job_path, [f"{where}.path: {path} does not exist (paths are relative to the job file)"])
    if path.stat().st_size == 0:
        raise _refused(job_path, [f"{where}.path: {path} is empty"])
    return path


def _refused(path: Path, problems: list[str]) -> CliError:
    shown = problems[:MAX_PROBLEMS]
    if len(problems) > MAX_PROBLEMS:
        shown.append(f"... and {len(problems) - MAX_PROBLEMS} more")
    head = f"{path}: " if len(shown) == 1 else f"{path} has {len(problems)} problems:\n  "
    return CliError(head + "\n  ".join(shown), exit_code=EXIT_USAGE, param=problems[0].partition(":")[0])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _format(path: Path) -> str:
    return "JSON" if path.suffix == ".json" else "YAML"
