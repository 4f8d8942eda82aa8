"""What a run leaves behind, without epochs and times: two runs of a deterministic job must agree on all of it."""

from __future__ import annotations

from typing import Any

from stillhouse.core.blobs import JobArtifacts, read_json, read_jsonl, sha256_bytes, sha256_file
from stillhouse.trainer.journal import read_step
from stillhouse.trainer.manifests import list_manifests


def everything(artifacts: JobArtifacts) -> dict[str, Any]:
    """Bytes of weights, optimizer and random states; samples, plans, metrics and evaluations of every step."""
    last = list_manifests(artifacts)[-1]
    folder = last.folder(artifacts)
    found: dict[str, Any] = {
        "step": last.step,
        "weights": sha256_file(folder / "model.safetensors"),
        "optimizer": sha256_file(folder / "optimizer.safetensors"),
        "state": read_json(folder / "state.json"),
        "ledger": read_json(folder / "manifest.json")["ledger"],
        "export": sha256_file(artifacts.export(artifacts.highest_epoch()) / "model.safetensors"),
    }
    for step in range(last.step):
        epochs = [e for e in range(1, artifacts.highest_epoch() + 1) if artifacts.journal(e, step).is_file()]
        journalled = read_step(artifacts.journal(epochs[-1], step))
        found[f"samples {step}"] = [sample_facts(score) for score in journalled.scores]
        found[f"plan {step}"] = [list(batch.sample_ids) for batch in journalled.header.micro_batches]
    for step, values in metric_points(artifacts).items():
        found[f"metrics {step}"] = values
    for path in artifacts.evaluations.glob("*.json"):
        measured = read_json(path)
        found[f"evaluation {path.stem}"] = {
            name: value for name, value in measured.items() if name not in ("seconds", "created_at", "epoch")
        }
    return found


def sample_facts(score: Any) -> tuple[Any, ...]:
    rollout, result = score.rollout, getattr(score, score.WhichOneof("result"))
    return (
        rollout.sample_id,
        rollout.seed,
        sha256_bytes(rollout.completion_ids.data),
        sha256_bytes(rollout.rollout_logprobs.data),
        sha256_bytes(result.teacher_logprobs.data),
        [(span.first_token, span.policy_version) for span in rollout.spans],
        rollout.weights_sha256,
    )


def metric_points(artifacts: JobArtifacts) -> dict[int, dict[str, float]]:
    """Metrics by step; of a step that was done again the last."""
    points: dict[int, dict[str, float]] = {}
    for point in sorted(read_jsonl(artifacts.metrics), key=lambda point: point["epoch"]):
        points[point["step"]] = {
            name: value
            for name, value in point["values"].items()
            if not name.startswith("time/") and not name.endswith("tokens_per_s")
        }
    return points


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    different = {name: (found.get(name), expected[name]) for name in expected if found.get(name) != expected[name]}
    assert not different, f"{sorted(different)} differ; first: {next(iter(different.items()))}"
    assert found.keys() == expected.keys()
