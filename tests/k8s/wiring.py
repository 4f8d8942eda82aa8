"""Policies on what objects say of each other: names, selectors, ports."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

import yaml

from stillhouse.core.config import PREFIX
from tests.k8s import facts
from tests.k8s.pods import is_multi_node
from tests.k8s.rendered import MANIFESTS, Finding, Object, Pod, Rendered, matches, title

SECRETS_EXAMPLE: Final = MANIFESTS / "secrets.example.yaml"
ONE_NODE: Final = ("cpu-smoke", "single-node-gpu")
"""Overlays for one machine, where a volume of one node (ReadWriteOnce) is enough."""


def ports(rendered: Rendered) -> Iterator[Finding]:
    """Pods open the ports of the code, the compose file and the images, and Services lead to them."""
    for pod in rendered.pods():
        wanted = expected_ports(rendered, pod)
        if wanted and pod.ports() != wanted:
            yield Finding(pod.where, f"opens {pod.ports()}, should be {wanted}", "correct containerPort or its name")
        yield from _port_settings(rendered, pod)
    for service in rendered.kind("Service"):
        for pod in selected(rendered, service["spec"].get("selector")):
            for port in service["spec"].get("ports", []):
                target = port.get("targetPort", port["port"])
                if target not in (*pod.ports(), *pod.ports().values()):
                    fix = f"{pod.where} has {pod.ports()}"
                    yield Finding(title(service), f"leads to port {target}, which its pod does not open", fix)


def expected_ports(rendered: Rendered, pod: Pod) -> dict[str, int]:
    """Ports by name of a part of the platform; of a trainer on several nodes also where they meet."""
    match pod.component:
        case "gateway":
            names = ["rest"]
        case "sampler" | "teacher" | "trainer":
            names = ["grpc", "metrics"]
        case "redis":
            names = ["redis"]
        case _:
            return {}
    found = {name: facts.ports()[name] for name in names}
    if "rendezvous" in pod.ports() and any(is_multi_node(rendered, one) for one in pod.containers):
        found["rendezvous"] = pod.ports()["rendezvous"]
    return found


def _port_settings(rendered: Rendered, pod: Pod) -> Iterator[Finding]:
    names = {"PORT": "rest" if pod.component == "gateway" else "grpc", "METRICS_PORT": "metrics"}
    for container in pod.containers if pod.component in facts.ROLES else ():
        values = rendered.environment(container)
        for setting, name in names.items():
            if pod.component == "gateway" and name == "metrics":
                continue
            if values.get(PREFIX + setting) != str(facts.ports()[name]):
                wrong = f"{PREFIX}{setting} is {values.get(PREFIX + setting)}: by itself it takes any free port"
                yield Finding(pod.where, wrong, f"set it to {facts.ports()[name]}")
        url = values.get(PREFIX + "REDIS_URL", "")
        host, _, port = url.rpartition("@")[2].removeprefix("redis://").partition("/")[0].partition(":")
        service = rendered.find("Service", host.partition(".")[0])
        if service is not None and port != str(service["spec"]["ports"][0]["port"]):
            yield Finding(pod.where, f"STILLHOUSE_REDIS_URL {url}: not the port of Service {host}", "correct the port")
        elif service is None and rendered.kind("StatefulSet") and _has(rendered, "redis"):
            yield Finding(pod.where, f"STILLHOUSE_REDIS_URL {url}: no Service of that name", "name the queue's Service")


def _has(rendered: Rendered, component: str) -> bool:
    return any(pod.component == component for pod in rendered.pods())


def selected(rendered: Rendered, labels: dict[str, str] | None) -> list[Pod]:
    """Pods that a Service's selector takes."""
    return [pod for pod in rendered.pods() if labels and matches({"matchLabels": labels}, pod.labels)]


def selectors(rendered: Rendered) -> Iterator[Finding]:
    """Workloads, Services, monitors and budgets take the pods that they are meant for, and no others."""
    for one in rendered.kind("Deployment", "StatefulSet", "DaemonSet"):
        own = Pod(one, one["spec"]["template"])
        for pod in rendered.pods():
            if matches(one["spec"]["selector"], pod.labels) != (pod.owner is one):
                wrong = f"its selector {'misses its own pods' if pod.owner is one else f'takes pods of {pod.where}'}"
                yield Finding(
                    own.where, wrong, "let spec.selector and the template's labels agree, and differ from others'"
                )
        for spread in one["spec"]["template"]["spec"].get("topologySpreadConstraints", []):
            if not matches(spread.get("labelSelector"), own.labels):
                yield Finding(own.where, "spreads pods that are not its own", "correct topologySpreadConstraints")
    for one in rendered.kind("Service", "PodDisruptionBudget"):
        service = one["kind"] == "Service"
        labels = one["spec"].get("selector")
        pods = selected(rendered, labels) if service else _matched(rendered, labels)
        if len({pod.component for pod in pods}) != 1:
            found = ", ".join(pod.where for pod in pods) or "nothing"
            yield Finding(title(one), f"selects {found}", "select the pods of one part of the platform")
    for one in rendered.kind("PodMonitor"):
        yield from _monitored(rendered, one)


