"""The command itself: how fast it answers, what it imports, how errors look."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = (
    "torch",
    "transformers",
    "vllm",
    "safetensors",
    "matplotlib",
    "grpc",
    "redis",
    "httpx",
    "pydantic",
    "yaml",
    "rich",
)


def stillhouse(home: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    return subprocess.run(
        [sys.executable, "-m", "stillhouse.cli.main", *arguments],
        env={**kept, "STILLHOUSE_HOME": str(home), "COLUMNS": "120", **env},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_help_answers_at_once(tmp_path: Path) -> None:
    times = []
    for _ in range(3):
        start = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])  # processor time: the machine may be busy
        answer = stillhouse(tmp_path, "--help")
        times.append(sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - start)
        assert answer.returncode == 0
        assert "stillhouse up --detach" in answer.stdout
    assert min(times) < 1.0, times


def test_the_command_tree_imports_nothing_heavy() -> None:
    code = f"import sys, stillhouse.cli.main; print([m for m in {HEAVY!r} if m in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert answer.stdout.strip() == "[]"


def test_no_module_of_the_command_needs_the_model_libraries() -> None:
    modules = sorted(path.stem for path in Path("services/stillhouse/cli").glob("*.py"))
    code = "import sys, importlib\n"
    code += f"for name in {modules!r}: importlib.import_module('stillhouse.cli.' + name)\n"
    code += "print([m for m in ('torch', 'transformers', 'vllm', 'safetensors', 'matplotlib') if m in sys.modules])"
    root = Path(__file__).parents[2]
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, cwd=root
    )
    assert len(modules) > 15
    assert answer.stdout.strip() == "[]"


def test_every_command_teaches_with_an_example() -> None:
    from stillhouse.cli.docs import commands

    found = commands()
    for name in ("submit", "models add", "dead-letters retry", "verifiers try", "chat", "completion"):
        assert name in found
    for name, command in found.items():
        assert re.search(rf"Example:  stillhouse {name.removesuffix(' ls')}\b", command.help or ""), name


@pytest.mark.parametrize(
    ("arguments", "env", "code", "expected"),
    [
        (["models", "add", "m", "/nowhere"], {}, 2, ["error: /nowhere does not exist", "  fix: "]),
        (["models", "rm", "m"], {}, 1, ["error: unknown model 'm'; registered: none yet"]),
        (["models", "ls"], {"STILLHOUSE_PROT": "1"}, 2, ["error: unknown environment variable STILLHOUSE_PROT"]),
        (["submit", "/nowhere.yaml"], {}, 2, ["error: cannot read /nowhere.yaml: No such file or directory"]),
        (["verifiers", "try", "maths", "--text", "x"], {}, 2, ["unknown verifier 'maths'; there are exact, math"]),
        (["verifiers", "try", "numeric", "--text", "x"], {}, 2, ["verifier 'numeric' needs the row's 'answer'"]),
        (["score", "m"], {}, 2, ["error: nothing to score", "  fix: give --text or --file"]),
        (["healthcheck", "127.0.0.1:1"], {}, 1, ["error: 127.0.0.1:1 does not answer: UNAVAILABLE"]),
        (["watch", "job_1"], {"STILLHOUSE_URL": "http://127.0.0.1:1", "STILLHOUSE_API_KEY": "k"}, 4, ["cannot watch"]),
        (["models", "rm", "m"], {"STILLHOUSE_URL": "http://127.0.0.1:1"}, 2, ["run it on the gateway's machine"]),
        (["up", "--port", "99999"], {}, 2, ["--port"]),
        (["frobnicate"], {}, 2, ["No such command"]),
    ],
)
def test_errors_are_a_line_and_a_code(
    tmp_path: Path, arguments: list[str], env: dict[str, str], code: int, expected: list[str]
) -> None:
    answer = stillhouse(tmp_path, *arguments, **env)
    assert answer.returncode == code, answer.stderr
    for text in expected:
        assert text in answer.stderr
    assert "Traceback" not in answer.stderr


def test_debug_shows_the_traceback_at_any_position(tmp_path: Path) -> None:
    for arguments in (["--debug", "models", "rm", "m"], ["models", "rm", "m", "--debug"]):
        answer = stillhouse(tmp_path, *arguments)
        assert answer.returncode == 1
        assert "Traceback" in answer.stderr
        assert "NotFoundError" in answer.stderr


def test_a_refusal_of_the_gateway_is_printed_whole(capsys: pytest.CaptureFixture[str]) -> None:
    from stillhouse.cli.main import _explain
    from stillhouse.client.errors import ApiError
    from stillhouse.core.errors import UnavailableError

    findings = [
        {"param": "student.model", "message": "unknown model 'x'", "fix": ""},
        {"param": "seed", "message": "-1 is out of range", "fix": "use a value >= 0"},
    ]
    error = ApiError(422, "invalid_request", "bad job", param="student.model", request_id="req_7", errors=findings)
    assert _explain(error) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: bad job (invalid_request, at student.model, request req_7)\n")
    for finding in findings:
        assert f"{finding['param']}: {finding['message']}" in shown
    assert _explain(ApiError(401, "unauthorized", "no key", request_id="req_8")) == 1
    assert "fix: set STILLHOUSE_API_KEY" in capsys.readouterr().err
    assert _explain(UnavailableError("no answer")) == 1
    assert "`stillhouse up --detach` starts it" in capsys.readouterr().err
    assert _explain(RuntimeError("boom")) == 1
    assert "--debug" in capsys.readouterr().err


def test_nothing_running_is_said_and_no_error(tmp_path: Path) -> None:
    for command in ("ps", "down"):
        answer = stillhouse(tmp_path / "none", command)
        assert answer.returncode == 0
        assert "nothing is running in" in answer.stdout
    assert not (tmp_path / "none").exists(), "looking creates nothing"


def test_home_option_wins_over_the_environment(tmp_path: Path) -> None:
    answer = stillhouse(tmp_path / "a", "ps", "--home", str(tmp_path / "b"))
    assert str(tmp_path / "b") in answer.stdout
