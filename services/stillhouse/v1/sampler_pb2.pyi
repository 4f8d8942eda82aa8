from stillhouse.v1 import rollout_pb2 as _rollout_pb2
from stillhouse.v1 import tensor_pb2 as _tensor_pb2
from stillhouse.v1 import weights_pb2 as _weights_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SamplerServiceGetInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SamplerServiceGetInfoResponse(_message.Message):
    __slots__ = ("instance", "engine", "version", "job_id", "weights", "model", "tokenizer_sha256", "vocab_size", "max_sequence_length", "paused", "sampled_tokens")
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_SHA256_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQUENCE_LENGTH_FIELD_NUMBER: _ClassVar[int]
    PAUSED_FIELD_NUMBER: _ClassVar[int]
    SAMPLED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    instance: str
    engine: str
    version: str
    job_id: str
    weights: _weights_pb2.WeightsRef
    model: str
    tokenizer_sha256: str
    vocab_size: int
    max_sequence_length: int
    paused: bool
    sampled_tokens: int
    def __init__(self, instance: _Optional[str] = ..., engine: _Optional[str] = ..., version: _Optional[str] = ..., job_id: _Optional[str] = ..., weights: _Optional[_Union[_weights_pb2.WeightsRef, _Mapping]] = ..., model: _Optional[str] = ..., tokenizer_sha256: _Optional[str] = ..., vocab_size: _Optional[int] = ..., max_sequence_length: _Optional[int] = ..., paused: _Optional[bool] = ..., sampled_tokens: _Optional[int] = ...) -> None: ...

class SamplerServiceSyncWeightsRequest(_message.Message):
    __slots__ = ("job_id", "weights")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    weights: _weights_pb2.WeightsRef
    def __init__(self, job_id: _Optional[str] = ..., weights: _Optional[_Union[_weights_pb2.WeightsRef, _Mapping]] = ...) -> None: ...

class SamplerServiceSyncWeightsResponse(_message.Message):
    __slots__ = ("weights",)
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    weights: _weights_pb2.WeightsRef
    def __init__(self, weights: _Optional[_Union[_weights_pb2.WeightsRef, _Mapping]] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("model", "prompt_ids", "sampling", "seeds", "dtype")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    SEEDS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    model: str
    prompt_ids: _tensor_pb2.Tensor
    sampling: _rollout_pb2.SamplingParams
    seeds: _containers.RepeatedScalarFieldContainer[int]
    dtype: _tensor_pb2.DataType
    def __init__(self, model: _Optional[str] = ..., prompt_ids: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., sampling: _Optional[_Union[_rollout_pb2.SamplingParams, _Mapping]] = ..., seeds: _Optional[_Iterable[int]] = ..., dtype: _Optional[_Union[_tensor_pb2.DataType, str]] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("index", "completion_ids", "rollout_logprobs", "finish_reason", "weights")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_IDS_FIELD_NUMBER: _ClassVar[int]
    ROLLOUT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    index: int
    completion_ids: _tensor_pb2.Tensor
    rollout_logprobs: _tensor_pb2.Tensor
    finish_reason: _rollout_pb2.FinishReason
    weights: _weights_pb2.WeightsRef
    def __init__(self, index: _Optional[int] = ..., completion_ids: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., rollout_logprobs: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., finish_reason: _Optional[_Union[_rollout_pb2.FinishReason, str]] = ..., weights: _Optional[_Union[_weights_pb2.WeightsRef, _Mapping]] = ...) -> None: ...

class PauseRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PauseResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ResumeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ResumeResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("sample_ids",)
    SAMPLE_IDS_FIELD_NUMBER: _ClassVar[int]
    sample_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, sample_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class AbortResponse(_message.Message):
    __slots__ = ("aborted",)
    ABORTED_FIELD_NUMBER: _ClassVar[int]
    aborted: int
    def __init__(self, aborted: _Optional[int] = ...) -> None: ...