def _matched(rendered: Rendered, selector: Object | None) -> list[Pod]:
    return [pod for pod in rendered.pods() if matches(selector, pod.labels)]


def _monitored(rendered: Rendered, monitor: Object) -> Iterator[Finding]:
    pods = _matched(rendered, monitor["spec"]["selector"])
    if not pods:
        yield Finding(title(monitor), "selects nothing", "correct spec.selector")
    for endpoint in monitor["spec"]["podMetricsEndpoints"]:
        for pod in pods:
            if endpoint["port"] not in pod.ports():
                yield Finding(
                    title(monitor), f"reads port {endpoint['port']}, {pod.where} has none", "name another port"
                )


def references(rendered: Rendered) -> Iterator[Finding]:
    """What an object names is there: volumes, claims, keys of Secrets, accounts, scale targets, backends."""
    for pod in rendered.pods():
        for kind, name in _named(pod):
            if rendered.find(kind, name) is None:
                yield Finding(pod.where, f"names {kind} {name}, which is not there", "add it or correct the name")
        volumes = {one["name"] for one in pod.spec.get("volumes", [])}
        volumes |= {one["metadata"]["name"] for one in pod.owner["spec"].get("volumeClaimTemplates", [])}
        for container in pod.all_containers:
            for mount in container.get("volumeMounts", []):
                if mount["name"] not in volumes:
                    yield Finding(pod.where, f"mounts {mount['name']}, not a volume of the pod", "add it to volumes")
        for name, key in _secret_keys(pod):
            if (name, key) not in known_secrets(rendered):
                wrong = f"needs key {key} of Secret {name}, of which nothing tells the operator"
                yield Finding(pod.where, wrong, f"add it to {SECRETS_EXAMPLE.name}, or correct the name")
    for one in rendered.objects:
        for kind, name in _targets(one):
            if rendered.find(kind, name) is None:
                yield Finding(title(one), f"names {kind} {name}, which is not there", "correct the name")


def _named(pod: Pod) -> Iterator[tuple[str, str]]:
    if account := pod.spec.get("serviceAccountName"):
        yield "ServiceAccount", account
    if pod.owner["kind"] == "StatefulSet" and pod.owner["spec"].get("serviceName"):
        yield "Service", pod.owner["spec"]["serviceName"]
    if queue := pod.owner["metadata"].get("labels", {}).get("kueue.x-k8s.io/queue-name"):
        yield "LocalQueue", queue
    for volume in pod.spec.get("volumes", []):
        if "configMap" in volume:
            yield "ConfigMap", volume["configMap"]["name"]
        if "persistentVolumeClaim" in volume:
            yield "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]
    for container in pod.all_containers:
        for source in [*container.get("envFrom", []), *(one.get("valueFrom", {}) for one in container.get("env", []))]:
            for key in ("configMapRef", "configMapKeyRef"):
                if key in source:
                    yield "ConfigMap", source[key]["name"]


def _secret_keys(pod: Pod) -> Iterator[tuple[str, str]]:
    """(Secret, key) that a pod takes; of a volume without `items` all keys: ""."""
    for volume in pod.spec.get("volumes", []):
        for source in (volume, *volume.get("projected", {}).get("sources", [])):
            if "secret" in source:
                secret = source["secret"]
                name = secret.get("secretName") or secret["name"]
                yield from ((name, item["key"]) for item in secret.get("items", [{"key": ""}]))
    for container in pod.all_containers:
        for one in container.get("env", []):
            if reference := one.get("valueFrom", {}).get("secretKeyRef"):
                yield reference["name"], reference["key"]
        yield from ((one["secretRef"]["name"], "") for one in container.get("envFrom", []) if "secretRef" in one)


