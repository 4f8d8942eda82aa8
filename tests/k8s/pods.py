"""Policies on single pods: what each needs, may do and is told."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from stillhouse.core.config import PREFIX, Settings
from tests.k8s import facts
from tests.k8s.rendered import Finding, Object, Pod, Rendered

GPU: Final = "nvidia.com/gpu"
START_S: Final = 300
"""Least time to start: importing torch from a cold disk, waiting for the queue server (compose gives the same)."""
OTHERS: Final = re.compile(
    r"(OMP|OTEL|HF|NCCL|GLOO|VLLM|TRITON|TORCH|TORCHINDUCTOR|CUDA|NVIDIA|PYTORCH|PYTHON|XDG|MPL|REDIS)_?[A-Z0-9_]*$"
    r"|HOME$|TMPDIR$|POD_[A-Z]+$"
)
"""Variables of other programs that a pod may set."""
SECRET_NAMES: Final = re.compile(r"(TOKEN|PASSWORD|SECRET|API_KEY)$")


def resources(rendered: Rendered) -> Iterator[Finding]:
    """Every container asks for processor time and memory, and may take no more memory than it asked for."""
    for pod, container in _all(rendered):
        asks, may = (container.get("resources", {}).get(kind, {}) for kind in ("requests", "limits"))
        where = f"{pod.where}, {container['name']}"
        if "cpu" not in asks:
            yield Finding(where, "no request for cpu", "set resources.requests.cpu")
        if "memory" not in may or asks.get("memory") != may["memory"]:
            wrong = f"memory: requests {asks.get('memory')}, limit {may.get('memory')}"
            yield Finding(where, wrong, "set both to one figure: who uses more than it asked for is evicted first")


def gpus(rendered: Rendered) -> Iterator[Finding]:
    """A pod with GPUs is let onto their nodes, has shared memory, no surge pod, and a process or a share for each."""
    for pod, container in _own(rendered):
        number = int(container.get("resources", {}).get("limits", {}).get(GPU, 0))
        target = _target(container)
        if bool(number) != (target in ("vllm", "trainer")):
            yield Finding(pod.where, f"image {target} with {number} GPUs", f"the images vllm and trainer need {GPU}")
        if number:
            yield from _gpu_pod(rendered, pod, container, number)


def _gpu_pod(rendered: Rendered, pod: Pod, container: Object, number: int) -> Iterator[Finding]:
    tolerated = [one for one in pod.spec.get("tolerations", []) if one.get("key") == GPU]
    if not any(one.get("operator") == "Exists" for one in tolerated):
        yield Finding(pod.where, f"does not tolerate {GPU}", "add the toleration: nodes with GPUs are tainted so")
    volumes = {one["name"]: one for one in pod.spec.get("volumes", [])}
    shared = [one for one in container.get("volumeMounts", []) if one["mountPath"] == "/dev/shm"]
    if not any(volumes.get(one["name"], {}).get("emptyDir", {}).get("medium") == "Memory" for one in shared):
        yield Finding(
            pod.where, "/dev/shm has the 64 MiB of the runtime", "mount an emptyDir with medium: Memory there"
        )
    strategy = pod.owner["spec"].get("strategy", {})
    surges = strategy.get("type") != "Recreate" and strategy.get("rollingUpdate", {}).get("maxSurge") != 0
    if pod.owner["kind"] == "Deployment" and surges:
        yield Finding(pod.where, "a surge pod would wait for a GPU for ever", "strategy: Recreate, or maxSurge: 0")
    settings = rendered.environment(container)
    name = PREFIX + ("TRAINER_RANKS" if pod.component == "trainer" else "VLLM_TENSOR_PARALLEL")
    wanted = number * (int(settings.get(PREFIX + "TRAINER_NODES", 1)) if pod.component == "trainer" else 1)
    if int(settings.get(name, 1)) != wanted:
        wrong = f"{name} is {settings.get(name, 1)} where the pods have {wanted} GPUs"
        yield Finding(pod.where, wrong, "a rank, or a share of the model, for every GPU")


def probes(rendered: Rendered) -> Iterator[Finding]:
    """Every container that stays is asked whether it lives and is ready, by the names that the code answers."""
    for pod in rendered.pods():
        for container in pod.containers if pod.runs_forever else ():
            where = f"{pod.where}, {container['name']}"
            for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
                if kind not in container:
                    if kind != "startupProbe" or pod.component in facts.GRPC_ROLES:
                        yield Finding(where, f"no {kind}", "add one: what nobody asks is never started again")
                elif wrong := _wrong_probe(rendered, pod, container, kind):
                    yield Finding(where, f"{kind}: {wrong}", "ask what the code answers: tests/k8s/facts.py")


def _wrong_probe(rendered: Rendered, pod: Pod, container: Object, kind: str) -> str:
    probe, ready = container[kind], kind == "readinessProbe"
    budget = probe.get("periodSeconds", 10) * probe.get("failureThreshold", 3)
    if kind == "startupProbe" and pod.component in facts.GRPC_ROLES and budget < START_S:
        return f"gives up after {budget} s, services may take {START_S} s"
    if pod.component == "gateway":
        wanted, got = facts.GATEWAY_PATHS[ready], probe.get("httpGet", {}).get("path")
        return "" if got == wanted else f"asks {got}, not {wanted}"
    if pod.component not in facts.GRPC_ROLES or is_multi_node(rendered, container):
        return ""
    return _wrong_health(rendered, container, probe, facts.HEALTH[pod.component] if ready else "")


def _wrong_health(rendered: Rendered, container: Object, probe: Object, wanted: str) -> str:
    if PREFIX + "TLS_CERT" in rendered.environment(container):
        command = probe.get("exec", {}).get("command", [])
        is_ours = command[:2] == ["stillhouse", "healthcheck"] and (wanted in command or not wanted)
        return "" if is_ours else "the kubelet's gRPC probe speaks no TLS; run `stillhouse healthcheck`"
    asked = probe.get("grpc", {})
    if asked.get("port") != facts.ports()["grpc"]:
        return f"asks gRPC port {asked.get('port')}, the service is at {facts.ports()['grpc']}"
    return "" if (asked.get("service") or "") == wanted else f"asks '{asked.get('service')}', not '{wanted}'"


def is_multi_node(rendered: Rendered, container: Object) -> bool:
    """Whether its trainer is split over several pods: only the first of them serves gRPC."""
    return int(rendered.environment(container).get(PREFIX + "TRAINER_NODES", 1)) > 1


RESTRICTED_POD: Final = {"runAsNonRoot": True, "runAsUser": facts.USER_ID, "seccompProfile": {"type": "RuntimeDefault"}}
RESTRICTED: Final = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


def security(rendered: Rendered) -> Iterator[Finding]:
    """The restricted Pod Security Standard, and a read-only root."""
    for pod in rendered.pods():
        context = pod.spec.get("securityContext", {})
        yield from _differences(pod.where, context, RESTRICTED_POD)
        for key in ("hostNetwork", "hostPID", "hostIPC"):
            if pod.spec.get(key):
                yield Finding(pod.where, f"{key} is on", "remove it")
        for volume in pod.spec.get("volumes", []):
            if "hostPath" in volume:
                yield Finding(pod.where, f"volume {volume['name']} is a path of its node", "use a claim or an emptyDir")
        for container in pod.all_containers:
            own = container.get("securityContext", {})
            where = f"{pod.where}, {container['name']}"
            yield from _differences(where, own, RESTRICTED)
            weaker = {key: value for key, value in RESTRICTED_POD.items() if key in own}
            yield from _differences(where, own, weaker)
    for namespace in rendered.kind("Namespace"):
        key = "pod-security.kubernetes.io/enforce"
        yield from _differences(f"Namespace {namespace['metadata']['name']}", _labels(namespace), {key: "restricted"})


def _labels(one: Object) -> dict[str, str]:
    return one["metadata"].get("labels", {})


def _differences(where: str, got: dict[str, Any], wanted: dict[str, Any]) -> Iterator[Finding]:
    for key, value in wanted.items():
        if got.get(key) != value:
            yield Finding(where, f"{key} is {got.get(key)}", f"set it to {value}")


def identity(rendered: Rendered) -> Iterator[Finding]:
    """Nothing of ours talks to Kubernetes: no pod has a token for it, nor variables about its neighbours."""
    for pod in rendered.pods():
        for key in ("automountServiceAccountToken", "enableServiceLinks"):
            if pod.spec.get(key) is not False:
                why = (
                    "a Service named stillhouse-x would set STILLHOUSE_X_PORT" if "Links" in key else "nothing uses it"
                )
                yield Finding(pod.where, f"{key} is {pod.spec.get(key)}", f"set it to false: {why}")


def grace(rendered: Rendered) -> Iterator[Finding]:
    """A pod that is told to end has the time its service takes to hand back its work."""
    for pod, container in _own(rendered):
        if pod.component not in facts.ROLES:
            continue
        sleeps = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        drain = float(rendered.environment(container).get(PREFIX + "DRAIN_S", facts.DRAIN_S))
        needed, has = sleeps + drain + facts.STOP_S, pod.spec.get("terminationGracePeriodSeconds", 30)
        if has < needed:
            wrong = f"killed after {has} s, needs {needed:g} s (preStop {sleeps}, drain_s {drain:g}, open calls)"
            yield Finding(pod.where, wrong, "raise terminationGracePeriodSeconds")


def images(rendered: Rendered) -> Iterator[Finding]:
    """Ours are targets of the Dockerfile with the package's version; others have a tag that says which."""
    for pod, container in _all(rendered):
        name, _, digest = container["image"].partition("@")
        repository, _, tag = name.rpartition(":") if ":" in name.rpartition("/")[2] else (name, "", "")
        wrong = ""
        if not digest and tag in ("", "latest"):
            wrong = "no tag, or `latest`: a restart may bring another program"
        elif target := _target(container):
            if target not in facts.image_targets():
                wrong = f"docker/Dockerfile has no target {target}: {', '.join(sorted(facts.image_targets()))}"
            elif not digest and tag != facts.version():
                wrong = f"tag {tag}, the package is {facts.version()}"
        elif repository not in facts.foreign_images():
            wrong = f"neither ours nor one of docker-compose.yml's: {', '.join(sorted(facts.foreign_images()))}"
        if wrong:
            yield Finding(f"{pod.where}, {container['name']}", f"image {container['image']}: {wrong}", "name another")


