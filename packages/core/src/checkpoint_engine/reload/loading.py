"""Gives tensors to an engine's own loader, and makes clear errors of what that raises."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator

import torch

from checkpoint_engine.contract.sink import TensorSpec
from checkpoint_engine.errors import CheckpointEngineError, WeightsRejectedError, WorkerError

__all__ = ["give_to_loader", "rejection"]

_REJECTIONS = (KeyError, ValueError, AssertionError, AttributeError, IndexError)
"""What loaders raise for a tensor that is unknown or of the wrong shape."""
_LONGEST_REASON = 300
"""Characters; engines like to list every parameter that they have."""


def give_to_loader(
    loader: str,
    load: Callable[[Iterator[tuple[str, torch.Tensor]]], object],
    tensors: Iterable[tuple[str, torch.Tensor]],
    on_host: Collection[str] = (),
) -> None:
    """Has an engine load tensors.

    Args:
        loader: What to call it in errors, such as "vLLM's loader".
        load: The engine's `load_weights`.
        tensors: By name.
        on_host: Those that it shall get in host memory: it computes with them, and does so there when an engine starts;
            another device may give another last bit.

    Raises:
        WeightsRejectedError: the loader does not know a tensor, or not in this shape.
        WorkerError: the loader failed otherwise.
    """
    last, spec = "(none)", None

    def watched() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal last, spec
        for name, tensor in tensors:
            last, spec = name, TensorSpec(tensor.dtype, tuple(tensor.shape))
            yield name, tensor.cpu() if name in on_host else tensor

    try:
        load(watched())
    except CheckpointEngineError:
        raise
    except Exception as error:
        if isinstance(error, _REJECTIONS):
            raise rejection(loader, last, spec, error) from error
        raise WorkerError(f"{loader} failed at tensor {last!r}: {type(error).__name__}: {error}") from error


def rejection(loader: str, name: str, spec: TensorSpec | None, error: Exception) -> WeightsRejectedError:
    """The error for a tensor at which an engine's loader raised."""
    shape = "" if spec is None else f" ({str(spec.dtype).removeprefix('torch.')}, shape {list(spec.shape)})"
    reason = str(error) or "no reason given"
    if len(reason) > _LONGEST_REASON:
        reason = f"{reason[:_LONGEST_REASON]} …"
    return WeightsRejectedError(
        f"{loader} does not take tensor {name!r}{shape}: {type(error).__name__}: {reason}; "
        "is this checkpoint of the same architecture as the served model?"
    )
