from stillhouse.v1 import rollout_pb2 as _rollout_pb2
from stillhouse.v1 import tensor_pb2 as _tensor_pb2
from stillhouse.v1 import weights_pb2 as _weights_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TeacherServiceGetInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TeacherServiceGetInfoResponse(_message.Message):
    __slots__ = ("instance", "engine", "version", "models", "kinds", "memory_budget_bytes", "scored_tokens", "blob_bytes", "accounts", "loads", "cache_hits", "cache_bytes")
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    KINDS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    SCORED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOB_BYTES_FIELD_NUMBER: _ClassVar[int]
    ACCOUNTS_FIELD_NUMBER: _ClassVar[int]
    LOADS_FIELD_NUMBER: _ClassVar[int]
    CACHE_HITS_FIELD_NUMBER: _ClassVar[int]
    CACHE_BYTES_FIELD_NUMBER: _ClassVar[int]
    instance: str
    engine: str
    version: str
    models: _containers.RepeatedCompositeFieldContainer[LoadedModel]
    kinds: _containers.RepeatedScalarFieldContainer[_rollout_pb2.ScoreKind]
    memory_budget_bytes: int
    scored_tokens: int
    blob_bytes: int
    accounts: _containers.RepeatedCompositeFieldContainer[TeacherAccount]
    loads: _containers.RepeatedCompositeFieldContainer[ModelLoads]
    cache_hits: int
    cache_bytes: int
    def __init__(self, instance: _Optional[str] = ..., engine: _Optional[str] = ..., version: _Optional[str] = ..., models: _Optional[_Iterable[_Union[LoadedModel, _Mapping]]] = ..., kinds: _Optional[_Iterable[_Union[_rollout_pb2.ScoreKind, str]]] = ..., memory_budget_bytes: _Optional[int] = ..., scored_tokens: _Optional[int] = ..., blob_bytes: _Optional[int] = ..., accounts: _Optional[_Iterable[_Union[TeacherAccount, _Mapping]]] = ..., loads: _Optional[_Iterable[_Union[ModelLoads, _Mapping]]] = ..., cache_hits: _Optional[int] = ..., cache_bytes: _Optional[int] = ...) -> None: ...

class TeacherAccount(_message.Message):
    __slots__ = ("job_id", "scored_tokens", "cached_tokens", "score_s", "model_loads", "load_s", "score_bytes")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    SCORED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SCORE_S_FIELD_NUMBER: _ClassVar[int]
    MODEL_LOADS_FIELD_NUMBER: _ClassVar[int]
    LOAD_S_FIELD_NUMBER: _ClassVar[int]
    SCORE_BYTES_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    scored_tokens: int
    cached_tokens: int
    score_s: float
    model_loads: int
    load_s: float
    score_bytes: int
    def __init__(self, job_id: _Optional[str] = ..., scored_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., score_s: _Optional[float] = ..., model_loads: _Optional[int] = ..., load_s: _Optional[float] = ..., score_bytes: _Optional[int] = ...) -> None: ...

class ModelLoads(_message.Message):
    __slots__ = ("model", "model_sha256", "loads", "load_s")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_SHA256_FIELD_NUMBER: _ClassVar[int]
    LOADS_FIELD_NUMBER: _ClassVar[int]
    LOAD_S_FIELD_NUMBER: _ClassVar[int]
    model: str
    model_sha256: str
    loads: int
    load_s: float
    def __init__(self, model: _Optional[str] = ..., model_sha256: _Optional[str] = ..., loads: _Optional[int] = ..., load_s: _Optional[float] = ...) -> None: ...

class LoadedModel(_message.Message):
    __slots__ = ("model", "model_sha256", "dtype", "size_bytes", "vocab_size", "max_sequence_length", "tokenizer_sha256")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_SHA256_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQUENCE_LENGTH_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_SHA256_FIELD_NUMBER: _ClassVar[int]
    model: str
    model_sha256: str
    dtype: _tensor_pb2.DataType
    size_bytes: int
    vocab_size: int
    max_sequence_length: int
    tokenizer_sha256: str
    def __init__(self, model: _Optional[str] = ..., model_sha256: _Optional[str] = ..., dtype: _Optional[_Union[_tensor_pb2.DataType, str]] = ..., size_bytes: _Optional[int] = ..., vocab_size: _Optional[int] = ..., max_sequence_length: _Optional[int] = ..., tokenizer_sha256: _Optional[str] = ...) -> None: ...

