"""The `stillhouse` command: entry point, and the one place where errors become text and exit codes.

Modules behind the commands are imported inside them: `stillhouse --help` needs typer and nothing of ours. Exit codes:
0 done; 1 failed (also: the watched job failed); 2 wrong input (also: the watched job was cancelled); 3 `up` found a
running deployment; 4 the job could not be watched; 130 Ctrl-C.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated, Final

import typer

from stillhouse.cli import (
    commands_gc,
    commands_jobs,
    commands_local,
    commands_models,
    commands_recipes,
    commands_results,
    commands_score,
    commands_server,
    commands_verifiers,
    commands_verify,
)

if TYPE_CHECKING:
    from stillhouse.client.errors import ApiError

# error code -> what to try; the messages themselves already say what is wrong
_HINTS: Final = {
    "unauthorized": "set STILLHOUSE_API_KEY, or STILLHOUSE_HOME to the folder of `stillhouse up` (client.json)",
    "unavailable": "`stillhouse ps` shows what runs here, `stillhouse up --detach` starts it; or set STILLHOUSE_URL",
}

app = typer.Typer(
    name="stillhouse",
    help="""On-policy distillation: the student writes, the teacher judges every token, the student learns.

    Start here:

        stillhouse up --detach                          start everything on this machine

        stillhouse models add student ./my-student      name a model folder

        stillhouse submit job.yaml --watch              run a job and see it learn

        stillhouse download JOB -o student-v2           take the result home
    """,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors; works at any position.")] = False,
) -> None:
    pass  # `main` takes --debug off the arguments before they are parsed; it stands here for --help


# in the order of --help
commands_jobs.register(app)
commands_results.register(app)
commands_models.register(app)
commands_server.register(app)
commands_score.register(app)
commands_recipes.register(app)
commands_verify.register(app)
commands_verifiers.register(app)
commands_local.register(app)
commands_gc.register(app)


def main() -> None:
    """Run a command; every error is `error: ...` and an exit code."""
    arguments = sys.argv[1:]
    is_debug = "--debug" in arguments
    try:
        if os.environ.get("_STILLHOUSE_COMPLETE"):  # set by the scripts of `stillhouse completion`
            from typer._completion_classes import completion_init

            completion_init()
        app(args=[argument for argument in arguments if argument != "--debug"], prog_name="stillhouse")
    except BrokenPipeError:
        sys.stderr.close()  # the reader (`| head`) has gone; nothing to say
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # the outermost edge of the process
        if is_debug:
            raise
        sys.exit(_explain(error))


def _explain(error: Exception) -> int:
    """Print an error; returns the exit code."""
    from stillhouse.cli.console import EXIT_FAILED, EXIT_USAGE, CliError, print_error
    from stillhouse.client.errors import ApiError
    from stillhouse.core.errors import ConfigError, SpecError, StillhouseError

    if isinstance(error, CliError):
        print_error(error.message, error.fix)
        return error.exit_code
    if isinstance(error, ApiError):
        # a gateway that answers 503 runs, and says itself what helps
        print_error(_refusal(error), "" if error.code == "unavailable" else _HINTS.get(error.code, ""))
        return EXIT_USAGE if error.status in (400, 413, 422) else EXIT_FAILED
    if isinstance(error, StillhouseError):
        print_error(error.message, _HINTS.get(error.code, ""))
        return EXIT_USAGE if isinstance(error, ConfigError | SpecError) else EXIT_FAILED
    print_error(f"unexpected {type(error).__name__}: {error}", "run it again with --debug for the traceback")
    return EXIT_FAILED


def _refusal(error: ApiError) -> str:
    """All that the gateway said: each finding on a line, the code, the field, the request's id for its log."""
    facts = [error.code, f"at {error.param}" if error.param else "", f"request {error.request_id}"]
    lines = [f"{error.detail} ({', '.join(fact for fact in facts if fact)})"]
    if len(error.errors) > 1:
        lines += [f"  {': '.join(filter(None, (item['param'], item['message'])))}{_fix(item)}" for item in error.errors]
    return "\n".join(lines)


def _fix(finding: dict[str, str]) -> str:
    return f"; {finding['fix']}" if finding.get("fix") else ""


if __name__ == "__main__":
    main()
