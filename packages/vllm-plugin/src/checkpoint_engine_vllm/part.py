"""The part of a model that some tensors of a checkpoint fill, where an update brings no others.

vLLM's reload is given the layers of that part alone, so that it opens no others. What a part cannot be filled without
is found beforehand, and that nothing else has changed is looked at afterwards, as long as the plan is not proved.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, cast

import torch

from checkpoint_engine.sdk import TensorSpec, WeightsRejectedError, WorkerError, listed
from checkpoint_engine.sdk.plans import Checksums, HeldTensors
from checkpoint_engine_vllm import compat
from checkpoint_engine_vllm.loadplan import LoadPlan
from checkpoint_engine_vllm.reaching import reach_weights

__all__ = ["Part"]

_WHOLE = "bring a whole checkpoint"


class Part:
    """Of the served model, for one update."""

    def __init__(
        self, plan: LoadPlan | None, why: str, model: torch.nn.Module, tensors: Mapping[str, TensorSpec], stages: int
    ) -> None:
        """Finds it.

        Args:
            plan: What vLLM's loader would do with `tensors`.
            why: Why that is not known, if it is not.
            model: The served one.
            tensors: What comes.
            stages: Of the pipeline, all of which get the same tensors.

        Raises:
            WeightsRejectedError: it cannot be filled by itself.
        """
        self._model = model
        self._before: HeldTensors | None = None
        if plan is None or not plan.is_complete:
            raise WeightsRejectedError(f"it is not known what some tensors alone would fill ({why}): {_WHOLE}")
        if plan.at_once:
            raise WeightsRejectedError(f"vLLM's loader of this model does more than it is given tensors for: {_WHOLE}")
        if plan.beside:
            raise WeightsRejectedError(f"vLLM's loader fills {min(plan.beside)} too, which is no parameter: {_WHOLE}")
        self._modules = modules = compat.modules_by_name(model)
        owners = {target: modules.get(target.rpartition(".")[0]) for target in plan.reload.targets}
        _refuse_scales(owners)
        _refuse_ignored(plan, tensors, stages)
        self._filled = {module for module in owners.values() if module is not None}
        self._refuse_second_names(plan)

    @cached_property
    def layers(self) -> list[torch.nn.Module]:
        """What a reload opens: what is filled, what shows the same memory, and what derives something from it."""
        memory = {_memory(tensor) for module in self._filled for tensor in _own(module).values()} - {0}
        return [
            module
            for module in self._modules.values()
            if module in self._filled
            or any(_memory(tensor) in memory for tensor in _own(module).values())
            or (compat.is_attention(module) and not self._filled.isdisjoint(module.modules()))
        ]

    @cached_property
    def others(self) -> frozenset[torch.nn.Module]:
        """All other modules of the model."""
        return frozenset(self._modules.values()) - set(self.layers)

    def watch(self) -> None:
        """Notes what the model holds, before anything changes."""
        self._before = HeldTensors(reach_weights(self._model), Checksums())

    def check(self) -> None:
        """Looks whether anything else than this part has changed.

        Raises:
            WorkerError: something has.
        """
        if self._before is None:
            return
        now = list(reach_weights(self._model))
        mine = [each for each in now if self._modules.get(each.module) not in self.others]
        memory = {_memory(each.tensor) for each in mine} - {0}
        wrong = [
            each.path
            for each in self._before.differing(now)
            if self._modules.get(each.module) in self.others and _memory(each.tensor) not in memory
        ]
        if wrong:
            raise WorkerError(
                f"vLLM's loader has changed {listed(wrong)}, for which nothing was brought; {_WHOLE}, which heals it. "
                "Please report this"
            )

    def _refuse_second_names(self, plan: LoadPlan) -> None:
        """VLLM makes parameters one in memory by what it starts with: the other name would change as well."""
        names = {_memory(plan.targets[target]): target for target in plan.reload.targets if target in plan.targets}
        by_address = {
            tensor.data_ptr(): f"{prefix}.{own}"
            for prefix, module in self._modules.items()
            if module in self._filled
            for own, tensor in _own(module).items()
            if tensor.numel() and f"{prefix}.{own}" in plan.reload.targets
        }
        for target, planned in plan.targets.items():
            prefix, _, own = target.rpartition(".")
            module = self._modules.get(prefix)
            tensor = None if module is None else _own(module).get(own)
            if target in plan.reload.targets or tensor is None or not tensor.numel() or _memory(planned) in names:
                continue
            if (filled := by_address.get(tensor.data_ptr())) is not None:
                raise WeightsRejectedError(
                    f"{filled!r} and {target!r} are one in memory here, and tensors came for one of them: bring both"
                )


def _refuse_scales(owners: Mapping[str, torch.nn.Module | None]) -> None:
    found = [target for target, owner in owners.items() if owner is not None and compat.is_attention(owner)]
    if found:
        raise WeightsRejectedError(f"{listed(found)}: vLLM makes scales of attention anew with all others: {_WHOLE}")


def _refuse_ignored(plan: LoadPlan, tensors: Mapping[str, TensorSpec], stages: int) -> None:
    """Refuses what goes nowhere; of a pipeline, other stages may take it."""
    if stages > 1:
        return
    found = [] if plan.reload.targets else sorted(plan.ignored)
    if not any("embed" in name for name in tensors):  # which `Ties` compares with a tied head
        found = found or [name for name in plan.ignored if name.endswith("lm_head.weight")]
    if found:
        raise WeightsRejectedError(f"vLLM's loader passes over {listed(found)}: leave them out")


def _own(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        **dict(module.named_parameters(recurse=False, remove_duplicate=False)),
        **dict(module.named_buffers(recurse=False, remove_duplicate=False)),
    }


def _memory(tensor: torch.Tensor) -> int:
    if tensor.layout != torch.strided:
        return 0
    storage = tensor.untyped_storage()
    return int(cast("Any", storage)._cdata) if tensor.is_meta else storage.data_ptr()  # noqa: SLF001 - else nothing tells
