"""API keys: who may do what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stillhouse.client.calls import Call, path
from stillhouse.client.resource import Resource, delete
from stillhouse.core.schemas import Key, KeyInfo, NewKey, Page


class AsyncKeys(Resource):
    """API keys. All but `me` need the scope admin."""

    async def list(self) -> list[Key]:
        """All keys by name, without the keys themselves."""
        return (await self._sender.send(Call("GET", "/v1/keys", Page[Key]))).data

    async def me(self) -> KeyInfo:
        """Who we are: owner, scopes, limits, and what counts towards them."""
        return await self._sender.send(Call("GET", "/v1/keys/me", KeyInfo))

    async def create(
        self,
        name: str,
        *,
        owner: str | None = None,
        scopes: Sequence[str] = ("write",),
        limits: Mapping[str, float] | None = None,
    ) -> NewKey:
        """A new key, which the answer shows once, as `key`.

        Args:
            owner: whose jobs and files it makes and sees; None = its name.
            scopes: read, write, admin; each brings those before it.
            limits: by name, as `KeyLimits` has them; what is not named is as the deployment's settings say.
        """
        body = {"name": name, "owner": owner or "", "scopes": [*scopes], "limits": dict(limits or {})}
        # a repeat after a lost answer would be refused, the name being taken, and the key would be lost
        return await self._sender.send(Call("POST", "/v1/keys", NewKey, json=body, may_repeat=False))

    async def delete(self, name: str) -> None:
        """Revoke a key at once; its owner's jobs and files stay."""
        await delete(self._sender, path("/v1/keys/{}", name))
