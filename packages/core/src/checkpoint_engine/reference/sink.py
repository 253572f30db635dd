"""Lets the receiver drive a reference engine: updates it, or compares it with a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import torch

from checkpoint_engine.contract.delivery import Delivery
from checkpoint_engine.contract.engine_sink import ComparisonSink, EngineSink
from checkpoint_engine.contract.figures import ComparisonFigures, UpdateFigures
from checkpoint_engine.contract.findings import Findings, same_bytes
from checkpoint_engine.contract.sink import Tensors, TensorSpec, Update, WeightSink
from checkpoint_engine.reference.engine import ReferenceEngine
from checkpoint_engine.reload.kept_proofs import KeptProofs
from checkpoint_engine.reload.recorder import Loader
from checkpoint_engine.reload.reloader import Reloader

__all__ = ["ReferenceSink", "ReferenceVerifier"]


class ReferenceSink(EngineSink):
    """Takes weights for a `ReferenceEngine`. A refused update writes nothing."""

    takes_parts = True
    """Each tensor has a place of its own, also in parameters that are fused."""

    def __init__(self, engine: ReferenceEngine) -> None:
        super().__init__()
        self.engine = engine
        self._written = False
        serving = {"engine": "reference", "torch": torch.__version__, "device": engine.device.type}
        serving |= {"model": repr(engine.spec), "worker": f"{engine.tp_rank} of {engine.tp_size}"}
        self._reloader = Reloader(engine.write, engine.parameters, self._meta_model, KeptProofs(serving))

    def check(self, update: Update) -> None:
        """Refuses an update that does not bring exactly the engine's tensors.

        Raises:
            WeightsRejectedError: a tensor is unknown, misshapen or missing.
        """
        self.engine.check_tensors(update.tensors)
        if not update.partial:
            self.engine.check_complete(update.tensors)

    def open(self, update: Update) -> None:
        """Finds out how to take it over."""
        self._written = False
        self._reloader.begin(update.tensors, update.reload, compared=update.compared)

    def wanted(self, bucket: Sequence[tuple[str, int]]) -> tuple[tuple[int, int], ...] | None:
        """Only what the plan copies, once it is checked."""
        return self._reloader.wanted(bucket)

    def take(self, tensors: Tensors) -> None:
        """Loads a bucket.

        Raises:
            WeightsRejectedError: a tensor is unknown or misshapen.
        """
        if not isinstance(tensors, Delivery):  # which brings what was announced and checked
            self.engine.check_tensors(_specs(tensors))
        self._written = True
        self._reloader.load(tensors)

    def complete(self, update: Update) -> UpdateFigures:
        """Ends the update."""
        del update
        return msgspec.structs.replace(self._reloader.finish(), engine={"parameters": len(self.engine.parameters)})

    def restore(self) -> bool:
        """What was written cannot be taken back."""
        self._reloader.failed(interrupted=self.interrupted)
        return not self._written

    def verifier(self) -> WeightSink:
        """See `Verifiable`."""
        return ReferenceVerifier(self)

    def _meta_model(self) -> tuple[Loader, Mapping[str, torch.Tensor]]:
        model = ReferenceEngine(
            self.engine.spec, tp_rank=self.engine.tp_rank, tp_size=self.engine.tp_size, device="meta"
        )
        return model.load_weights, model.parameters


class ReferenceVerifier(ComparisonSink):
    """Compares this worker's part of each tensor, and the zeros around it."""

    takes_parts = True

    def __init__(self, sink: ReferenceSink) -> None:
        super().__init__(sink)
        self._model = sink.engine
        self._wrong: set[str] = set()

    def check(self, update: Update) -> None:
        """Refuses a checkpoint that does not hold exactly the engine's tensors.

        Raises:
            WeightsRejectedError: a tensor is unknown, misshapen or missing.
        """
        self._model.check_tensors(update.tensors)
        if not update.partial:
            self._model.check_complete(update.tensors)

    def open(self, update: Update) -> None:
        """Nothing is to be made ready."""

    def take(self, tensors: Tensors) -> None:
        """Compares a bucket."""
        self._model.check_tensors(_specs(tensors))
        for name, tensor in tensors:
            slot = self._model.layout.slots[name]
            parameter = self._model.parameters[slot.parameter]
            held, zeros = parameter[slot.into], None if slot.zeros is None else parameter[slot.zeros]
            # As loading does: the parameter's dtype counts.
            same = same_bytes(held, tensor[slot.take].to(held.dtype))
            if not same or (zeros is not None and not same_bytes(zeros, torch.zeros_like(zeros))):
                self._wrong.add(slot.parameter)

    def complete(self, update: Update) -> ComparisonFigures:
        """Tells what was found."""
        slots, held = self._model.layout.slots, self._model.parameters
        parameters = {name: held[name] for name in (slots[tensor].parameter for tensor in update.tensors)}
        wrong = [name for name in parameters if name in self._wrong]
        return Findings(len(parameters), sum(p.nbytes for p in parameters.values()), wrong).figures()

    def restore(self) -> bool:
        """Nothing was changed."""
        return True


def _specs(tensors: Tensors) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors}
