"""Weights that are no numbers are found before anything is sent."""

from __future__ import annotations

from typing import Any, cast

import torch

from checkpoint_engine.contract.findings import listed
from checkpoint_engine.deadline import Deadline
from checkpoint_engine.dtypes import torch_dtype
from checkpoint_engine.errors import WeightsRejectedError
from checkpoint_engine.planning.buckets import Bucket
from checkpoint_engine.source.store import Registered

__all__ = ["refuse_nan"]

_PIECE = 1 << 24
"""Elements looked at in one go: what that takes besides is some multiple of it."""


def refuse_nan(registered: Registered, deadline: Deadline) -> None:
    """Looks at all tensors of floating point that this rank holds, where they lie, also on its device.

    Raises:
        WeightsRejectedError: some hold NaN; the message names them.
        DeadlineError: what is on its way into this rank's memory does not come in time.
    """
    if registered.refill is not None:
        registered.refill.wait_for_all(lambda: deadline.check("filling the memory of this rank"))
    found: list[str] = []
    for number, (segment, entry) in enumerate(zip(registered.segments, registered.entries, strict=True)):
        for tensor in entry.tensors:
            dtype = torch_dtype(tensor.dtype)
            if not dtype.is_floating_point or not tensor.nbytes:
                continue
            alone = Bucket(0, number, tensor.offset, tensor.nbytes, (tensor,))
            if _has_nan(segment.bytes_of(alone)[: tensor.nbytes].view(dtype)):
                found.append(tensor.name)
    if found:
        raise WeightsRejectedError(
            f"these tensors of {registered.name!r} hold NaN: {listed(found)}; nothing was sent, and engines serve on"
        )


def _has_nan(values: torch.Tensor) -> bool:
    # Torch compares no floats of eight bits.
    narrow = values.element_size() == 1
    pieces = cast("tuple[torch.Tensor, ...]", cast("Any", values).split(_PIECE))
    return any(bool((piece.to(torch.float32) if narrow else piece).isnan().any()) for piece in pieces)
