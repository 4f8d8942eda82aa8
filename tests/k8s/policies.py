"""All policies by name. A policy takes a rendered overlay and gives what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from tests.k8s import edges, pods, schemas, wiring
from tests.k8s.rendered import Finding, Rendered

Policy = Callable[[Rendered], Iterator[Finding]]
POLICIES: Final[dict[str, Policy]] = {
    policy.__name__: policy
    for policy in (
        schemas.schema,
        pods.resources,
        pods.gpus,
        pods.probes,
        pods.security,
        pods.identity,
        pods.grace,
        pods.images,
        pods.settings,
        pods.reachable,
        pods.secrets,
        pods.writable,
        wiring.ports,
        wiring.selectors,
        wiring.references,
        wiring.queries,
        wiring.namespaces,
        wiring.availability,
        edges.network,
    )
}


def findings(rendered: Rendered) -> dict[str, list[str]]:
    """What each policy finds, without those that find nothing. The others need what the schema demands, so an object
    that breaks it is theirs only once it is mended."""
    if wrong := [str(one) for one in schemas.schema(rendered)]:
        return {"schema": wrong}
    found = {name: [str(one) for one in policy(rendered)] for name, policy in POLICIES.items()}
    return {name: wrong for name, wrong in found.items() if wrong}
