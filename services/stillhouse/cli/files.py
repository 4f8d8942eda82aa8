"""`stillhouse files`: uploaded prompts."""

from __future__ import annotations

import sys
from pathlib import Path

from stillhouse.cli.console import (
    EXIT_USAGE,
    CliError,
    confirm,
    done,
    local_time,
    print_facts,
    print_json,
    print_table,
    say,
    size,
)
from stillhouse.client.client import Client
from stillhouse.core.schemas import File


def show(*, limit: int, as_json: bool) -> None:
    """A table of files."""
    with Client() as client:
        found = client.files.list(limit=limit)
    if as_json:
        print_json(found)
    elif found:
        print_table(("id", "name", ">rows", ">size", "uploaded"), [_row(file) for file in found])
    else:
        say("no files yet; `stillhouse submit` uploads what a job names, or: stillhouse files upload prompts.jsonl")


def _row(file: File) -> tuple[str, ...]:
    return file.id, _name(file), str(file.num_rows), size(file.size_bytes), _uploaded(file)


def _name(file: File) -> str:
    return str(file.get("filename") or "")


def _uploaded(file: File) -> str:
    return local_time(file.get("uploaded_at") or file.created_at)


def upload(path: Path, *, as_json: bool) -> None:
    """Upload rows; the same content has the same id."""
    if not path.is_file():
        raise CliError(f"{path} is no file", exit_code=EXIT_USAGE)
    with Client() as client:
        file = client.files.upload(path)
    if as_json:
        print_json(file)
    else:
        say(f"{file.id}: {file.num_rows} rows, {size(file.size_bytes)}; in a job: data: {{file: {file.id}}}")


def get(file_id: str, output: Path | None, *, as_json: bool) -> None:
    """Facts, or the rows."""
    with Client() as client:
        if output is None:
            file = client.files.get(file_id)
            if as_json:
                print_json(file)
                return
            facts = [("id", file.id), ("name", _name(file)), ("rows", str(file.num_rows))]
            facts += [("size", size(file.size_bytes)), ("sha256", file.sha256), ("uploaded", _uploaded(file))]
            print_facts(facts)
            return
        content = client.files.content(file_id)
    if str(output) == "-":
        sys.stdout.buffer.write(content)
        sys.stdout.flush()
        return
    try:
        with output.open("xb") as stream:
            stream.write(content)
    except FileExistsError:
        raise CliError(f"{output} exists already", fix="give another name with -o", exit_code=EXIT_USAGE) from None
    except OSError as error:
        raise CliError(f"cannot write {output}: {error.strerror}", exit_code=EXIT_USAGE) from None
    say(f"{output}: {size(len(content))}")


def delete(file_id: str, *, is_sure: bool, as_json: bool) -> None:
    """Delete a file."""
    confirm(f"Delete {file_id}?", is_sure=is_sure)
    with Client() as client:
        client.files.delete(file_id)
    done(f"deleted {file_id}", as_json=as_json, id=file_id, is_deleted=True)
