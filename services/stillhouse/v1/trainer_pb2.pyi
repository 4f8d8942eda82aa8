from stillhouse.v1 import tensor_pb2 as _tensor_pb2
from stillhouse.v1 import weights_pb2 as _weights_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TrainerServiceGetInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TrainerServiceGetInfoResponse(_message.Message):
    __slots__ = ("instance", "version", "job_id", "epoch")
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    instance: str
    version: str
    job_id: str
    epoch: int
    def __init__(self, instance: _Optional[str] = ..., version: _Optional[str] = ..., job_id: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class FetchWeightsRequest(_message.Message):
    __slots__ = ("job_id", "weights", "epoch", "dtype", "average")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    AVERAGE_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    weights: _weights_pb2.WeightsRef
    epoch: int
    dtype: _tensor_pb2.DataType
    average: bool
    def __init__(self, job_id: _Optional[str] = ..., weights: _Optional[_Union[_weights_pb2.WeightsRef, _Mapping]] = ..., epoch: _Optional[int] = ..., dtype: _Optional[_Union[_tensor_pb2.DataType, str]] = ..., average: _Optional[bool] = ...) -> None: ...

class FetchWeightsResponse(_message.Message):
    __slots__ = ("index", "chunk")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    index: _weights_pb2.WeightsIndex
    chunk: _tensor_pb2.Chunk
    def __init__(self, index: _Optional[_Union[_weights_pb2.WeightsIndex, _Mapping]] = ..., chunk: _Optional[_Union[_tensor_pb2.Chunk, _Mapping]] = ...) -> None: ...

class GetStateRequest(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class GetStateResponse(_message.Message):
    __slots__ = ("job_id", "epoch", "status", "step", "stop_step", "weights", "held", "next_group", "groups_in_flight")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STOP_STEP_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    NEXT_GROUP_FIELD_NUMBER: _ClassVar[int]
    GROUPS_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    epoch: int
    status: str
    step: int
    stop_step: int
    weights: _weights_pb2.WeightsRef
    held: _containers.RepeatedCompositeFieldContainer[_weights_pb2.WeightsRef]
    next_group: int
    groups_in_flight: int
    def __init__(self, job_id: _Optional[str] = ..., epoch: _Optional[int] = ..., status: _Optional[str] = ..., step: _Optional[int] = ..., stop_step: _Optional[int] = ..., weights: _Optional[_Union[_weights_pb2.WeightsRef, _Mapping]] = ..., held: _Optional[_Iterable[_Union[_weights_pb2.WeightsRef, _Mapping]]] = ..., next_group: _Optional[int] = ..., groups_in_flight: _Optional[int] = ...) -> None: ...

class RetrySamplesRequest(_message.Message):
    __slots__ = ("job_id", "epoch", "sample_ids")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_IDS_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    epoch: int
    sample_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, job_id: _Optional[str] = ..., epoch: _Optional[int] = ..., sample_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class RetrySamplesResponse(_message.Message):
    __slots__ = ("refusals",)
    class RefusalsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    REFUSALS_FIELD_NUMBER: _ClassVar[int]
    refusals: _containers.ScalarMap[str, str]
    def __init__(self, refusals: _Optional[_Mapping[str, str]] = ...) -> None: ...
