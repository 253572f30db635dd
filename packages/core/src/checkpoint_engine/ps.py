"""The parameter server under the module name that existing users import."""

from checkpoint_engine.data_types import (
    BucketRange,
    DataToGather,
    H2DBucket,
    MemoryBuffer,
    MemoryBufferMetaList,
    MemoryBufferMetas,
    ParameterMeta,
)
from checkpoint_engine.device_utils import DeviceManager, get_ip, npu_generate_uuid
from checkpoint_engine.engine.client import request_inference_to_update
from checkpoint_engine.server import ParameterServer

__all__ = [
    "BucketRange",
    "DataToGather",
    "DeviceManager",
    "H2DBucket",
    "MemoryBuffer",
    "MemoryBufferMetaList",
    "MemoryBufferMetas",
    "ParameterMeta",
    "ParameterServer",
    "get_ip",
    "npu_generate_uuid",
    "request_inference_to_update",
]
