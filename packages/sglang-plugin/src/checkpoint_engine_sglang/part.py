"""Updates that bring some tensors only: what cannot come without the rest, and whether anything else has changed."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from checkpoint_engine.sdk import WeightsRejectedError, WorkerError, listed
from checkpoint_engine.sdk.plans import Checksums, HeldTensors, Reached
from checkpoint_engine_sglang import compat
from checkpoint_engine_sglang.planned_model import PlannedModel

__all__ = ["Untouched", "refuse_part"]

_WHOLE = "bring a whole checkpoint"


def refuse_part(model: PlannedModel) -> None:
    """Refuses what one model cannot be filled with by itself.

    Raises:
        WeightsRejectedError: the message names what hangs on the rest.
    """
    role, dry_run = model.runner.role, model.dry_run
    if model.is_fed_whole or model.obstacle:
        why = dry_run.whole or model.obstacle
        raise WeightsRejectedError(f"it is not known what some tensors alone would change in the {role} model ({why})")
    if model.rebuilt and compat.deriving_modules(model.runner.model):
        raise WeightsRejectedError(
            f"the {role} model derives tensors from weights that SGLang has processed since: {_WHOLE}"
        )
    unsourced = sorted(target for target, names in dry_run.recording.origins.items() if not names)
    if unsourced:
        raise WeightsRejectedError(f"SGLang's loader writes {listed(unsourced)} too, whatever comes: {_WHOLE}")
    torn = dry_run.missing(model.runner, ())[1]
    if torn:
        raise WeightsRejectedError(
            f"these tensors are not all of what these parameters are made of: {listed(torn)}; bring all tensors of "
            "these layers, or none"
        )


class Untouched:
    """The parameters and buffers of a model that a part has nothing for."""

    def __init__(self, model: PlannedModel) -> None:
        """Notes what they hold."""
        self._runner = model.runner
        self._filled = {target.rpartition(".")[0] for target, names in model.origins.items() if names}
        self._memory = {
            tensor.untyped_storage().data_ptr()
            for name, module in compat.named_modules(model.runner.model)
            if name in self._filled
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
        }
        self._before = HeldTensors(self._reached(), Checksums())

    def check(self) -> None:
        """Looks at them again.

        Raises:
            WorkerError: something has changed.
        """
        wrong = [each.path for each in self._before.differing(self._reached())]
        if wrong:
            raise WorkerError(
                f"SGLang's loader has changed {listed(wrong)}, for which nothing was brought; {_WHOLE}, which heals "
                "it. Please report this"
            )

    def _reached(self) -> Iterator[Reached]:
        for name, module in compat.named_modules(self._runner.model):
            own: list[tuple[str, torch.Tensor]] = [
                *module.named_parameters(recurse=False),
                *module.named_buffers(recurse=False),
            ]
            for held, tensor in own if name not in self._filled else ():
                if tensor.untyped_storage().data_ptr() not in self._memory:
                    yield Reached(name, held, tensor, registered=True)