def known_secrets(rendered: Rendered) -> set[tuple[str, str]]:
    """(Secret, key) of the example file and of certificates; key "" = the whole."""
    found = set[tuple[str, str]]()
    text = SECRETS_EXAMPLE.read_text() if SECRETS_EXAMPLE.exists() else ""
    for one in yaml.safe_load_all(text):
        keys = {**one.get("data", {}), **one.get("stringData", {})}
        found |= {(one["metadata"]["name"], key) for key in (*keys, "")}
    for one in rendered.kind("Certificate"):
        found |= {(one["spec"]["secretName"], key) for key in ("tls.crt", "tls.key", "ca.crt", "")}
    return found


def _targets(one: Object) -> Iterator[tuple[str, str]]:
    spec = one.get("spec", {})
    match one.get("kind"):
        case "HorizontalPodAutoscaler" | "ScaledObject":
            target = spec["scaleTargetRef"]
            yield target.get("kind", "Deployment"), target["name"]
            for trigger in spec.get("triggers", []):
                if reference := trigger.get("authenticationRef"):
                    yield reference.get("kind", "TriggerAuthentication"), reference["name"]
        case "HTTPRoute":
            yield from (("Service", back["name"]) for rule in spec["rules"] for back in rule.get("backendRefs", []))
        case "Ingress":
            paths = (path for rule in spec.get("rules", []) for path in rule["http"]["paths"])
            yield from (("Service", path["backend"]["service"]["name"]) for path in paths)
        case "Certificate":
            yield spec["issuerRef"].get("kind", "Issuer"), spec["issuerRef"]["name"]
        case "LocalQueue":
            yield "ClusterQueue", spec["clusterQueue"]
        case "ClusterQueue":
            flavors = (flavor for group in spec["resourceGroups"] for flavor in group["flavors"])
            yield from (("ResourceFlavor", flavor["name"]) for flavor in flavors)


def queries(rendered: Rendered) -> Iterator[Finding]:
    """What is scaled by, or alerted on, is exported: a misspelt metric has no value and no error."""
    for one in rendered.kind("ScaledObject", "PrometheusRule"):
        for name in sorted(set(re.findall(r"\bstillhouse_\w+", str(one["spec"])))):
            if name not in facts.metrics():
                yield Finding(title(one), f"asks for {name}, which no service exports", "see core/metrics.py")


CLUSTER_WIDE: Final = ("Namespace", "ClusterIssuer", "ClusterQueue", "ResourceFlavor", "PriorityClass", "StorageClass")


def namespaces(rendered: Rendered) -> Iterator[Finding]:
    """All objects are in the namespace that the overlay makes; a component's forgotten ones would be in `default`."""
    made = [one["metadata"]["name"] for one in rendered.kind("Namespace")]
    for one in rendered.objects:
        if one["kind"] not in CLUSTER_WIDE and one["metadata"].get("namespace") not in made:
            wrong = f"in namespace {one['metadata'].get('namespace')}, the overlay makes {', '.join(made) or 'none'}"
            yield Finding(title(one), wrong, "set `namespace:` in the overlay's kustomization.yaml")


def availability(rendered: Rendered) -> Iterator[Finding]:
    """Budgets let nodes be drained, one thing alone decides how many pods there are, and volumes reach their nodes."""
    for budget in rendered.kind("PodDisruptionBudget"):
        for pod in _matched(rendered, budget["spec"].get("selector")):
            replicas = pod.owner["spec"].get("replicas", 1)
            if budget["spec"].get("maxUnavailable") in (0, "0%") or budget["spec"].get("minAvailable", 0) == replicas:
                wrong = f"lets no pod of {pod.where} ({replicas}) go: no node could ever be drained"
                yield Finding(title(budget), wrong, "use maxUnavailable: 1")
    scaled: dict[tuple[str, str], str] = {}
    for one in rendered.kind("HorizontalPodAutoscaler", "ScaledObject"):
        target = (one["spec"]["scaleTargetRef"].get("kind", "Deployment"), one["spec"]["scaleTargetRef"]["name"])
        if target in scaled:
            yield Finding(title(one), f"scales {target[1]}, which {scaled[target]} scales, too", "keep one of them")
        scaled[target] = title(one)
    for claim in rendered.kind("PersistentVolumeClaim"):
        if rendered.name not in ONE_NODE and "ReadWriteMany" not in claim["spec"]["accessModes"]:
            wrong = f"{claim['spec']['accessModes']}: pods on other nodes cannot mount it"
            yield Finding(title(claim), wrong, "ReadWriteMany; ReadWriteOnce is for one node")
