"""`stillhouse ps`: what runs here, from three sources that need not agree.

state.json says what the supervisor started, the registry what announced itself, /proc what lives and how big it is.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from stillhouse.cli import process
from stillhouse.cli.console import duration, print_json, print_table, say, size
from stillhouse.cli.deployment import Deployment
from stillhouse.cli.registry import live_services
from stillhouse.core.queue.registry import ServiceInfo


def collect(deployment: Deployment) -> dict[str, Any]:
    """The deployment as plain data."""
    state = deployment.read_state()
    pid = deployment.supervisor_pid()
    if pid is None:
        return {"running": False, "home": str(deployment.home), "services": []}
    found = {(info.role, info.instance): info for info in asyncio.run(live_services(deployment))}
    return {
        "running": True,
        "status": state.get("status", "starting"),
        "home": str(deployment.home),
        "url": state.get("url", ""),
        "pid": pid,
        "services": [_row(service, found, state) for service in state.get("services", [])],
    }


def _row(service: dict[str, Any], found: dict[tuple[str, str], ServiceInfo], state: dict[str, Any]) -> dict[str, Any]:
    pid = service["pid"]
    info = found.get((service["role"], service["name"]))
    if info is not None and info.pid != pid:
        info = None  # the heartbeat of its predecessor
    address = info.address if info else ""
    if service["role"] == "valkey":
        address = f"127.0.0.1:{state['valkey_port']}"
    elif service["role"] == "gateway":
        address = address or str(state["url"]).removeprefix("http://")
    is_alive = bool(pid) and process.is_alive(pid)
    return {
        "role": service["role"],
        "instance": service["name"],
        "pid": pid if is_alive else None,
        "state": ((info.state if info else "") or "running")
        if is_alive
        else service["state"].replace("running", "dead"),
        "job": info.job_id if info else "",
        "restarts": service["restarts"],
        "uptime_s": round(time.time() - service["started_at"], 1) if is_alive else None,
        "memory_bytes": process.memory_bytes(pid) if is_alive else None,
        "address": address,
    }


def show(deployment: Deployment, *, as_json: bool) -> None:
    """Print the table."""
    facts = collect(deployment)
    if as_json:
        print_json(facts)
        return
    if not facts["running"]:
        say(f"nothing is running in {deployment.home}; start with `stillhouse up`")
        return
    print_table(
        ("role", "instance", ">pid", "state", "job", ">restarts", ">uptime", ">memory", "address"),
        [
            (
                row["role"],
                row["instance"],
                str(row["pid"] or "-"),
                row["state"],
                row["job"] or "-",
                str(row["restarts"]),
                duration(row["uptime_s"]),
                size(row["memory_bytes"]),
                row["address"] or "-",
            )
            for row in facts["services"]
        ],
    )
    say(f"\n{facts['url']}  {facts['status']}  supervisor pid {facts['pid']}  home {facts['home']}")