class EnsureModelRequest(_message.Message):
    __slots__ = ("model", "model_sha256", "dtype", "task")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_SHA256_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    model: str
    model_sha256: str
    dtype: _tensor_pb2.DataType
    task: _rollout_pb2.TeacherTask
    def __init__(self, model: _Optional[str] = ..., model_sha256: _Optional[str] = ..., dtype: _Optional[_Union[_tensor_pb2.DataType, str]] = ..., task: _Optional[_Union[_rollout_pb2.TeacherTask, _Mapping]] = ...) -> None: ...

class EnsureModelResponse(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: LoadedModel
    def __init__(self, model: _Optional[_Union[LoadedModel, _Mapping]] = ...) -> None: ...

class ScoreRequest(_message.Message):
    __slots__ = ("task", "rollouts", "is_fresh")
    TASK_FIELD_NUMBER: _ClassVar[int]
    ROLLOUTS_FIELD_NUMBER: _ClassVar[int]
    IS_FRESH_FIELD_NUMBER: _ClassVar[int]
    task: _rollout_pb2.TeacherTask
    rollouts: _containers.RepeatedCompositeFieldContainer[_rollout_pb2.Rollout]
    is_fresh: bool
    def __init__(self, task: _Optional[_Union[_rollout_pb2.TeacherTask, _Mapping]] = ..., rollouts: _Optional[_Iterable[_Union[_rollout_pb2.Rollout, _Mapping]]] = ..., is_fresh: _Optional[bool] = ...) -> None: ...

class ScoreResponse(_message.Message):
    __slots__ = ("score",)
    SCORE_FIELD_NUMBER: _ClassVar[int]
    score: _rollout_pb2.Score
    def __init__(self, score: _Optional[_Union[_rollout_pb2.Score, _Mapping]] = ...) -> None: ...

class FetchScoreRequest(_message.Message):
    __slots__ = ("blob", "release")
    BLOB_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    blob: _tensor_pb2.BlobRef
    release: bool
    def __init__(self, blob: _Optional[_Union[_tensor_pb2.BlobRef, _Mapping]] = ..., release: _Optional[bool] = ...) -> None: ...

class FetchScoreResponse(_message.Message):
    __slots__ = ("chunk",)
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    chunk: _tensor_pb2.Chunk
    def __init__(self, chunk: _Optional[_Union[_tensor_pb2.Chunk, _Mapping]] = ...) -> None: ...

class FetchHeadRequest(_message.Message):
    __slots__ = ("model", "model_sha256", "dtype")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_SHA256_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    model: str
    model_sha256: str
    dtype: _tensor_pb2.DataType
    def __init__(self, model: _Optional[str] = ..., model_sha256: _Optional[str] = ..., dtype: _Optional[_Union[_tensor_pb2.DataType, str]] = ...) -> None: ...

class HeadInfo(_message.Message):
    __slots__ = ("sha256", "dtype", "shape", "has_bias", "vocab_size", "logit_scale", "logit_soft_cap", "size_bytes")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    HAS_BIAS_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    LOGIT_SCALE_FIELD_NUMBER: _ClassVar[int]
    LOGIT_SOFT_CAP_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    sha256: str
    dtype: _tensor_pb2.DataType
    shape: _containers.RepeatedScalarFieldContainer[int]
    has_bias: bool
    vocab_size: int
    logit_scale: float
    logit_soft_cap: float
    size_bytes: int
    def __init__(self, sha256: _Optional[str] = ..., dtype: _Optional[_Union[_tensor_pb2.DataType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., has_bias: _Optional[bool] = ..., vocab_size: _Optional[int] = ..., logit_scale: _Optional[float] = ..., logit_soft_cap: _Optional[float] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class FetchHeadResponse(_message.Message):
    __slots__ = ("info", "chunk")
    INFO_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    info: HeadInfo
    chunk: _tensor_pb2.Chunk
    def __init__(self, info: _Optional[_Union[HeadInfo, _Mapping]] = ..., chunk: _Optional[_Union[_tensor_pb2.Chunk, _Mapping]] = ...) -> None: ...

class TeacherServiceSyncWeightsRequest(_message.Message):
    __slots__ = ("job_id", "teacher", "weights")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    TEACHER_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    teacher: str
    weights: _weights_pb2.WeightsRef
    def __init__(self, job_id: _Optional[str] = ..., teacher: _Optional[str] = ..., weights: _Optional[_Union[_weights_pb2.WeightsRef, _Mapping]] = ...) -> None: ...

class TeacherServiceSyncWeightsResponse(_message.Message):
    __slots__ = ("weights",)
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    weights: _weights_pb2.WeightsRef
    def __init__(self, weights: _Optional[_Union[_weights_pb2.WeightsRef, _Mapping]] = ...) -> None: ...
