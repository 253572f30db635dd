"""Lets the receiver drive a reference engine: updates it, or compares it with a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from checkpoint_engine.engine.adapter import Adapter, TensorSpec, Update
from checkpoint_engine.engine.findings import Findings, same_bytes
from checkpoint_engine.engine.reference import ReferenceEngine
from checkpoint_engine.reload.delivery import names_of
from checkpoint_engine.reload.recorder import Loader
from checkpoint_engine.reload.reloader import Reloader


class ReferenceAdapter:
    """Lets the receiver drive a `ReferenceEngine`. A refused update writes nothing."""

    def __init__(self, engine: ReferenceEngine) -> None:
        self.engine = engine
        self.version: str | None = None
        self.dirty = False
        """Whether the parameters may be a mixture; a later complete update heals that."""
        self._update: Update | None = None
        self._loaded: set[str] = set()
        self._written = False
        self._reloader = Reloader(engine.write, engine.parameters, self._shadow)

    def begin(self, update: Update) -> None:
        """Refuses an update that does not bring exactly the engine's tensors.

        Raises:
            WeightsRejectedError: a tensor is unknown, misshapen or missing.
        """
        self._update, self._loaded, self._written = update, set(), False
        self.engine.check_tensors(update.tensors)
        self.engine.check_complete(update.tensors)
        self._reloader.begin(update.tensors, update.reload)

    def wanted(self, bucket: Sequence[tuple[str, int]]) -> tuple[tuple[int, int], ...] | None:
        """Only what the plan copies, once it is trusted."""
        return self._reloader.wanted(bucket)

    def load(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Loads a bucket.

        Raises:
            WeightsRejectedError: a tensor is unknown or misshapen.
        """
        self.engine.check_tensors(_specs(tensors))
        self._written = self.dirty = True
        self._reloader.load(tensors)
        self._loaded.update(names_of(tensors))

    def finish(self) -> Mapping[str, str | int | float]:
        """Completes the update.

        Raises:
            WeightsRejectedError: tensors are missing.
        """
        self.engine.check_complete(self._loaded)
        shares = self._reloader.finish()
        self.version = self._update.version if self._update else None
        self.dirty = False
        return {"parameters": len(self.engine.parameters), "tensors": len(self._loaded), **shares}

    def verifier(self) -> Adapter:
        """See `Verifiable`."""
        return ReferenceVerifier(self.engine)

    def abort(self) -> bool:
        """Gives up; what was written cannot be taken back."""
        self._update = None
        self._reloader.failed()
        return not self._written

    def _shadow(self) -> tuple[Loader, Mapping[str, torch.Tensor]]:
        shadow = ReferenceEngine(
            self.engine.spec, tp_rank=self.engine.tp_rank, tp_size=self.engine.tp_size, device="meta"
        )
        return shadow.load_weights, shadow.parameters


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


def _specs(tensors: Sequence[tuple[str, torch.Tensor]]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors}