def settings(rendered: Rendered) -> Iterator[Finding]:
    """Variables are settings that the code knows, with values that it takes."""
    for pod, container in _own(rendered):
        values = rendered.environment(container)
        names = {*values, *(one["name"] for one in container.get("env", []))}
        where = f"{pod.where}, {container['name']}"
        for name in sorted(names):
            known = name in facts.SETTINGS if name.startswith(PREFIX) else OTHERS.match(name)
            if not known:
                yield Finding(where, f"nothing reads {name}", "settings are listed in docs/configuration.md")
        ours = {name.removeprefix(PREFIX).lower(): values[name] for name in values if name in facts.SETTINGS}
        try:
            Settings.model_validate(ours)
        except ValidationError as error:
            first = error.errors()[0]
            yield Finding(where, f"{'.'.join(map(str, first['loc']))}: {first['msg']}", "see docs/configuration.md")


def reachable(rendered: Rendered) -> Iterator[Finding]:
    """A service listens to others, and names an address to them that leads to its pod; it runs what its label says."""
    for pod, container in _own(rendered):
        if pod.component not in facts.ROLES:
            continue
        env = {one["name"]: one for one in container.get("env", [])}
        if rendered.environment(container).get(PREFIX + "HOST") != "0.0.0.0":
            yield Finding(pod.where, "listens to itself only", f"set {PREFIX}HOST to 0.0.0.0")
        source = env.get(PREFIX + "ADVERTISE_HOST", {}).get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
        if source != "status.podIP":
            yield Finding(pod.where, "names its host name, which no other pod can look up", "advertise status.podIP")
        module = f"stillhouse.{pod.component}"
        started = [*container.get("command", []), *container.get("args", [])]
        if module not in " ".join(started or facts.default_command(_target(container))):
            wrong = f"labelled {pod.component}, starts {started or 'what its image starts'}"
            yield Finding(pod.where, wrong, f"args: [python, -m, {module}]")


