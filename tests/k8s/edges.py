"""The network policy: what may connect is exactly what does. The calls come from the code (`facts.calls`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from tests.k8s import facts
from tests.k8s.pods import is_multi_node
from tests.k8s.rendered import Finding, Object, Pod, Rendered, matches

OUTSIDE: Final = "outside"
ANY_PORT: Final = 0
DNS: Final = 53
OTLP: Final = (4317, 4318)
Edge = tuple[str, str, int]
"""(from, to, port): parts of the platform or `OUTSIDE`."""


def network(rendered: Rendered) -> Iterator[Finding]:
    """Nothing may connect that does not, and all that does may, at both ends."""
    pods = [pod for pod in rendered.pods() if pod.component]
    for direction in ("Ingress", "Egress"):
        if not any(_denies_all(policy, direction) for policy in rendered.kind("NetworkPolicy")):
            yield Finding("NetworkPolicies", f"none denies all {direction}", "a default deny with podSelector {}")
    needed, also = calls(rendered, pods), tolerated(pods)
    out, into = allowed(rendered, "Egress"), allowed(rendered, "Ingress")
    for edge in sorted(needed):
        for found, direction in ((out, "egress"), (into, "ingress")):
            outer = edge[1] == OUTSIDE if direction == "ingress" else edge[0] == OUTSIDE
            if not outer and edge not in found and (*edge[:2], ANY_PORT) not in found:
                yield Finding(_name(edge), f"the code makes this call, no policy allows its {direction}", "allow it")
    for edge, policy in {**into, **out}.items():
        if edge not in needed | also:
            yield Finding(f"NetworkPolicy {policy}", f"allows {_name(edge)}, which nothing calls", "remove that edge")


def calls(rendered: Rendered, pods: list[Pod]) -> set[Edge]:
    """Connections that are made: `facts.calls` between the parts which are here, to the DNS, between a trainer's nodes,
    by users, and by those who read metrics or take traces."""
    here = {pod.component for pod in pods}
    found = {(source, to, facts.ports()[port]) for source, to, port in facts.calls() if {source, to} <= here}
    found |= {(pod.component, OUTSIDE, DNS) for pod in pods if pod.component in facts.ROLES}
    found.add((OUTSIDE, "gateway", facts.ports()["rest"]))
    if rendered.kind("PodMonitor"):
        found |= {(OUTSIDE, role, facts.ports()["metrics"]) for role in facts.GRPC_ROLES}
    for pod in pods:
        if any(is_multi_node(rendered, one) for one in pod.containers):
            found.add((pod.component, pod.component, ANY_PORT))
        if any("OTEL_EXPORTER_OTLP_ENDPOINT" in rendered.environment(one) for one in pod.containers):
            found.add((pod.component, OUTSIDE, _otlp_port(rendered, pod)))
    return found


def _otlp_port(rendered: Rendered, pod: Pod) -> int:
    values = (rendered.environment(one).get("OTEL_EXPORTER_OTLP_ENDPOINT", "") for one in pod.containers)
    port = next(filter(None, values)).rpartition(":")[2].partition("/")[0]
    return int(port) if port.isdigit() else OTLP[1]


def tolerated(pods: list[Pod]) -> set[Edge]:
    """What pods of other kinds may do, such as a task that submits a job: ask the gateway."""
    others = {pod.component for pod in pods} - set(facts.ROLES) - {"redis"}
    found = {(pod, "gateway", facts.ports()["rest"]) for pod in others}
    return found | {(pod, OUTSIDE, DNS) for pod in others}


def allowed(rendered: Rendered, direction: str) -> dict[Edge, str]:
    """Connections that policies allow at one end, with the policy's name."""
    found: dict[Edge, str] = {}
    for policy in rendered.kind("NetworkPolicy"):
        if direction not in _directions(policy):
            continue
        own = {pod.component for pod in rendered.pods() if matches(policy["spec"]["podSelector"], pod.labels)}
        for rule in policy["spec"].get(direction.lower(), []):
            peers = rule.get("to" if direction == "Egress" else "from")
            for here in own:
                for there in _components(rendered, peers):
                    for port in _ports(rendered, rule, there if direction == "Egress" else here):
                        edge = (here, there, port) if direction == "Egress" else (there, here, port)
                        found[edge] = policy["metadata"]["name"]
    return found


def _components(rendered: Rendered, peers: list[Object] | None) -> set[str]:
    """Who a rule's peers are; no peers are everybody, inside and outside."""
    found = set[str]()
    for peer in peers or [{"podSelector": {}}, {"ipBlock": {}}]:
        if "namespaceSelector" in peer or "ipBlock" in peer:
            found.add(OUTSIDE)
        else:
            found |= {pod.component for pod in rendered.pods() if matches(peer["podSelector"], pod.labels)}
    return found


def _ports(rendered: Rendered, rule: Object, component: str) -> set[int]:
    names = {name: port for pod in rendered.pods() if pod.component == component for name, port in pod.ports().items()}
    if not rule.get("ports"):
        return {ANY_PORT}
    numbers = (one.get("port", ANY_PORT) for one in rule["ports"])
    return {one if isinstance(one, int) else names.get(one, -1) for one in numbers}


def _directions(policy: Object) -> list[str]:
    return policy["spec"].get("policyTypes", ["Ingress"])


def _denies_all(policy: Object, direction: str) -> bool:
    """Whether it denies what no other policy allows, to pods that nobody has thought of, too."""
    return direction in _directions(policy) and not any(policy["spec"]["podSelector"].values())


def _name(edge: Edge) -> str:
    return f"{edge[0]} -> {edge[1]} at {'any port' if edge[2] == ANY_PORT else edge[2]}"
