from stillhouse.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Purpose(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PURPOSE_UNSPECIFIED: _ClassVar[Purpose]
    PURPOSE_TRAIN: _ClassVar[Purpose]
    PURPOSE_EVALUATE: _ClassVar[Purpose]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_ABORT: _ClassVar[FinishReason]

class ScoreKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SCORE_KIND_UNSPECIFIED: _ClassVar[ScoreKind]
    SCORE_KIND_SAMPLED: _ClassVar[ScoreKind]
    SCORE_KIND_TOPK: _ClassVar[ScoreKind]
    SCORE_KIND_TARGETS: _ClassVar[ScoreKind]
    SCORE_KIND_HIDDEN: _ClassVar[ScoreKind]
    SCORE_KIND_NONE: _ClassVar[ScoreKind]
    SCORE_KIND_SPANS: _ClassVar[ScoreKind]

class Origin(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ORIGIN_UNSPECIFIED: _ClassVar[Origin]
    ORIGIN_STUDENT: _ClassVar[Origin]
    ORIGIN_DATA: _ClassVar[Origin]
    ORIGIN_TEACHER: _ClassVar[Origin]
PURPOSE_UNSPECIFIED: Purpose
PURPOSE_TRAIN: Purpose
PURPOSE_EVALUATE: Purpose
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_ABORT: FinishReason
SCORE_KIND_UNSPECIFIED: ScoreKind
SCORE_KIND_SAMPLED: ScoreKind
SCORE_KIND_TOPK: ScoreKind
SCORE_KIND_TARGETS: ScoreKind
SCORE_KIND_HIDDEN: ScoreKind
SCORE_KIND_NONE: ScoreKind
SCORE_KIND_SPANS: ScoreKind
ORIGIN_UNSPECIFIED: Origin
ORIGIN_STUDENT: Origin
ORIGIN_DATA: Origin
ORIGIN_TEACHER: Origin

class SamplingParams(_message.Message):
    __slots__ = ("temperature", "top_p", "top_k", "min_p", "max_tokens", "stop_token_ids", "stop", "record_top_k", "record_entropies")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    RECORD_TOP_K_FIELD_NUMBER: _ClassVar[int]
    RECORD_ENTROPIES_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    max_tokens: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    stop: _containers.RepeatedScalarFieldContainer[str]
    record_top_k: int
    record_entropies: bool
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., max_tokens: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., stop: _Optional[_Iterable[str]] = ..., record_top_k: _Optional[int] = ..., record_entropies: _Optional[bool] = ...) -> None: ...

class ScoreSpec(_message.Message):
    __slots__ = ("kind", "top_k", "temperature", "dtype")
    KIND_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    kind: ScoreKind
    top_k: int
    temperature: float
    dtype: _tensor_pb2.DataType
    def __init__(self, kind: _Optional[_Union[ScoreKind, str]] = ..., top_k: _Optional[int] = ..., temperature: _Optional[float] = ..., dtype: _Optional[_Union[_tensor_pb2.DataType, str]] = ...) -> None: ...

class Span(_message.Message):
    __slots__ = ("first_token", "policy_version", "epoch")
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    first_token: int
    policy_version: int
    epoch: int
    def __init__(self, first_token: _Optional[int] = ..., policy_version: _Optional[int] = ..., epoch: _Optional[int] = ...) -> None: ...

class PromptGroup(_message.Message):
    __slots__ = ("schema_version", "job_id", "epoch", "purpose", "group", "group_id", "sample_indices", "prompt_ids", "teacher_prompt_ids", "teacher", "sampling", "score", "seeds", "min_policy_version", "exact_policy_version_plus_one", "row", "traceparent", "further", "pinned_policy_version_plus_one", "attempt")
    SCHEMA_VERSION_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PURPOSE_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_INDICES_FIELD_NUMBER: _ClassVar[int]
    PROMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    TEACHER_PROMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    TEACHER_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    SEEDS_FIELD_NUMBER: _ClassVar[int]
    MIN_POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    EXACT_POLICY_VERSION_PLUS_ONE_FIELD_NUMBER: _ClassVar[int]
    ROW_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    FURTHER_FIELD_NUMBER: _ClassVar[int]
    PINNED_POLICY_VERSION_PLUS_ONE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    schema_version: int
    job_id: str
    epoch: int
    purpose: Purpose
    group: int
    group_id: str
    sample_indices: _containers.RepeatedScalarFieldContainer[int]
    prompt_ids: _tensor_pb2.Tensor
    teacher_prompt_ids: _tensor_pb2.Tensor
    teacher: str
    sampling: SamplingParams
    score: ScoreSpec
    seeds: _containers.RepeatedScalarFieldContainer[int]
    min_policy_version: int
    exact_policy_version_plus_one: int
    row: int
    traceparent: str
    further: _containers.RepeatedCompositeFieldContainer[FurtherTeacher]
    pinned_policy_version_plus_one: int
    attempt: int
    def __init__(self, schema_version: _Optional[int] = ..., job_id: _Optional[str] = ..., epoch: _Optional[int] = ..., purpose: _Optional[_Union[Purpose, str]] = ..., group: _Optional[int] = ..., group_id: _Optional[str] = ..., sample_indices: _Optional[_Iterable[int]] = ..., prompt_ids: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., teacher_prompt_ids: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., teacher: _Optional[str] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., score: _Optional[_Union[ScoreSpec, _Mapping]] = ..., seeds: _Optional[_Iterable[int]] = ..., min_policy_version: _Optional[int] = ..., exact_policy_version_plus_one: _Optional[int] = ..., row: _Optional[int] = ..., traceparent: _Optional[str] = ..., further: _Optional[_Iterable[_Union[FurtherTeacher, _Mapping]]] = ..., pinned_policy_version_plus_one: _Optional[int] = ..., attempt: _Optional[int] = ...) -> None: ...

class FurtherTeacher(_message.Message):
    __slots__ = ("teacher", "teacher_prompt_ids")
    TEACHER_FIELD_NUMBER: _ClassVar[int]
    TEACHER_PROMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    teacher: str
    teacher_prompt_ids: _tensor_pb2.Tensor
    def __init__(self, teacher: _Optional[str] = ..., teacher_prompt_ids: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class Rollout(_message.Message):
    __slots__ = ("schema_version", "job_id", "epoch", "sample_id", "purpose", "group", "index", "attempt", "teacher", "prompt_ids", "teacher_prompt_ids", "completion_ids", "rollout_logprobs", "loss_mask", "finish_reason", "spans", "sampling", "score", "seed", "tokenizer_sha256", "row", "target_ids", "sampler", "sample_s", "traceparent", "weights_sha256", "entropies", "origin")
    SCHEMA_VERSION_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_ID_FIELD_NUMBER: _ClassVar[int]
    PURPOSE_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    TEACHER_FIELD_NUMBER: _ClassVar[int]
    PROMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    TEACHER_PROMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_IDS_FIELD_NUMBER: _ClassVar[int]
    ROLLOUT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    LOSS_MASK_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_SHA256_FIELD_NUMBER: _ClassVar[int]
    ROW_FIELD_NUMBER: _ClassVar[int]
    TARGET_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLER_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_S_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_SHA256_FIELD_NUMBER: _ClassVar[int]
    ENTROPIES_FIELD_NUMBER: _ClassVar[int]
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    schema_version: int
    job_id: str
    epoch: int
    sample_id: str
    purpose: Purpose
    group: int
    index: int
    attempt: int
    teacher: str
    prompt_ids: _tensor_pb2.Tensor
    teacher_prompt_ids: _tensor_pb2.Tensor
    completion_ids: _tensor_pb2.Tensor
    rollout_logprobs: _tensor_pb2.Tensor
    loss_mask: _tensor_pb2.Tensor
    finish_reason: FinishReason
    spans: _containers.RepeatedCompositeFieldContainer[Span]
    sampling: SamplingParams
    score: ScoreSpec
    seed: int
    tokenizer_sha256: str
    row: int
    target_ids: _tensor_pb2.Tensor
    sampler: str
    sample_s: float
    traceparent: str
    weights_sha256: str
    entropies: _tensor_pb2.Tensor
    origin: Origin
    def __init__(self, schema_version: _Optional[int] = ..., job_id: _Optional[str] = ..., epoch: _Optional[int] = ..., sample_id: _Optional[str] = ..., purpose: _Optional[_Union[Purpose, str]] = ..., group: _Optional[int] = ..., index: _Optional[int] = ..., attempt: _Optional[int] = ..., teacher: _Optional[str] = ..., prompt_ids: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., teacher_prompt_ids: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., completion_ids: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., rollout_logprobs: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., loss_mask: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., spans: _Optional[_Iterable[_Union[Span, _Mapping]]] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., score: _Optional[_Union[ScoreSpec, _Mapping]] = ..., seed: _Optional[int] = ..., tokenizer_sha256: _Optional[str] = ..., row: _Optional[int] = ..., target_ids: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., sampler: _Optional[str] = ..., sample_s: _Optional[float] = ..., traceparent: _Optional[str] = ..., weights_sha256: _Optional[str] = ..., entropies: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., origin: _Optional[_Union[Origin, str]] = ...) -> None: ...

class SampledScore(_message.Message):
    __slots__ = ("teacher_logprobs",)
    TEACHER_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    teacher_logprobs: _tensor_pb2.Tensor
    def __init__(self, teacher_logprobs: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class TopKScore(_message.Message):
    __slots__ = ("teacher_topk_ids", "teacher_topk_logprobs", "tail_logprobs", "teacher_logprobs", "blob", "target_logprobs")
    TEACHER_TOPK_IDS_FIELD_NUMBER: _ClassVar[int]
    TEACHER_TOPK_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TAIL_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TEACHER_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    BLOB_FIELD_NUMBER: _ClassVar[int]
    TARGET_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    teacher_topk_ids: _tensor_pb2.Tensor
    teacher_topk_logprobs: _tensor_pb2.Tensor
    tail_logprobs: _tensor_pb2.Tensor
    teacher_logprobs: _tensor_pb2.Tensor
    blob: _tensor_pb2.BlobRef
    target_logprobs: _tensor_pb2.Tensor
    def __init__(self, teacher_topk_ids: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., teacher_topk_logprobs: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., tail_logprobs: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., teacher_logprobs: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., blob: _Optional[_Union[_tensor_pb2.BlobRef, _Mapping]] = ..., target_logprobs: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class TargetsScore(_message.Message):
    __slots__ = ("target_logprobs", "teacher_logprobs", "blob")
    TARGET_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TEACHER_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    BLOB_FIELD_NUMBER: _ClassVar[int]
    target_logprobs: _tensor_pb2.Tensor
    teacher_logprobs: _tensor_pb2.Tensor
    blob: _tensor_pb2.BlobRef
    def __init__(self, target_logprobs: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., teacher_logprobs: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., blob: _Optional[_Union[_tensor_pb2.BlobRef, _Mapping]] = ...) -> None: ...

class SpansScore(_message.Message):
    __slots__ = ("teacher_ids", "teacher_logprobs", "student_ends", "teacher_ends", "is_canonical")
    TEACHER_IDS_FIELD_NUMBER: _ClassVar[int]
    TEACHER_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    STUDENT_ENDS_FIELD_NUMBER: _ClassVar[int]
    TEACHER_ENDS_FIELD_NUMBER: _ClassVar[int]
    IS_CANONICAL_FIELD_NUMBER: _ClassVar[int]
    teacher_ids: _tensor_pb2.Tensor
    teacher_logprobs: _tensor_pb2.Tensor
    student_ends: _tensor_pb2.Tensor
    teacher_ends: _tensor_pb2.Tensor
    is_canonical: _tensor_pb2.Tensor
    def __init__(self, teacher_ids: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., teacher_logprobs: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., student_ends: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., teacher_ends: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., is_canonical: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class HiddenScore(_message.Message):
    __slots__ = ("blob", "dtype", "shape", "teacher_logprobs", "head_sha256")
    BLOB_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    TEACHER_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    HEAD_SHA256_FIELD_NUMBER: _ClassVar[int]
    blob: _tensor_pb2.BlobRef
    dtype: _tensor_pb2.DataType
    shape: _containers.RepeatedScalarFieldContainer[int]
    teacher_logprobs: _tensor_pb2.Tensor
    head_sha256: str
    def __init__(self, blob: _Optional[_Union[_tensor_pb2.BlobRef, _Mapping]] = ..., dtype: _Optional[_Union[_tensor_pb2.DataType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., teacher_logprobs: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., head_sha256: _Optional[str] = ...) -> None: ...

class NoScore(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Failure(_message.Message):
    __slots__ = ("reason", "message", "service", "attempts")
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    SERVICE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    reason: str
    message: str
    service: str
    attempts: int
    def __init__(self, reason: _Optional[str] = ..., message: _Optional[str] = ..., service: _Optional[str] = ..., attempts: _Optional[int] = ...) -> None: ...

class Score(_message.Message):
    __slots__ = ("schema_version", "rollout", "teacher_sha256", "sampled", "topk", "targets", "hidden", "failed", "none", "spans", "teacher_instance", "score_s", "reward", "reward_note", "model_loads", "is_cached", "further")
    SCHEMA_VERSION_FIELD_NUMBER: _ClassVar[int]
    ROLLOUT_FIELD_NUMBER: _ClassVar[int]
    TEACHER_SHA256_FIELD_NUMBER: _ClassVar[int]
    SAMPLED_FIELD_NUMBER: _ClassVar[int]
    TOPK_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    NONE_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    TEACHER_INSTANCE_FIELD_NUMBER: _ClassVar[int]
    SCORE_S_FIELD_NUMBER: _ClassVar[int]
    REWARD_FIELD_NUMBER: _ClassVar[int]
    REWARD_NOTE_FIELD_NUMBER: _ClassVar[int]
    MODEL_LOADS_FIELD_NUMBER: _ClassVar[int]
    IS_CACHED_FIELD_NUMBER: _ClassVar[int]
    FURTHER_FIELD_NUMBER: _ClassVar[int]
    schema_version: int
    rollout: Rollout
    teacher_sha256: str
    sampled: SampledScore
    topk: TopKScore
    targets: TargetsScore
    hidden: HiddenScore
    failed: Failure
    none: NoScore
    spans: SpansScore
    teacher_instance: str
    score_s: float
    reward: float
    reward_note: str
    model_loads: int
    is_cached: bool
    further: _containers.RepeatedCompositeFieldContainer[Score]
    def __init__(self, schema_version: _Optional[int] = ..., rollout: _Optional[_Union[Rollout, _Mapping]] = ..., teacher_sha256: _Optional[str] = ..., sampled: _Optional[_Union[SampledScore, _Mapping]] = ..., topk: _Optional[_Union[TopKScore, _Mapping]] = ..., targets: _Optional[_Union[TargetsScore, _Mapping]] = ..., hidden: _Optional[_Union[HiddenScore, _Mapping]] = ..., failed: _Optional[_Union[Failure, _Mapping]] = ..., none: _Optional[_Union[NoScore, _Mapping]] = ..., spans: _Optional[_Union[SpansScore, _Mapping]] = ..., teacher_instance: _Optional[str] = ..., score_s: _Optional[float] = ..., reward: _Optional[float] = ..., reward_note: _Optional[str] = ..., model_loads: _Optional[int] = ..., is_cached: _Optional[bool] = ..., further: _Optional[_Iterable[_Union[Score, _Mapping]]] = ...) -> None: ...

class TeacherTask(_message.Message):
    __slots__ = ("schema_version", "job_id", "epoch", "teacher", "model", "model_sha256", "dtype", "tokenizer_sha256", "follows_student", "asks", "threads", "retokenize")
    SCHEMA_VERSION_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TEACHER_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_SHA256_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_SHA256_FIELD_NUMBER: _ClassVar[int]
    FOLLOWS_STUDENT_FIELD_NUMBER: _ClassVar[int]
    ASKS_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    RETOKENIZE_FIELD_NUMBER: _ClassVar[int]
    schema_version: int
    job_id: str
    epoch: int
    teacher: str
    model: str
    model_sha256: str
    dtype: _tensor_pb2.DataType
    tokenizer_sha256: str
    follows_student: bool
    asks: _containers.RepeatedCompositeFieldContainer[ScoreSpec]
    threads: int
    retokenize: Retokenize
    def __init__(self, schema_version: _Optional[int] = ..., job_id: _Optional[str] = ..., epoch: _Optional[int] = ..., teacher: _Optional[str] = ..., model: _Optional[str] = ..., model_sha256: _Optional[str] = ..., dtype: _Optional[_Union[_tensor_pb2.DataType, str]] = ..., tokenizer_sha256: _Optional[str] = ..., follows_student: _Optional[bool] = ..., asks: _Optional[_Iterable[_Union[ScoreSpec, _Mapping]]] = ..., threads: _Optional[int] = ..., retokenize: _Optional[_Union[Retokenize, _Mapping]] = ...) -> None: ...

class Retokenize(_message.Message):
    __slots__ = ("student", "end_token_id")
    STUDENT_FIELD_NUMBER: _ClassVar[int]
    END_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    student: str
    end_token_id: int
    def __init__(self, student: _Optional[str] = ..., end_token_id: _Optional[int] = ...) -> None: ...

class PartialCompletion(_message.Message):
    __slots__ = ("index", "first_token", "completion_ids", "rollout_logprobs", "spans", "target_ids", "entropies", "sample_s")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_IDS_FIELD_NUMBER: _ClassVar[int]
    ROLLOUT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    TARGET_IDS_FIELD_NUMBER: _ClassVar[int]
    ENTROPIES_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_S_FIELD_NUMBER: _ClassVar[int]
    index: int
    first_token: int
    completion_ids: _tensor_pb2.Tensor
    rollout_logprobs: _tensor_pb2.Tensor
    spans: _containers.RepeatedCompositeFieldContainer[Span]
    target_ids: _tensor_pb2.Tensor
    entropies: _tensor_pb2.Tensor
    sample_s: float
    def __init__(self, index: _Optional[int] = ..., first_token: _Optional[int] = ..., completion_ids: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., rollout_logprobs: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., spans: _Optional[_Iterable[_Union[Span, _Mapping]]] = ..., target_ids: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., entropies: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., sample_s: _Optional[float] = ...) -> None: ...

class PartialGroup(_message.Message):
    __slots__ = ("schema_version", "completions")
    SCHEMA_VERSION_FIELD_NUMBER: _ClassVar[int]
    COMPLETIONS_FIELD_NUMBER: _ClassVar[int]
    schema_version: int
    completions: _containers.RepeatedCompositeFieldContainer[PartialCompletion]
    def __init__(self, schema_version: _Optional[int] = ..., completions: _Optional[_Iterable[_Union[PartialCompletion, _Mapping]]] = ...) -> None: ...
