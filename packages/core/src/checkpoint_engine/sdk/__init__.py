"""What an engine plugin may import of this distribution, and the only thing: see docs/engine-plugin.md.

Here is what every plugin needs: sinks, what a worker receives with, errors. `sdk.client` is for asking an engine,
`sdk.fit` tells whether a checkpoint fits, `sdk.plans` has what reload by plan is made of, `sdk.replicas` starts an
engine out of running ones' memory, and `sdk.testing` has the checks that every sink must pass. All of this follows
semantic versioning; everything else in `checkpoint_engine` may change with any version.

Names are loaded when they are first used: whoever only asks an engine needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from checkpoint_engine import limits

if TYPE_CHECKING:
    from checkpoint_engine.client.announced import EngineSign, InstalledEngine
    from checkpoint_engine.contract.engine_sink import ComparisonSink, EngineSink
    from checkpoint_engine.contract.figures import ComparisonFigures, Details, Figures, UpdateFigures
    from checkpoint_engine.contract.findings import Findings, listed, same_bytes
    from checkpoint_engine.contract.lifecycle import WeightsState
    from checkpoint_engine.contract.modes import Operation, ReloadMode
    from checkpoint_engine.contract.sink import Tensors, TensorSpec, Update, WeightSink
    from checkpoint_engine.deadline import Cancel, Deadline
    from checkpoint_engine.device import Device, open_device
    from checkpoint_engine.errors import (
        CheckpointEngineError,
        CheckpointStateError,
        DeadlineError,
        EngineRequestError,
        EngineSilentError,
        MissingDependencyError,
        SettingError,
        WeightsRejectedError,
        WorkerError,
    )
    from checkpoint_engine.receiver.reception import Received, pick_handle, receive_update
    from checkpoint_engine.receiver.refusal import refuse_update
    from checkpoint_engine.terminal import print_error, print_json

__all__ = [
    "Cancel",
    "CheckpointEngineError",
    "CheckpointStateError",
    "ComparisonFigures",
    "ComparisonSink",
    "Deadline",
    "DeadlineError",
    "Details",
    "Device",
    "EngineRequestError",
    "EngineSign",
    "EngineSilentError",
    "EngineSink",
    "Figures",
    "Findings",
    "InstalledEngine",
    "MissingDependencyError",
    "Operation",
    "Received",
    "ReloadMode",
    "SettingError",
    "TensorSpec",
    "Tensors",
    "Update",
    "UpdateFigures",
    "WeightSink",
    "WeightsRejectedError",
    "WeightsState",
    "WorkerError",
    "limits",
    "listed",
    "open_device",
    "pick_handle",
    "print_error",
    "print_json",
    "receive_update",
    "refuse_update",
    "same_bytes",
]

_HOME_OF = {
    "Cancel": "deadline",
    "CheckpointEngineError": "errors",
    "CheckpointStateError": "errors",
    "ComparisonFigures": "contract.figures",
    "ComparisonSink": "contract.engine_sink",
    "Deadline": "deadline",
    "DeadlineError": "errors",
    "Details": "contract.figures",
    "Device": "device",
    "EngineRequestError": "errors",
    "EngineSilentError": "errors",
    "EngineSign": "client.announced",
    "EngineSink": "contract.engine_sink",
    "Figures": "contract.figures",
    "Findings": "contract.findings",
    "InstalledEngine": "client.announced",
    "MissingDependencyError": "errors",
    "Operation": "contract.modes",
    "Received": "receiver.reception",
    "ReloadMode": "contract.modes",
    "SettingError": "errors",
    "TensorSpec": "contract.sink",
    "Tensors": "contract.sink",
    "Update": "contract.sink",
    "UpdateFigures": "contract.figures",
    "WeightSink": "contract.sink",
    "WeightsRejectedError": "errors",
    "WeightsState": "contract.lifecycle",
    "WorkerError": "errors",
    "listed": "contract.findings",
    "open_device": "device",
    "pick_handle": "receiver.reception",
    "print_error": "terminal",
    "print_json": "terminal",
    "receive_update": "receiver.reception",
    "refuse_update": "receiver.refusal",
    "same_bytes": "contract.findings",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - a type checker sees the names of `__all__` above
    """Finds a name where it is at home."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"checkpoint_engine.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
