from stillhouse.v1 import rollout_pb2 as _rollout_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StepHeader(_message.Message):
    __slots__ = ("schema_version", "job_id", "epoch", "step", "groups", "num_samples", "next_group", "stage", "micro_batches", "written_at")
    SCHEMA_VERSION_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    NUM_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    NEXT_GROUP_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    MICRO_BATCHES_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_AT_FIELD_NUMBER: _ClassVar[int]
    schema_version: int
    job_id: str
    epoch: int
    step: int
    groups: _containers.RepeatedScalarFieldContainer[int]
    num_samples: int
    next_group: int
    stage: int
    micro_batches: _containers.RepeatedCompositeFieldContainer[MicroBatchPlan]
    written_at: float
    def __init__(self, schema_version: _Optional[int] = ..., job_id: _Optional[str] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., groups: _Optional[_Iterable[int]] = ..., num_samples: _Optional[int] = ..., next_group: _Optional[int] = ..., stage: _Optional[int] = ..., micro_batches: _Optional[_Iterable[_Union[MicroBatchPlan, _Mapping]]] = ..., written_at: _Optional[float] = ...) -> None: ...

class MicroBatchPlan(_message.Message):
    __slots__ = ("teacher", "sample_ids")
    TEACHER_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_IDS_FIELD_NUMBER: _ClassVar[int]
    teacher: str
    sample_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, teacher: _Optional[str] = ..., sample_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class JournalRecord(_message.Message):
    __slots__ = ("score",)
    SCORE_FIELD_NUMBER: _ClassVar[int]
    score: _rollout_pb2.Score
    def __init__(self, score: _Optional[_Union[_rollout_pb2.Score, _Mapping]] = ...) -> None: ...
