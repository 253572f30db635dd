"""The draft model of speculative decoding, fed from the same stream as the served model.

The draft model shares modules with the served model (MTP and EAGLE: embedding and output layer). Both reloads are open
at once; a tensor that goes only into shared modules is left to the served model's reload. Where a draft model must get
its tensors in one call, or where it is unknown which it needs, they are kept in host memory until the end.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from checkpoint_engine.sdk import ReloadMode, Tensors, TensorSpec, WeightsRejectedError
from checkpoint_engine_vllm import compat
from checkpoint_engine_vllm.loadplan import Find, LoadPlan, Planner, missing_parameters
from checkpoint_engine_vllm.plans import AnyReload, LayersLadder, open_reload
from checkpoint_engine_vllm.protocols import ModelConfig, Worker
from checkpoint_engine_vllm.repairs import Repairs

__all__ = ["NAME", "PREFIX", "DraftReload", "open_draft"]

NAME = "draft"
"""Of the draft model, among a worker's plans."""

PREFIX = "draft_model."
"""Tensors whose names begin so are the draft model's alone; it gets them without the prefix."""


def open_draft(
    worker: Worker, tensors: Mapping[str, TensorSpec], planner: Planner, ladder: LayersLadder, mode: ReloadMode
) -> DraftReload | None:
    """The draft model's part in an update; None if there is no draft model, or the update has nothing for it.

    Raises:
        WeightsRejectedError: the update has tensors for a draft model that does not take them.
    """
    own = {name.removeprefix(PREFIX): spec for name, spec in tensors.items() if name.startswith(PREFIX)}
    model = compat.draft_model(worker)
    if model is None:
        if own:
            first = PREFIX + next(iter(own))
            raise WeightsRejectedError(f"tensor {first!r} is for a draft model, but this engine has none")
        return None
    model_config = compat.draft_model_config(worker)
    if model_config is None or not (own or compat.draft_shares_checkpoint(worker)):
        return None
    plan = planner.plan(NAME, compat.draft_config(worker), model_config, own or tensors, model)
    return DraftReload(worker, model, model_config, plan, ladder, mode, prefixed=bool(own))


class DraftReload:
    """The reload of the draft model, next to that of the served model."""

    def __init__(
        self,
        worker: Worker,
        model: torch.nn.Module,
        model_config: ModelConfig,
        plan: LoadPlan | None,
        ladder: LayersLadder,
        mode: ReloadMode,
        *,
        prefixed: bool,
    ) -> None:
        self._model_config = model_config
        self._is_quantised = compat.draft_config(worker).quant_config is not None
        self._prefixed = prefixed
        self._model = model
        self._shared = frozenset(compat.target_model(worker).modules())
        self._plan = plan
        self._needed = None if plan is None else self._needs(plan)
        self._ladder = ladder
        self._mode: ReloadMode = mode
        self._at_once = self._needed is None or not compat.can_load_mtp_in_buckets()
        self._held_back: list[tuple[str, torch.Tensor]] = []
        self._reload: AnyReload | None = None
        self._repairs = Repairs()
        self.tensors = 0
        """How many tensors the draft model got."""

    @property
    def cloned_bytes(self) -> int:
        """Bytes that were copied because they are needed for longer than their bucket lives."""
        kept = sum(tensor.nbytes for _, tensor in self._held_back)
        return kept + (0 if self._reload is None else self._reload.cloned_bytes)

    @property
    def needed(self) -> frozenset[str]:
        """Tensors for what is the draft model's own; all that were announced for it where that is not known."""
        return frozenset((self._model.__class__.__name__,)) if self._needed is None else self._needed

    def only(self, name: str) -> bool:
        """Whether a tensor is the draft model's alone."""
        return self._prefixed and name.startswith(PREFIX)

    def others(self, tensors: Tensors) -> Tensors:
        """Those that are not the draft model's alone."""
        return [pair for pair in tensors if not self.only(pair[0])] if self._prefixed else tensors

    def begin(self, repairs: Repairs) -> None:
        """Called after the served model's reload has begun."""
        self._repairs = repairs
        if not self._at_once:
            self._open()

    def load(self, tensors: Tensors) -> None:
        """Takes what the draft model needs of these."""
        mine = [
            (name.removeprefix(PREFIX), tensor) for name, tensor in tensors if not self._prefixed or self.only(name)
        ]
        mine = [(name, tensor) for name, tensor in mine if self._needed is None or name in self._needed]
        self.tensors += len(mine)
        if self._reload is not None:
            self._reload.load(mine)
        else:
            self._held_back.extend((name, tensor.to("cpu", copy=True)) for name, tensor in mine)

    def sources(self) -> Mapping[str, Collection[str]]:
        """What comes into each of its parameters and buffers, as far as that is known."""
        return {} if self._plan is None else self._plan.reload.recording.origins

    def missing(self, find: Find) -> list[str]:
        """Parameters of the draft model's own that the update would leave without weights, as planned."""
        if self._plan is None:
            return []
        quantised, shared = self._is_quantised, self._shared
        found = missing_parameters(self._plan, self._model, quantised=quantised, shared=shared, find=find)
        return [f"{name} of the draft model" for name in found]

    def incomplete(self) -> list[str]:
        """The same, as far as vLLM's own book-keeping shows; asked before the served model finishes."""
        if self._reload is None or self._plan is not None:
            return []
        return [f"{name} of the draft model" for name in self._reload.incomplete()]

    def finish(self) -> None:
        """Called after the served model has finished.

        Raises:
            WeightsRejectedError: the draft model does not take what was kept for it.
        """
        reload = self._reload
        if reload is None:
            reload = self._open()
            reload.load(self._held_back)
        reload.finish()

    def abort(self) -> bool:
        """Gives the reload up; returns whether the draft model holds its old weights."""
        return self._reload is None or self._reload.abort()

    def _open(self) -> AnyReload:
        self._reload = open_reload(
            self._ladder, self._mode, self._plan, self._model, self._model_config, self._repairs, self._shared
        )
        self._reload.begin()
        return self._reload

    def _needs(self, plan: LoadPlan) -> frozenset[str]:
        """Tensors that go into modules of the draft model's own."""
        return frozenset(
            tensor
            for prefix, module in compat.modules_by_name(self._model).items()
            if module not in self._shared
            for name, _ in module.named_parameters(recurse=False)
            for tensor in plan.reload.recording.origins.get(f"{prefix}.{name}".lstrip("."), ())
        )
