"""/v1/keys: who may call. Making and removing them needs the scope admin."""

from __future__ import annotations

import asyncio
from pathlib import Path as FilePath
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Path, Response
from pydantic import BaseModel, ConfigDict, Field

from stillhouse.core import keys
from stillhouse.core.errors import ConflictError, NotFoundError
from stillhouse.core.schemas import Key, KeyInfo, KeyLimits, KeyScope, NewKey, Page
from stillhouse.core.service import Context
from stillhouse.gateway import files, limits
from stillhouse.gateway.auth import Caller
from stillhouse.gateway.deps import ByCaller, Ctx, require
from stillhouse.gateway.routes.deadline import DeadlineRoute
from stillhouse.gateway.views import timestamp

router = APIRouter(prefix="/v1/keys", tags=["keys"], route_class=DeadlineRoute)
NAME = r"^[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}$"
KeyName = Annotated[str, Path(pattern=NAME)]


class KeyRequest(BaseModel):
    """A key to make."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    name: str = Field(pattern=NAME)
    """Of the key: shown in lists and in the access log."""
    owner: str = Field(default="", pattern=rf"{NAME}|^$")
    """Whose jobs and files it makes and sees; empty = the name."""
    scopes: list[KeyScope] = Field(default=["write"], min_length=1, max_length=3)
    """What it may do; each brings those before it."""
    limits: KeyLimits = KeyLimits()
    """Instead of the deployment's."""


@router.get("/me")
async def get_own_key(ctx: Ctx, caller: ByCaller) -> KeyInfo:
    """Who the caller is, what it may do and use, and what it uses."""
    return KeyInfo(
        name=caller.key,
        owner=caller.owner,
        scopes=list(caller.scopes),  # type: ignore[arg-type]  # checked when the file was read
        limits=limits.in_force(ctx.settings, caller),
        usage=await _usage(ctx, caller),
    )


@router.get("", dependencies=[Depends(require("admin"))])
async def list_keys(ctx: Ctx) -> Page[Key]:
    """All keys by name, without the keys themselves."""
    entries = await asyncio.to_thread(keys.load_keys, ctx.settings.keys_path())
    return Page(data=[Key(**_fields(entry)) for entry in sorted(entries, key=lambda entry: entry.name)])


@router.post("", status_code=201, dependencies=[Depends(require("admin"))])
async def create_key(ctx: Ctx, response: Response, body: Annotated[KeyRequest, Body()]) -> NewKey:
    """Make a key. The answer shows it, and nothing does again."""
    path = _keys_file(ctx)
    own_limits = body.limits.model_dump(exclude_none=True)

    def make() -> NewKey:
        plain = keys.create_key(path, body.name, owner=body.owner, scopes=body.scopes, limits=own_limits)
        entry = next(entry for entry in keys.load_keys(path) if entry.name == body.name)
        return NewKey(key=plain, **_fields(entry))

    response.headers["Cache-Control"] = "no-store"
    return await asyncio.to_thread(make)


@router.delete("/{name}", status_code=204, dependencies=[Depends(require("admin"))])
async def delete_key(ctx: Ctx, name: KeyName) -> None:
    """Revoke a key at once. Its owner's jobs and files stay; the last key with the scope admin stays, too."""
    path = _keys_file(ctx)
    if not await asyncio.to_thread(keys.remove_key, path, name, keeps_an_admin=True):
        raise NotFoundError(f"there is no key '{name}'")


async def _usage(ctx: Context, caller: Caller) -> dict[str, float]:
    size = await asyncio.to_thread(files.used_bytes, ctx.artifacts, caller.owner)
    return {**await limits.usage(ctx, caller), "file_mib": round(size / limits.MIB, 3)}


def _keys_file(ctx: Context) -> FilePath:
    if ctx.settings.auth == "none":
        raise ConflictError("authentication is off (setting auth), and keys would change nothing; set auth: keys")
    return ctx.settings.keys_path()


def _fields(entry: keys.ApiKey) -> dict[str, Any]:
    return {
        "name": entry.name,
        "owner": entry.owner,
        "scopes": list(entry.scopes),
        "limits": KeyLimits.model_validate(entry.limits),
        "created_at": timestamp(entry.created_at),
    }