def secrets(rendered: Rendered) -> Iterator[Finding]:
    """Secrets come by reference to what the example file lists; none is in a manifest."""
    for one in rendered.kind("Secret"):
        yield Finding(
            f"Secret {one['metadata']['name']}", "its values are in the manifests", "refer to it by name only"
        )
    for pod, container in _all(rendered):
        where = f"{pod.where}, {container['name']}"
        for name, value in rendered.environment(container).items():
            if SECRET_NAMES.search(name) or re.search(r"://[^/@]*:[^/@]+@", value):
                yield Finding(where, f"{name} is in plain text", "take it from a Secret (secretKeyRef, or a file)")
        if pod.component in facts.ROLES:
            names = {one["name"] for one in container.get("env", [])} | set(rendered.environment(container))
            if not names & {PREFIX + "INTERNAL_TOKEN", PREFIX + "INTERNAL_TOKEN_FILE"}:
                yield Finding(where, "no internal credential: it will not start", f"set {PREFIX}INTERNAL_TOKEN_FILE")


def writable(rendered: Rendered) -> Iterator[Finding]:
    """A read-only root leaves the places where programs write: /tmp, and the shared folder of the deployment."""
    claims: dict[str, str] = {}
    for pod, container in _own(rendered):
        paths = {mount["mountPath"]: mount["name"] for mount in container.get("volumeMounts", [])}
        if "/tmp" not in paths:
            yield Finding(pod.where, "cannot write to /tmp", "mount an emptyDir there")
        home = rendered.environment(container).get(PREFIX + "ARTIFACTS") or rendered.environment(container).get(
            PREFIX + "HOME", facts.HOME
        )
        volumes = {one["name"]: one for one in pod.spec.get("volumes", [])}
        mount = max((path for path in paths if Path(home).is_relative_to(path)), key=len, default="")
        claim = volumes.get(paths.get(mount, ""), {}).get("persistentVolumeClaim", {}).get("claimName", "")
        if pod.component in facts.ROLES:
            claims[pod.where] = claim
    for where, claim in claims.items():
        if not claim or claim != next(iter(claims.values())):
            wrong = f"its artifacts are in '{claim}', others' in {sorted(set(claims.values()))}"
            yield Finding(where, wrong, "all services see one artifacts folder: mount one claim at STILLHOUSE_HOME")


def _all(rendered: Rendered) -> Iterator[tuple[Pod, Object]]:
    return ((pod, container) for pod in rendered.pods() for container in pod.all_containers)


def _own(rendered: Rendered) -> Iterator[tuple[Pod, Object]]:
    """Containers with images of ours."""
    return ((pod, one) for pod, one in _all(rendered) if _target(one))


def _target(container: Object) -> str:
    """The Dockerfile's target of an image of ours, else "": `[registry/]stillhouse/target[:tag][@digest]`."""
    found = re.search(r"(?:^|/)stillhouse/([\w.-]+)(?:[:@]|$)", container["image"])
    return found[1] if found else ""
