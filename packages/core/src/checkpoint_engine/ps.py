"""The parameter server under the module name that existing users import."""

from __future__ import annotations

import runpy
from typing import TYPE_CHECKING, Any, NoReturn

from checkpoint_engine.client.update_request import request_inference_to_update
from checkpoint_engine.companions import tell_importer_what_it_lacks
from checkpoint_engine.data_types import (
    BucketRange,
    DataToGather,
    H2DBucket,
    MemoryBuffer,
    MemoryBufferMetaList,
    MemoryBufferMetas,
    ParameterMeta,
)
from checkpoint_engine.device import open_device
from checkpoint_engine.device_utils import DeviceManager, get_ip, npu_generate_uuid
from checkpoint_engine.errors import MissingDependencyError
from checkpoint_engine.server.parameter_server import ParameterServer

if TYPE_CHECKING:
    from collections.abc import Sequence

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


tell_importer_what_it_lacks()

_USE_INSTEAD = {
    "_gen_h2d_buckets": "ParameterServer.update plans by itself; in verl, use the backend checkpoint_engine instead",
    "_assign_receiver_ranks": "ParameterServer.update spreads reads by itself; see docs/elastic.md",
    "_get_master_port": "pass master_port, or leave it out",
}


def _to_named_tensor(  # pyright: ignore[reportUnusedFunction] - third-party scripts import it
    metas: Sequence[ParameterMeta], offset: int = 0
) -> list[dict[str, Any]]:
    """Where each tensor of a buffer begins, counted from `offset`."""
    placed: list[dict[str, Any]] = []
    for meta in metas:
        placed.append({"name": meta.name, "dtype": meta.dtype, "shape": meta.shape, "offset": offset})
        offset += meta.aligned_size
    return placed


def _get_physical_gpu_id(  # pyright: ignore[reportUnusedFunction] - third-party scripts import it
    device_manager: DeviceManager, device_index: int | None = None
) -> str:
    """By what a GPU of this process is known on its host: the first of the pairs that `req_func` gets."""
    if device_manager.device_type == "cpu":
        return open_device("cpu", rank=device_index or 0).identity
    index = device_manager.device_module.current_device() if device_index is None else device_index
    return open_device(device_manager.device_type, index=index, rank=index).identity


def __getattr__(name: str) -> NoReturn:
    """Says what does the same here.

    Raises:
        MissingDependencyError: an `ImportError`, so that `from ... import` shows what it says.
    """
    if name in _USE_INSTEAD:
        raise MissingDependencyError(f"checkpoint_engine.ps.{name} is not here: {_USE_INSTEAD[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if __name__ == "__main__":  # as scripts of older versions start it; what starts the command stands above this floor
    runpy.run_module("checkpoint_engine", run_name="__main__")
