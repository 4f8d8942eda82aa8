"""`stillhouse keys`: who may do what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
)
from stillhouse.client.client import Client
from stillhouse.core.schemas import Key


def show(*, as_json: bool) -> None:
    """A table of keys."""
    with Client() as client:
        found = client.keys.list()
    if as_json:
        print_json(found)
    else:
        print_table(("name", "owner", "scopes", "limits", "created"), [_row(key) for key in found])


def _row(key: Key) -> tuple[str, ...]:
    return key.name, key.owner, ", ".join(key.scopes), _limits(key.limits), local_time(key.created_at)


def me(*, as_json: bool) -> None:
    """Who the gateway thinks we are."""
    with Client() as client:
        found = client.keys.me()
    if as_json:
        print_json(found)
        return
    facts = [("key", found.name or "-"), ("owner", found.owner or "-"), ("scopes", ", ".join(found.scopes))]
    print_facts([*facts, ("limits", _limits(found.limits)), ("used", _limits(found.usage))])


def create(name: str, owner: str, scopes: Sequence[str], limits: Sequence[str], *, as_json: bool) -> None:
    """Make a key and show it, once."""
    numbers = dict(_limit(text) for text in limits)
    with Client() as client:
        made = client.keys.create(name, owner=owner or None, scopes=list(scopes), limits=numbers or None)
    if as_json:
        print_json(made)
        return
    say(made.key)
    say(f"\nThis is the only time it is shown. Use it so: export STILLHOUSE_URL={client.url} STILLHOUSE_API_KEY=...")


def delete(name: str, *, is_sure: bool, as_json: bool) -> None:
    """Revoke a key."""
    confirm(f"Revoke the key {name}? Whoever uses it is refused from then on.", is_sure=is_sure)
    with Client() as client:
        client.keys.delete(name)
    done(f"revoked {name}", as_json=as_json, name=name, is_deleted=True)


def _limit(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        number = float(value)
    except ValueError:
        raise CliError(f"--limit {text} is no NAME=NUMBER", fix="--limit active_jobs=2", exit_code=EXIT_USAGE) from None
    return name, int(number) if number.is_integer() else number


def _limits(limits: Any) -> str:
    """`active_jobs 2, file_mib 1024`; what is unlimited is left out."""
    if not limits:
        return "-"
    return ", ".join(f"{name} {value}" for name, value in dict(limits).items() if value is not None) or "-"
