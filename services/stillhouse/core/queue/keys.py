"""Every Redis key of Stillhouse is made here.

    sh:jobs                              zset    job ids by creation time
    sh:jobs:deleted                      zset    as sh:jobs, of those deleted lately: a page may go on behind one
    sh:jobs:active                       zset    jobs that are not in a terminal state, by creation time
    sh:turn, sh:turns                    int, hash  claims so far; owner -> number of the newest one of a job of theirs
    sh:idempotency:{key}                 string  job id made for an Idempotency-Key; expires after a day
    sh:job:{id}                          hash    the job's record
    sh:job:{id}:lease                    string  "{instance}:{epoch}" of the trainer that leads; expires
    sh:job:{id}:events  :metrics         stream  history for readers; trimmed
    sh:job:{id}:{epoch}:streams          set     work streams of the epoch, so that closing it can delete them
    sh:job:{id}:{epoch}:partials         set     and the lists of partial completions
    sh:job:{id}:{epoch}:prompts          stream  PromptGroup, consumer group "samplers"
    sh:job:{id}:{epoch}:prompts:partial:{entry}  list  PartialGroup: what the samples of a group have so far
    sh:job:{id}:{epoch}:rollouts:{name}  stream  Rollout, consumer group "teachers"
    sh:job:{id}:{epoch}:scored           stream  Score, consumer group "trainers"
    sh:job:{id}:{epoch}:dead             stream  what was given up, for people
    sh:job:{id}:{epoch}:marks            hash    (stage, sample id, attempt) already handed over
    sh:teachers                          set     model hashes with streams
    sh:teacher:{model_sha256}            hash    stream of rollouts -> TeacherTask
    sh:services                          zset    "{role}:{instance}" by last heartbeat
    sh:service:{role}:{instance}         hash    address and state; expires
    sh:rate:{key}:{name}                 string  when the bucket of a key's requests is full again, ms; expires
    sh:owner:{owner}:jobs                zset    jobs admitted under a limit, by admission; see core/queue/quotas.py
    sh:owner:{owner}:tokens:{day}        string  completion tokens asked for that day; expires
    sh:wants                             set     jobs that ask for samplers
    sh:want:{job_id}                     string  JSON list: epoch, min, max, priority, has begun, since; expires
    sh:nodes:{group}                     hash    the nodes of one trainer, see trainer/roll.py; expires
    sh:sampler:{instance}                string  "{job_id}:{epoch}" that leased it; expires

No braces: one primary, no Redis Cluster, since one script touches a job's record and its streams together.
"""

from __future__ import annotations

from typing import Final

JOBS: Final = "sh:jobs"
JOBS_DELETED: Final = "sh:jobs:deleted"
JOBS_ACTIVE: Final = "sh:jobs:active"
TEACHERS: Final = "sh:teachers"
TURN: Final = "sh:turn"
TURNS: Final = "sh:turns"
SERVICES: Final = "sh:services"
WANTS: Final = "sh:wants"
SWEEPER: Final = "sh:sweeper"

SAMPLERS_GROUP: Final = "samplers"
TEACHERS_GROUP: Final = "teachers"
TRAINERS_GROUP: Final = "trainers"


def idempotency(key: str) -> str:
    return f"sh:idempotency:{key}"


def job(job_id: str) -> str:
    return f"sh:job:{job_id}"


def lease(job_id: str) -> str:
    return f"sh:job:{job_id}:lease"


def events(job_id: str) -> str:
    return f"sh:job:{job_id}:events"


def metrics(job_id: str) -> str:
    return f"sh:job:{job_id}:metrics"


def streams(job_id: str, epoch: int) -> str:
    return f"sh:job:{job_id}:{epoch}:streams"


def prompts(job_id: str, epoch: int) -> str:
    return f"sh:job:{job_id}:{epoch}:prompts"


def rollouts(job_id: str, epoch: int, teacher: str) -> str:
    return f"sh:job:{job_id}:{epoch}:rollouts:{teacher}"


def scored(job_id: str, epoch: int) -> str:
    return f"sh:job:{job_id}:{epoch}:scored"


def partials(job_id: str, epoch: int) -> str:
    return f"sh:job:{job_id}:{epoch}:partials"


def partials_beside(stream: str) -> str:
    """`partials` of the epoch that a stream is of."""
    return ":".join([*stream.split(":")[:4], "partials"])


def partial(stream: str, entry_id: str) -> str:
    return f"{stream}:partial:{entry_id}"


def dead(job_id: str, epoch: int) -> str:
    return f"sh:job:{job_id}:{epoch}:dead"


def marks(job_id: str, epoch: int) -> str:
    return f"sh:job:{job_id}:{epoch}:marks"


def teacher(model_sha256: str) -> str:
    return f"sh:teacher:{model_sha256}"


def service(role: str, instance: str) -> str:
    return f"sh:service:{role}:{instance}"


def want(job_id: str) -> str:
    return f"sh:want:{job_id}"


def nodes(group: str) -> str:
    return f"sh:nodes:{group}"


def sampler(instance: str) -> str:
    return f"sh:sampler:{instance}"


def rate(key: str, name: str) -> str:
    return f"sh:rate:{key}:{name}"


def admitted(owner: str) -> str:
    return f"sh:owner:{owner}:jobs"


def daily_tokens(owner: str, day: int) -> str:
    return f"sh:owner:{owner}:tokens:{day}"
