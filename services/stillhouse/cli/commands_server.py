"""Commands about what a deployment has: files, services, keys, and models that write. Imports nothing of ours early."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from stillhouse.cli.options import PROVISIONS, SERVER, AsJson, IsSure, Writer, group, propose_files, propose_models

files_app = group("Upload prompts; list, get and delete what is uploaded.")
keys_app = group("API keys: who may do what, as which owner.")
FileId = Annotated[str, typer.Argument(metavar="FILE", help="Id of an uploaded file.", autocompletion=propose_files)]
Message = Annotated[str, typer.Option("--message", "-m", help="What you say.")]
System = Annotated[str, typer.Option(help="System message before it.")]
MaxTokens = Annotated[int, typer.Option(min=1, max=2048, help="Longest answer, tokens.")]
Temperature = Annotated[float, typer.Option(min=0, max=10, help="0 = always the likeliest token.")]
TopP = Annotated[float, typer.Option(min=0.01, max=1, help="Nucleus sampling; 1 = off.")]
Seed = Annotated[int | None, typer.Option(min=0, help="The same seed gives the same text.", show_default=False)]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(files_app, name="files", rich_help_panel=PROVISIONS)
    for command in (generate, chat):
        app.command(rich_help_panel=PROVISIONS)(command)
    app.command(rich_help_panel=SERVER)(services)
    app.add_typer(keys_app, name="keys", rich_help_panel=SERVER)
    app.command(rich_help_panel=SERVER)(completion)


@files_app.command("ls")
def files_ls(
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many, newest first.")] = 20, as_json: AsJson = False
) -> None:
    """List uploaded files.

    Example:  stillhouse files
    """
    from stillhouse.cli import files

    files.show(limit=limit, as_json=as_json)


@files_app.command("upload")
def files_upload(
    path: Annotated[Path, typer.Argument(help='JSON lines: {"prompt": ...} or {"messages": [...]}.')],
    as_json: AsJson = False,
) -> None:
    """Upload prompts; every row is checked. The id goes into a job as `data.file`. (`submit` uploads by itself.)

    Example:  stillhouse files upload prompts.jsonl
    """
    from stillhouse.cli import files

    files.upload(path, as_json=as_json)


@files_app.command("get")
def files_get(
    file: FileId,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the rows there; - prints them.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show facts of an uploaded file, or fetch its rows.

    Example:  stillhouse files get file_1f3a5c7e9b0d2f46 -o prompts.jsonl
    """
    from stillhouse.cli import files

    files.get(file, output, as_json=as_json)


@files_app.command("delete")
def files_delete(file: FileId, yes: IsSure = False, as_json: AsJson = False) -> None:
    """Delete an uploaded file.

    Example:  stillhouse files delete file_1f3a5c7e9b0d2f46 --yes
    """
    from stillhouse.cli import files

    files.delete(file, is_sure=yes, as_json=as_json)


def generate(
    model: Writer,
    message: Message = "",
    prompt: Annotated[str, typer.Option(help="What the model reads as it is, no chat template applied.")] = "",
    system: System = "",
    n: Annotated[int, typer.Option("-n", min=1, max=8, help="Answers.")] = 1,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    as_json: AsJson = False,
) -> None:
    """Have a model write: a registered one, or a checkpoint of a job.

    Example:  stillhouse generate teacher -m 'Why is the sky blue?' --temperature 0
    """
    from stillhouse.cli import chat as implementation

    options = _sampling(max_tokens, temperature, top_p, seed)
    implementation.generate(model, message, prompt, system, n, options, as_json=as_json)


def chat(
    model: Writer,
    message: Message = "",
    teacher: Annotated[
        str,
        typer.Option(
            help="Model to show beside it; - = none.  [default: the job's first teacher]",
            show_default=False,
            autocompletion=propose_models,
        ),
    ] = "",
    system: System = "",
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.7,
    top_p: TopP = 1.0,
    seed: Seed = None,
    as_json: AsJson = False,
) -> None:
    """Chat with a checkpoint next to its teacher: both answer what you say. With -m, once; else until Ctrl-D.

    Example:  stillhouse chat job_3f9c0a12b4d5e6f70819 -m 'Name three rivers.'
    """
    from stillhouse.cli import chat as implementation

    options = _sampling(max_tokens, temperature, top_p, seed)
    implementation.chat(model, message, teacher, system, options, as_json=as_json)


def _sampling(max_tokens: int, temperature: float, top_p: float, seed: int | None) -> dict[str, Any]:
    return {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}


def services(as_json: AsJson = False) -> None:
    """Show the processes of the deployment, their health, and the work that waits for them.

    Example:  stillhouse services
    """
    from stillhouse.cli import services as implementation

    implementation.show(as_json=as_json)


@keys_app.command("ls")
def keys_ls(as_json: AsJson = False) -> None:
    """List the keys, without the secrets. Needs the scope admin.

    Example:  stillhouse keys
    """
    from stillhouse.cli import keys

    keys.show(as_json=as_json)


@keys_app.command("me")
def keys_me(as_json: AsJson = False) -> None:
    """Show who you are for the gateway: owner, scopes, limits and what you have used of them.

    Example:  stillhouse keys me
    """
    from stillhouse.cli import keys

    keys.me(as_json=as_json)


@keys_app.command("create")
def keys_create(
    name: Annotated[str, typer.Argument(help="Name of the key.")],
    owner: Annotated[str, typer.Option(help="Whose jobs it makes and sees.  [default: the name]")] = "",
    scope: Annotated[
        list[str] | None, typer.Option(help="read, write or admin; each brings those before it.  [default: write]")
    ] = None,
    limit: Annotated[
        list[str] | None, typer.Option(metavar="NAME=NUMBER", help="A limit, for example active_jobs=2; several times.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a key. It is shown once and stored as a hash. Needs the scope admin.

    Example:  stillhouse keys create alice --limit active_jobs=2
    """
    from stillhouse.cli import keys

    keys.create(name, owner, scope or ["write"], limit or [], as_json=as_json)


@keys_app.command("delete")
def keys_delete(
    name: Annotated[str, typer.Argument(help="Name of the key.")], yes: IsSure = False, as_json: AsJson = False
) -> None:
    """Revoke a key. Needs the scope admin.

    Example:  stillhouse keys delete alice --yes
    """
    from stillhouse.cli import keys

    keys.delete(name, is_sure=yes, as_json=as_json)


def completion(shell: Annotated[str, typer.Argument(help="bash, zsh or fish.")]) -> None:
    """Print the script that makes a shell complete commands, options, and the ids of your jobs.

    Example:  stillhouse completion bash >> ~/.bashrc
    """
    from stillhouse.cli import completion as implementation
    from stillhouse.cli.console import EXIT_USAGE, fail, say

    if shell not in implementation.SHELLS:
        fail(f"no script for '{shell}'", fix="take bash, zsh or fish", exit_code=EXIT_USAGE)
    say(implementation.script(shell))
