"""Teachers with registries of their own, as k8s/components/experts sets them up: each serves its models, and a job with
all of them runs as on one pool."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from stillhouse.client.aio import AsyncClient
from stillhouse.core.models import ModelRegistry
from stillhouse.gateway import scoring
from stillhouse.gateway.app import create_app
from tests.cluster import Cluster, job_spec

EXPERTS = ("math", "code")


@pytest.fixture
async def cluster(tmp_path: Path, redis_url: str) -> AsyncIterator[Cluster]:
    """`math-0` knows the model math, `code-0` the model code; gateway and trainer know both and the student."""
    made = Cluster(tmp_path, redis_url, auth="none")
    common = made.settings
    for number, name in enumerate(("student", *EXPERTS)):
        made.add_model(name, seed=number, max_position_embeddings=64)
    try:
        for name in EXPERTS:
            own = common.model_copy(update={"models_file": tmp_path / f"models-{name}.yaml"})
            ModelRegistry(own.models_path()).add(made.models.get(name))
            made.settings = own
            await made.start("teacher", f"{name}-0")
        made.settings = common
        yield made
    finally:
        await made.close()


async def test_a_job_asks_each_expert_where_it_is(cluster: Cluster) -> None:
    await cluster.start("sampler")
    await cluster.start("trainer")
    rows = [{"prompt": f"say {number}", "teacher": EXPERTS[number % 2]} for number in range(6)]
    teachers = {name: {"model": name} for name in EXPERTS}
    spec = job_spec(teachers=teachers, stages__0__data={"rows": rows}, stages__0__schedule__steps=2)
    await cluster.succeeded(await cluster.submit(spec))


@pytest.mark.parametrize("model", EXPERTS)
async def test_a_score_comes_from_the_expert_that_has_the_model(
    cluster: Cluster, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the other is asked first, which the models' hashes decide."""
    monkeypatch.setattr(scoring, "in_turn", lambda found, _: sorted(found, key=lambda one: model in one.instance))
    cluster.settings.artifacts_dir().mkdir(exist_ok=True)
    transport = httpx.ASGITransport(app=create_app(cluster.ctx, cluster.settings))
    async with AsyncClient("http://gateway", "", retries=0, transport=transport) as client:
        answer = await client.score(model, ["say one"])
    assert answer["model_sha256"] == cluster.models.get(model).sha256
