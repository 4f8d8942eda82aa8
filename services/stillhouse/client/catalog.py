"""What the deployment has to offer: models, verifiers, recipes, services."""

from __future__ import annotations

from collections.abc import Sequence

from stillhouse.client.calls import Call, path
from stillhouse.client.resource import Resource
from stillhouse.core.schemas import Model, Page, Queue, Recipe, Service, Services, Verifier


class AsyncModels(Resource):
    """Models that jobs may name."""

    async def list(self) -> list[Model]:
        """All of them."""
        return (await self._sender.send(Call("GET", "/v1/models", Page[Model]))).data

    async def get(self, name: str) -> Model:
        """A model."""
        return await self._sender.send(Call("GET", path("/v1/models/{}", name), Model))


class AsyncVerifiers(Resource):
    """What judges completions for outcome rewards."""

    async def list(self) -> list[Verifier]:
        """All of them."""
        return (await self._sender.send(Call("GET", "/v1/verifiers", Page[Verifier]))).data


class AsyncRecipes(Resource):
    """Presets for stages."""

    async def list(self) -> list[Recipe]:
        """All of them."""
        return (await self._sender.send(Call("GET", "/v1/recipes", Page[Recipe]))).data

    async def get(self, name: str) -> Recipe:
        """A recipe: what it is for, and its presets with every value and its source."""
        return await self._sender.send(Call("GET", path("/v1/recipes/{}", name), Recipe))


class AsyncServices(Resource):
    """The processes of the deployment."""

    async def list(self) -> list[Service]:
        """Those that live, with their health and the work that waits for them."""
        return (await self._sender.send(Call("GET", "/v1/services", Services))).data

    async def queues(self) -> Sequence[Queue]:
        """The work that waits, by role and model, also where no service is there to take it."""
        return (await self._sender.send(Call("GET", "/v1/services", Services))).queues
