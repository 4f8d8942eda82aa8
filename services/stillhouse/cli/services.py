"""`stillhouse services`: the processes of the deployment, wherever they run, and the work that waits for them."""

from __future__ import annotations

from stillhouse.cli.console import duration, print_json, print_table, say
from stillhouse.client.client import Client
from stillhouse.core.schemas import Queue, Service


def show(*, as_json: bool) -> None:
    """Two tables: services, and queues that hold something."""
    with Client() as client:
        services, queues = client.services.list(), client.services.queues()
    if as_json:
        print_json({"services": services, "queues": queues})
        return
    if not services:
        say("no service has announced itself; `stillhouse up` starts them")
        return
    columns = ("service", "state", "health", "job", "version", ">heartbeat", "address")
    print_table(columns, [_row(service) for service in services])
    if busy := [queue for queue in queues if queue.waiting or queue.in_work]:
        say("\nqueues")
        print_table(("for", "model", ">waiting", ">in work", ">oldest"), [_queue(queue) for queue in busy])
    else:
        say("\nnothing is waiting")


def _row(service: Service) -> tuple[str, ...]:
    return (
        service.instance,
        service.state,
        service.health,
        service.job_id,
        service.version,
        f"{duration(service.heartbeat_age_s)} ago",
        service.address,
    )


def _queue(queue: Queue) -> tuple[str, ...]:
    return queue.role, queue.model, str(queue.waiting), str(queue.in_work), duration(queue.oldest_s)
