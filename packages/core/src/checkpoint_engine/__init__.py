"""New weights for serving language models, in place.

Names are loaded when they are first used, so that importing the package is quick. One more than `__all__` has is found
where its plugin is installed: `VllmColocateWorkerExtension`.
"""

from __future__ import annotations

import importlib
import warnings
from importlib import metadata
from typing import TYPE_CHECKING, Any

from checkpoint_engine.version import __version__

if TYPE_CHECKING:
    from checkpoint_engine.catalog import Catalog
    from checkpoint_engine.client.update_request import request_inference_to_update
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
    from checkpoint_engine.errors import CheckpointEngineError
    from checkpoint_engine.p2p_store import P2PStore
    from checkpoint_engine.server.adapters import send_adapter
    from checkpoint_engine.server.parameter_server import ParameterServer
    from checkpoint_engine.source.shards import TensorShard
    from checkpoint_engine.source.views import CheckpointBox, checkpoint_views
    from checkpoint_engine.worker import FlattenedTensorMetadata, update_weights_from_ipc

__all__ = [
    "BucketRange",
    "Catalog",
    "CheckpointBox",
    "CheckpointEngineError",
    "DataToGather",
    "DeviceManager",
    "FlattenedTensorMetadata",
    "H2DBucket",
    "MemoryBuffer",
    "MemoryBufferMetaList",
    "MemoryBufferMetas",
    "P2PStore",
    "ParameterMeta",
    "ParameterServer",
    "TensorShard",
    "__version__",
    "checkpoint_views",
    "get_ip",
    "npu_generate_uuid",
    "request_inference_to_update",
    "send_adapter",
    "update_weights_from_ipc",
]

_HOME_OF = {
    "BucketRange": "data_types",
    "Catalog": "catalog",
    "CheckpointBox": "source.views",
    "CheckpointEngineError": "errors",
    "DataToGather": "data_types",
    "DeviceManager": "device_utils",
    "FlattenedTensorMetadata": "worker",
    "H2DBucket": "data_types",
    "MemoryBuffer": "data_types",
    "MemoryBufferMetaList": "data_types",
    "MemoryBufferMetas": "data_types",
    "P2PStore": "p2p_store",
    "ParameterMeta": "data_types",
    "ParameterServer": "server",
    "TensorShard": "source.shards",
    "checkpoint_views": "source.views",
    "get_ip": "device_utils",
    "npu_generate_uuid": "device_utils",
    "request_inference_to_update": "client.update_request",
    "send_adapter": "server.adapters",
    "update_weights_from_ipc": "worker",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - a type checker sees the names of `__all__` above
    """Finds a name where it is at home.

    Raises:
        AttributeError: there is no such name, or the plugin that brings it is not installed.
    """
    if name in _HOME_OF:
        value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    else:
        value = _of_a_plugin(name)
    globals()[name] = value
    return value


def _of_a_plugin(name: str) -> object:
    from checkpoint_engine.errors import MissingDependencyError, MissingNameError  # noqa: PLC0415
    from checkpoint_engine.names import PLUGIN_OF, load_plugin_name  # noqa: PLC0415

    if name not in PLUGIN_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return load_plugin_name(name)
    except MissingDependencyError as error:
        raise MissingNameError(str(error)) from None


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
