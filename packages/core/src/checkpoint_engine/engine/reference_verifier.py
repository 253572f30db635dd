"""Compares the parameters of a reference engine with a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from checkpoint_engine.engine.adapter import TensorSpec, Update
from checkpoint_engine.engine.findings import Findings, same_bytes

if TYPE_CHECKING:
    from checkpoint_engine.engine.reference import ReferenceEngine


class ReferenceVerifier:
    """See `checkpoint_engine.engine.adapter.Verifiable`."""

    def __init__(self, engine: ReferenceEngine) -> None:
        self._engine = engine
        self._wrong: set[str] = set()

    def begin(self, update: Update) -> None:
        """Refuses a checkpoint that does not hold exactly the engine's tensors.

        Raises:
            WeightsRejectedError: a tensor is unknown, misshapen or missing.
        """
        self._engine.check_tensors(update.tensors)
        self._engine.check_complete(update.tensors)

    def load(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Compares this worker's part of each tensor, and the zeros around it."""
        self._engine.check_tensors({name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in tensors})
        for name, tensor in tensors:
            slot = self._engine.layout.slots[name]
            parameter = self._engine.parameters[slot.parameter]
            held, zeros = parameter[slot.into], None if slot.zeros is None else parameter[slot.zeros]
            # As loading does: the parameter's dtype counts.
            same = same_bytes(held, tensor[slot.take].to(held.dtype))
            if not same or (zeros is not None and not same_bytes(zeros, torch.zeros_like(zeros))):
                self._wrong.add(slot.parameter)

    def finish(self) -> Mapping[str, str | int | float]:
        """Tells what was found."""
        parameters = self._engine.parameters
        wrong = [name for name in parameters if name in self._wrong]
        return Findings(len(parameters), sum(p.nbytes for p in parameters.values()), wrong).details()

    def abort(self) -> bool:
        """Nothing was changed."""
        return True
