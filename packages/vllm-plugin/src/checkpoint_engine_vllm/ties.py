"""Parameters that vLLM has made one in memory, although a checkpoint may have a tensor for each.

Whether an output layer is tied to the embedding is decided by the files of the start. A checkpoint that decides
otherwise cannot be served by that engine: the second of the two tensors would overwrite the first.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from checkpoint_engine.sdk import Tensors, WeightsRejectedError
from checkpoint_engine.sdk.plans import Checksums
from checkpoint_engine_vllm import compat
from checkpoint_engine_vllm.loadplan import LoadPlan

__all__ = ["Ties"]

_HEAD = "lm_head.weight"


class Ties:
    """Of one model, for one update: tensors that come into the same memory must be the same."""

    def __init__(self, plan: LoadPlan | None, model: torch.nn.Module) -> None:
        """Finds what is tied."""
        self._pairs = [] if plan is None else _pairs(plan, model)
        self._watched = {source for pair in self._pairs for source in pair}
        self._sums: dict[str, torch.Tensor] = {}
        self._checksums = Checksums()

    def load(self, tensors: Tensors) -> None:
        """Takes the checksums of those that matter."""
        for name, tensor in tensors if self._watched else ():
            if name in self._watched:
                self._sums[name] = self._checksums.of(tensor)

    def watches(self, bucket: Iterable[tuple[str, object]]) -> bool:
        """Whether tensors of this bucket must come whole, although nothing may be copied out of them."""
        return any(name in self._watched for name, _ in bucket) if self._watched else False

    def check(self) -> None:
        """Called once all tensors have come.

        Raises:
            WeightsRejectedError: two that are to lie in one memory differ.
        """
        for first, second in self._pairs:
            if first in self._sums and second in self._sums and not torch.equal(self._sums[first], self._sums[second]):
                raise WeightsRejectedError(
                    f"tensors {first!r} and {second!r} differ, but this engine has one memory for both: vLLM tied them "
                    "by what it started with; start it anew with this one (updating again does not help)"
                )


def _pairs(plan: LoadPlan, model: torch.nn.Module) -> list[tuple[str, str]]:
    """Tensors of the checkpoint that come into one memory, two and two."""
    modules = compat.modules_by_name(model)
    sources: dict[int, str] = {}
    found: list[tuple[str, str]] = []
    for target, origins in plan.reload.recording.origins.items():
        prefix, _, own = target.rpartition(".")
        tensor = getattr(modules.get(prefix), own, None)
        if len(origins) != 1 or not isinstance(tensor, torch.Tensor) or tensor.is_meta or not tensor.numel():
            continue
        source = next(iter(origins))
        other = sources.setdefault(tensor.data_ptr(), source)
        if other != source:
            found.append((other, source))
    # A loader of a tied model passes over an output layer, whatever is in it.
    heads = [name for name in plan.ignored if name.endswith(_HEAD)]
    tied = [module for name, module in modules.items() if name.endswith(_HEAD.rpartition(".")[0])]
    held = [tensor for module in tied if isinstance(tensor := getattr(module, "weight", None), torch.Tensor)]
    return [
        *found,
        *((sources[tensor.data_ptr()], head) for head in heads for tensor in held if tensor.data_ptr() in sources),
    ]
