"""Every Prometheus metric of Stillhouse, by the role that exports it. docs/observability.md is made from this file.

Rules: prefix `stillhouse_`, base units at the end of the name, `_total` for counters, a help text, labels with few
values. The label is called `role`: the Prometheus Operator puts labels `service` and `job` of its own on targets.
`job_id` stands only on gauges of what a process does now, and their series go when the claim ends; the teacher's
counters per job are bounded by `MAX_JOBS` of teacher/accounts.py.
"""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.process_collector import ProcessCollector

from stillhouse.core.config import Settings

COMMON: Final = CollectorRegistry()
GATEWAY: Final = CollectorRegistry()
SAMPLER: Final = CollectorRegistry()
TEACHER: Final = CollectorRegistry()
TRAINER: Final = CollectorRegistry()
BY_ROLE: Final = {"gateway": GATEWAY, "sampler": SAMPLER, "teacher": TEACHER, "trainer": TRAINER}
"""What a role exports beside COMMON."""

ROLES: Final = ("sampler", "teacher", "trainer")
"""Who can be the bottleneck of a job."""
REQUEST_BUCKETS: Final = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
"""Seconds. A healthy request takes 2 to 50 ms; 10 s and more are streams and downloads."""
CALL_BUCKETS: Final = (0.001, 0.005, 0.025, 0.1, 0.5, 2.5, 10.0, 60.0, 300.0)
"""Seconds. From a hint (1 ms) to weights or texts of a minute."""
WORK_BUCKETS: Final = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
"""Seconds. From a tiny model's step on a CPU to a long rollout of a large one."""
SIZE_BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Samples of a batch."""
TOKEN_BUCKETS: Final = (16, 64, 256, 1024, 4096, 16384, 65536)
"""Tokens of a completion."""

# ---- every process ---------------------------------------------------------------------------------------------------

PROCESS: Final = ProcessCollector(registry=COMMON)
"""process_cpu_seconds_total, process_resident_memory_bytes, process_open_fds ...: names that every exporter has."""
BUILD_INFO: Final = Gauge(
    "stillhouse_build_info", "Always 1; the role and version of the process", ["role", "version"], registry=COMMON
)
RPC_SECONDS: Final = Histogram(
    "stillhouse_rpc_seconds",
    "Time of internal gRPC calls served, by method and gRPC status code",
    ["method", "code"],
    registry=COMMON,
    buckets=CALL_BUCKETS,
)
REDIS_ERRORS: Final = Counter(
    "stillhouse_redis_errors_total",
    "Failed attempts at the queue server, by kind: connection, timeout, loading, full, readonly or other. A command "
    "that is tried again counts each time",
    ["kind"],
    registry=COMMON,
)

POLICY_VERSION: Final = Gauge(
    "stillhouse_policy_version",
    "Optimizer steps behind the weights of a job: published by its trainer, in a sampler's engine, in a teacher that "
    "follows the student",
    ["role", "job_id"],
    registry=COMMON,
)

# ---- gateway ---------------------------------------------------------------------------------------------------------

HTTP_SECONDS: Final = Histogram(
    "stillhouse_gateway_request_seconds",
    "Time of REST requests until their last byte, by method, route template and HTTP status",
    ["method", "route", "status"],
    registry=GATEWAY,
    buckets=REQUEST_BUCKETS,
)
PROBLEMS: Final = Counter(
    "stillhouse_gateway_problems_total",
    "Requests answered with a problem, by its code: unknown keys (unauthorized), missing scopes, limits, full "
    "queues, mistakes in jobs",
    ["code"],
    registry=GATEWAY,
)
SSE_FOLLOWERS: Final = Gauge(
    "stillhouse_gateway_sse_followers", "Clients that follow the events of a job", registry=GATEWAY
)
LAST_SWEEP: Final = Gauge(
    "stillhouse_gateway_last_sweep_timestamp_seconds",
    "When this gateway last looked after the jobs; only the replica that holds the sweeper's lease does",
    registry=GATEWAY,
)
# measured by that replica; without series elsewhere, and while the queue server is away
QUEUE_ENTRIES: Final = Gauge(
    "stillhouse_queue_entries",
    "Entries on the work streams of all jobs, waiting or in work, by stage: prompts (groups), rollouts, scored, dead",
    ["stage"],
    registry=GATEWAY,
)
QUEUE_AGE: Final = Gauge(
    "stillhouse_queue_oldest_age_seconds", "Age of the oldest entry of a stage; 0 = none", ["stage"], registry=GATEWAY
)
WORK_WAITING: Final = Gauge(
    "stillhouse_work_waiting",
    "Work that nobody has taken, by who takes it: jobs (trainer), groups (sampler), samples (teacher)",
    ["role"],
    registry=GATEWAY,
)
WORK_IN_PROGRESS: Final = Gauge(
    "stillhouse_work_in_progress", "Work that a process of the role holds", ["role"], registry=GATEWAY
)
JOBS: Final = Gauge("stillhouse_jobs", "Jobs that have not ended, by status", ["status"], registry=GATEWAY)
SERVICES: Final = Gauge(
    "stillhouse_services",
    "Live processes by role and health: ok, late (heartbeat overdue), problem or draining",
    ["role", "health"],
    registry=GATEWAY,
)
STORAGE_FREE: Final = Gauge("stillhouse_storage_free_bytes", "Free bytes where the artifacts lie", registry=GATEWAY)
STORAGE_SIZE: Final = Gauge(
    "stillhouse_storage_size_bytes", "All bytes of the disk where the artifacts lie", registry=GATEWAY
)

# ---- sampler ---------------------------------------------------------------------------------------------------------

SAMPLED_TOKENS: Final = Counter("stillhouse_sampler_tokens_total", "Completion tokens sampled", registry=SAMPLER)
SAMPLED_ROLLOUTS: Final = Counter(
    "stillhouse_sampler_rollouts_total",
    "Samples handed over, by outcome: done, duplicate or closed (somebody else was first), failed",
    ["outcome"],
    registry=SAMPLER,
)
SAMPLE_SECONDS: Final = Histogram(
    "stillhouse_sampler_rollout_seconds",
    "Time from the start of a completion to its end, its turns of waiting for the engine included",
    registry=SAMPLER,
    buckets=WORK_BUCKETS,
)
COMPLETION_TOKENS: Final = Histogram(
    "stillhouse_sampler_completion_tokens", "Tokens of a completion", registry=SAMPLER, buckets=TOKEN_BUCKETS
)
RUNNING_SEQUENCES: Final = Gauge(
    "stillhouse_sampler_running_sequences", "Completions that are being written", registry=SAMPLER
)
WEIGHT_PULLS: Final = Counter(
    "stillhouse_sampler_weight_pulls_total", "Weights pulled from a trainer", registry=SAMPLER
)
WEIGHT_PULL_SECONDS: Final = Histogram(
    "stillhouse_sampler_weight_pull_seconds",
    "Time of a weight pull, from the question to weights in the engine",
    registry=SAMPLER,
    buckets=WORK_BUCKETS,
)
SAMPLER_DROPPED: Final = Counter(
    "stillhouse_sampler_dropped_total", "Prompt groups dropped, by reason", ["reason"], registry=SAMPLER
)

# ---- teacher ---------------------------------------------------------------------------------------------------------

SCORED_TOKENS: Final = Counter("stillhouse_teacher_tokens_total", "Completion tokens scored", registry=TEACHER)
SCORED_ROLLOUTS: Final = Counter(
    "stillhouse_teacher_rollouts_total",
    "Samples handed over, by outcome: done, duplicate or closed (somebody else was first), failed",
    ["outcome"],
    registry=TEACHER,
)
SCORE_SECONDS: Final = Histogram(
    "stillhouse_teacher_score_seconds", "Time of a scoring batch", registry=TEACHER, buckets=WORK_BUCKETS
)
BATCH_SAMPLES: Final = Histogram(
    "stillhouse_teacher_batch_samples", "Samples of a scoring batch", registry=TEACHER, buckets=SIZE_BUCKETS
)
MODEL_LOADS: Final = Counter("stillhouse_teacher_model_loads_total", "Models loaded", ["model"], registry=TEACHER)
MODEL_LOAD_SECONDS: Final = Histogram(
    "stillhouse_teacher_model_load_seconds", "Time of a model's load", registry=TEACHER, buckets=WORK_BUCKETS
)
MODEL_BYTES: Final = Gauge("stillhouse_teacher_models_bytes", "Models in memory", registry=TEACHER)
BUDGET_BYTES: Final = Gauge(
    "stillhouse_teacher_models_limit_bytes", "Room for models in memory (setting teacher_memory_gib)", registry=TEACHER
)
JOB_LOADS: Final = Counter(
    "stillhouse_teacher_job_loads_total", "Models loaded for a job", ["job_id"], registry=TEACHER
)
JOB_TOKENS: Final = Counter(
    "stillhouse_teacher_job_tokens_total",
    "Completion tokens of a job, by source: scored, or found in the cache (cached)",
    ["job_id", "source"],
    registry=TEACHER,
)
JOB_SCORE_SECONDS: Final = Counter(
    "stillhouse_teacher_job_score_seconds_total", "Time of a job's forward passes", ["job_id"], registry=TEACHER
)
CACHE_HITS: Final = Counter("stillhouse_teacher_cache_hits_total", "Scores found in the cache", registry=TEACHER)
CACHE_MISSES: Final = Counter(
    "stillhouse_teacher_cache_misses_total", "Scores looked for in the cache and computed", registry=TEACHER
)
CACHE_BYTES: Final = Gauge("stillhouse_teacher_cache_bytes", "Scores kept in the cache", registry=TEACHER)
BLOB_BYTES: Final = Gauge("stillhouse_teacher_blob_bytes", "Score payloads held for trainers", registry=TEACHER)
TEACHER_DROPPED: Final = Counter(
    "stillhouse_teacher_dropped_total", "Rollouts dropped, by reason", ["reason"], registry=TEACHER
)

# ---- trainer ---------------------------------------------------------------------------------------------------------

STEP_SECONDS: Final = Histogram(
    "stillhouse_trainer_step_seconds",
    "Time of an optimizer step, by phase: wait, train, publish, commit, evaluate, journal, judge, and the whole: step",
    ["phase"],
    registry=TRAINER,
    buckets=WORK_BUCKETS,
)
STEPS: Final = Counter("stillhouse_trainer_steps_total", "Optimizer steps done, replayed ones too", registry=TRAINER)
SKIPPED_STEPS: Final = Counter(
    "stillhouse_trainer_skipped_steps_total", "Steps without an update: loss or gradient not finite", registry=TRAINER
)
TRAINED_TOKENS: Final = Counter("stillhouse_trainer_tokens_total", "Completion tokens trained", registry=TRAINER)
FAILED_SAMPLES: Final = Counter(
    "stillhouse_trainer_failed_samples_total", "Samples that came without a score: dead letters", registry=TRAINER
)
COMMITS: Final = Counter("stillhouse_trainer_commits_total", "Checkpoints committed", registry=TRAINER)
REWINDS: Final = Counter(
    "stillhouse_trainer_rewinds_total",
    "Jobs taken over from another claim: their trainer died or drained",
    registry=TRAINER,
)
CLAIMS_ENDED: Final = Counter(
    "stillhouse_trainer_claims_ended_total",
    "Claims of jobs that ended: succeeded, failed, cancelled, handed_on, crashed or lost (lease, queue server)",
    ["end"],
    registry=TRAINER,
)
LAST_STEP: Final = Gauge(
    "stillhouse_last_step_timestamp_seconds", "When the last step of a job ended", ["job_id"], registry=TRAINER
)
JOB_STEP: Final = Gauge("stillhouse_train_step", "Optimizer steps of a job so far", ["job_id"], registry=TRAINER)
JOB_STEPS: Final = Gauge(
    "stillhouse_train_steps_planned", "Optimizer steps of a job at its end", ["job_id"], registry=TRAINER
)
TRAIN_LOSS: Final = Gauge("stillhouse_train_loss", "Loss of the last step", ["job_id"], registry=TRAINER)
REVERSE_KL: Final = Gauge(
    "stillhouse_train_reverse_kl_nats", "Mean reverse KL of the last step, nats per token", ["job_id"], registry=TRAINER
)
ENTROPY: Final = Gauge(
    "stillhouse_train_entropy_nats",
    "Mean entropy of the student in the last step",
    ["job_id"],
    registry=TRAINER,
)
MISMATCH: Final = Gauge(
    "stillhouse_train_mismatch_nats",
    "Mean |log-probability at the sampler - at the trainer| of the last step's tokens: early sign of a collapse",
    ["job_id"],
    registry=TRAINER,
)
GRAD_NORM: Final = Gauge(
    "stillhouse_train_grad_norm", "Norm of the last step's gradient before clipping", ["job_id"], registry=TRAINER
)
TRUNCATED: Final = Gauge(
    "stillhouse_train_truncated_ratio",
    "Share of the last step's samples cut off by max_tokens",
    ["job_id"],
    registry=TRAINER,
)
STALENESS: Final = Gauge(
    "stillhouse_rollout_staleness_steps",
    "Largest staleness in the last step: optimizer steps between the weights that wrote a token and those trained",
    ["job_id"],
    registry=TRAINER,
)
BOTTLENECK: Final = Gauge(
    "stillhouse_train_bottleneck",
    "1 for the role that would make the job faster if it were faster, 0 for the others",
    ["job_id", "role"],
    registry=TRAINER,
)
OF_STEP: Final = {
    "loss/total": TRAIN_LOSS,
    "loss/reverse_kl/mean": REVERSE_KL,
    "student/entropy": ENTROPY,
    "mismatch/logprob_abs_mean": MISMATCH,
    "grad/norm": GRAD_NORM,
    "completion/truncated_fraction": TRUNCATED,
    "staleness/max": STALENESS,
}
"""Metric of a step -> its gauge."""
OF_JOB: Final = (*OF_STEP.values(), LAST_STEP, JOB_STEP, JOB_STEPS)
"""Gauges of the job that a trainer leads, labelled by nothing but its id."""


def forget_job(job_id: str) -> None:
    """The trainer does not lead the job any more: its series go."""
    for gauge in OF_JOB:
        gauge.remove_by_labels({"job_id": job_id})
    BOTTLENECK.remove_by_labels({"job_id": job_id})
    POLICY_VERSION.remove_by_labels({"role": "trainer", "job_id": job_id})


def exported(role: str) -> CollectorRegistry:
    """What /metrics of a process shows."""
    registry = CollectorRegistry()
    for part in (COMMON, BY_ROLE[role]):
        registry.register(part)
    return registry


def serve_metrics(settings: Settings, role: str) -> str:
    """Start the Prometheus endpoint in a thread; returns its address."""
    server, _ = start_http_server(settings.metrics_port, addr=settings.host, registry=exported(role))
    return f"{settings.advertise_host}:{server.server_port}"
