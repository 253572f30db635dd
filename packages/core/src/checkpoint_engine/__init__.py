"""New weights for serving language models, in place.

Names are loaded when they are first used, so that importing the package is quick.
"""

from __future__ import annotations

import importlib
import warnings
from importlib import metadata
from typing import TYPE_CHECKING

from checkpoint_engine.version import __version__

if TYPE_CHECKING:
    from checkpoint_engine.catalog import Catalog
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
    from checkpoint_engine.errors import CheckpointEngineError
    from checkpoint_engine.server import ParameterServer
    from checkpoint_engine.worker import (
        FlattenedTensorMetadata,
        VllmColocateWorkerExtension,
        update_weights_from_ipc,
    )

__all__ = [
    "BucketRange",
    "Catalog",
    "CheckpointEngineError",
    "DataToGather",
    "DeviceManager",
    "FlattenedTensorMetadata",
    "H2DBucket",
    "MemoryBuffer",
    "MemoryBufferMetaList",
    "MemoryBufferMetas",
    "ParameterMeta",
    "ParameterServer",
    "VllmColocateWorkerExtension",
    "__version__",
    "get_ip",
    "npu_generate_uuid",
    "request_inference_to_update",
    "update_weights_from_ipc",
]

_HOME_OF = {
    "BucketRange": "data_types",
    "Catalog": "catalog",
    "CheckpointEngineError": "errors",
    "DataToGather": "data_types",
    "DeviceManager": "device_utils",
    "FlattenedTensorMetadata": "worker",
    "H2DBucket": "data_types",
    "MemoryBuffer": "data_types",
    "MemoryBufferMetaList": "data_types",
    "MemoryBufferMetas": "data_types",
    "ParameterMeta": "data_types",
    "ParameterServer": "server",
    "VllmColocateWorkerExtension": "worker",
    "get_ip": "device_utils",
    "npu_generate_uuid": "device_utils",
    "request_inference_to_update": "engine.client",
    "update_weights_from_ipc": "worker",
}


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _warn_of_clash() -> None:
    try:
        other = metadata.version("checkpoint-engine")
    except metadata.PackageNotFoundError:
        return
    warnings.warn(
        f"checkpoint-engine {other} and checkpoint-engine-core {__version__} are both installed and own the same "
        "files; keep one: pip uninstall checkpoint-engine checkpoint-engine-core, then install the one you want",
        RuntimeWarning,
        stacklevel=3,
    )


_warn_of_clash()
