"""Tensors by which a model shows a parameter in another way, and which then lie elsewhere.

A mixer of Mamba keeps a view of its convolution's weight. On a CPU vLLM packs that weight, so that the view goes on
showing what the engine started with, whatever a reload brings. It is filled here, from the tensors of the weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import msgspec
import torch

from checkpoint_engine.sdk import Tensors, WeightsRejectedError
from checkpoint_engine.sdk.plans import ReloadPlan, Replay
from checkpoint_engine_vllm import compat
from checkpoint_engine_vllm.loadplan import LoadPlan

__all__ = ["Aliases"]


class Aliases:
    """Those of one model, for one update."""

    def __init__(self, plan: LoadPlan | None, model: torch.nn.Module) -> None:
        """Finds them.

        Raises:
            WeightsRejectedError: it is not known what belongs into one of them.
        """
        self.tensors: dict[str, torch.Tensor] = {}
        """By the name of their module, and their own."""
        if plan is not None and plan.aliases:
            self._find(plan, model)
        self._before = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}
        self._replay = None if plan is None or not self.tensors else Replay(_copies(plan, self.tensors), self.tensors)

    def load(self, tensors: Tensors) -> None:
        """Copies what these bring."""
        if self._replay is not None:
            self._replay.load(tensors, {})

    def restore(self) -> None:
        """Puts the old values back."""
        for name, tensor in self.tensors.items():
            tensor.data.copy_(self._before[name])

    def _find(self, plan: LoadPlan, model: torch.nn.Module) -> None:
        modules = compat.modules_by_name(model)
        for name, target in plan.aliases.items():
            shown, whole = _held(modules, name), _held(modules, target)
            if shown is None or not shown.numel() or _is_one_memory(shown, whole):
                continue
            traced = target not in plan.reload.flaws and target not in plan.reload.fills
            if not traced or not shown.is_contiguous() or shown.numel() != plan.targets[target].numel():
                raise WeightsRejectedError(
                    f"{name!r} of the served model would keep old weights: it shows {target!r} as that was before vLLM "
                    "packed it, and cannot be filled by itself; start the engine anew with this checkpoint, and please "
                    "report this"
                )
            self.tensors[name] = shown


def _copies(plan: LoadPlan, aliases: Mapping[str, torch.Tensor]) -> ReloadPlan:
    """Copies into these tensors: those into what they show."""
    shown: dict[str, list[str]] = {}
    for name in aliases:
        shown.setdefault(plan.aliases[name], []).append(name)
    pieces = {
        source: tuple(
            msgspec.structs.replace(piece, target=name) for piece in pieces for name in shown.get(piece.target, ())
        )
        for source, pieces in plan.reload.pieces.items()
    }
    return replace(plan.reload, pieces=pieces, fills={})


def _held(modules: Mapping[str, torch.nn.Module], name: str) -> torch.Tensor | None:
    prefix, _, own = name.rpartition(".")
    return cast("torch.Tensor | None", getattr(modules.get(prefix), own, None))


def _is_one_memory(shown: torch.Tensor, whole: torch.Tensor | None) -> bool:
    return whole is not None and shown.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
