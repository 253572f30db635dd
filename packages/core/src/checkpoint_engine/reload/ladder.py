"""How far the plan of one model has come, and what the next update therefore does with it.

The first update goes by the engine's own loader, and every piece of the plan is compared with what that did; the second
by the plan, and is compared as well; from then on the plan alone does it. Where another process has proved the very
same plan, the second comes first. Whatever fails, or rests on something that has changed since, begins anew; what was
only interrupted goes back to the second.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

from checkpoint_engine.contract.findings import listed
from checkpoint_engine.contract.modes import ReloadMode
from checkpoint_engine.contract.sink import TensorSpec
from checkpoint_engine.errors import WeightsRejectedError, WorkerError
from checkpoint_engine.reload.kept_proofs import KeptProofs
from checkpoint_engine.reload.plan import ReloadPlan
from checkpoint_engine.reload.proof import Proof

__all__ = ["Ladder", "PlanStage", "PlannedLayers", "Rung"]

_MOST_REASONS = 8
"""Repeated in a report."""


class PlanStage(enum.IntEnum):
    """How far a plan has come."""

    RECORDED = 0
    """The loader has run without data."""
    PROVED = 1
    """An update by the loader put every piece where the plan says."""
    CHECKED = 2
    """An update by plan was compared as well."""


class Rung(enum.Enum):
    """What an update does with a plan."""

    LOADER = "loader"
    """Nothing: the engine's own loader takes everything over."""
    PROOF = "proof"
    """The loader takes everything over, and every piece is compared with the plan."""
    CHECK = "check"
    """The plan takes over what it covers, and every piece is compared."""
    PLAN = "plan"
    """The plan takes over what it covers."""

    @property
    def by_plan(self) -> bool:
        """Whether copies take the place of the loader."""
        return self in (Rung.CHECK, Rung.PLAN)

    @property
    def word(self) -> str:
        """For the figures of an update: `loader`, `proof` or `plan`."""
        return "plan" if self.by_plan else self.value


class PlannedLayers(Protocol):
    """A model as a plan sees it: layers, or whatever its engine cuts it into."""

    @property
    def plan(self) -> ReloadPlan:
        """The copies that its loader comes down to."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        ...

    @property
    def obstacle(self) -> str:
        """Why the plan cannot be used at all; empty if it can."""
        ...

    @property
    def targets(self) -> Collection[str]:
        """What copies fill; a model without any is all the loader's."""
        ...

    def left_to_loader(self) -> Mapping[str, str]:
        """What only the engine's own loader can fill, by a name that people know, and why."""
        ...

    def leave(self, differing: Mapping[str, str]) -> None:
        """Leaves these to the loader, which put something else into them than the tensors named."""
        ...


_Layers = TypeVar("_Layers", bound=PlannedLayers)


@dataclass
class _Climb(Generic[_Layers]):
    """What was learned of a model, as long as `key` holds."""

    key: object
    layers: _Layers
    tensors: Mapping[str, TensorSpec]
    stage: PlanStage = PlanStage.RECORDED
    proved_elsewhere: bool = False
    proved_here: bool = False
    """Whether this process has seen its loader do what the plan says."""


class Ladder(Generic[_Layers]):
    """Of one model of a worker; lives as long as that."""

    def __init__(self, loader: str, model: str, kept: Callable[[], KeptProofs | None] | None = None) -> None:
        """Begins at the bottom.

        Args:
            loader: What to call the engine's own loader in messages, such as "vLLM's loader".
            model: What to call the model, such as "served".
            kept: What other processes have proved, asked when a plan is recorded; None, or an answer of None, if that
                does not count.
        """
        self._loader = loader
        self._model = model
        self._ask_kept = kept
        self._kept: KeptProofs | None = None
        """Where the proof of this plan goes; None where it would not be true of all of it."""
        self._trusting = True
        """Whether what others have proved counts: until an update of this process breaks off."""
        self._climb: _Climb[_Layers] | None = None
        self.rung = Rung.LOADER
        """What the update under way does."""
        self.proof: Proof | None = None
        """What compares it, where that is still needed."""
        self.reason = ""
        """Why (some of) the update under way is left to the loader, for people."""

    @property
    def layers(self) -> _Layers | None:
        """What is known of the model."""
        return None if self._climb is None else self._climb.layers

    @property
    def stage(self) -> PlanStage:
        """How far its plan has come."""
        return PlanStage.RECORDED if self._climb is None else self._climb.stage

    def layers_for(
        self, key: object, record: Callable[[], _Layers], tensors: Mapping[str, TensorSpec] | None = None
    ) -> _Layers:
        """What is known of the model, or is found out now if `key`, all that a plan rests on, has changed.

        `tensors` are what comes; without them a proof is neither kept for others nor taken from them.
        """
        if self._climb is None or self._climb.key != key:
            self._climb = self._kept = None  # nothing old stays if this raises
            self._climb = _Climb(key, record(), tensors or {})
            if tensors and self._ask_kept is not None:
                self._kept = self._ask_kept()
                if self._trusting and self._kept is not None and self._is_proved(self._kept, self._climb):
                    self._climb.stage, self._climb.proved_elsewhere = PlanStage.PROVED, True
        return self._climb.layers

    def digest_of(self, layers: _Layers) -> str:
        """What a proof of this model is kept under; empty where it would say nothing to another process."""
        return layers.plan.digest

    def recall(self, layers: _Layers, is_proved: Callable[[str], bool]) -> bool:
        """Whether another process has proved this, of which `is_proved` tells by digests."""
        return is_proved(self.digest_of(layers))

    @property
    def proved_elsewhere(self) -> bool:
        """Whether another process has proved the plan, and this one has not used it yet."""
        return self._climb is not None and self._climb.proved_elsewhere

    def distrust(self) -> None:
        """Has the plan proved by an update of this process, whatever another one has found."""
        if self._climb is not None:
            self._climb.stage, self._climb.proved_elsewhere = PlanStage.RECORDED, False

    def begin(self, mode: ReloadMode, layers: _Layers | None, *, obstacle: str = "", compared: bool = False) -> Rung:
        """Begins an update.

        Args:
            mode: How it is to be taken over.
            layers: As `layers_for` gave them; None if the model has no plan.
            obstacle: Why it has none.
            compared: Whether what copies bring is compared although they are trusted.

        Raises:
            WeightsRejectedError: nothing but the plan may be used, and it does not cover everything.
        """
        self.rung, self.proof, self.reason = Rung.LOADER, None, ""
        if mode == "loader":
            return self.rung
        if layers is None or layers.obstacle:
            self.reason = obstacle if layers is None else layers.obstacle
            self._refuse_without(mode, self.reason)
            return self.rung
        left = layers.left_to_loader()
        for name, why in left.items():
            self._refuse_without(mode, f"{name!r} of the {self._model} model: {why}")
        self.reason = "; ".join(f"{name}: {why}" for name, why in list(left.items())[:_MOST_REASONS])
        if not layers.targets:
            return self.rung
        self.rung = (Rung.PROOF, Rung.CHECK, Rung.PLAN)[self.stage]
        if compared and self.rung is Rung.PLAN:
            self.rung = Rung.CHECK
        if self.rung is Rung.PROOF:
            self.reason = "the first update proves the plan"
        if self.rung is not Rung.PLAN:
            self.proof = Proof(layers.plan, layers.device)
        return self.rung

    def judge(self, differing: Mapping[str, str]) -> None:
        """Takes in what the proof found: targets that hold something else than planned, and the tensor of each.

        What the loader put elsewhere stays with the loader, and the report says so.

        Raises:
            WorkerError: the plan did it.
        """
        if differing and self.rung.by_plan:
            target, source = next(iter(differing.items()))
            self._tell_others(KeptProofs.forget)
            raise WorkerError(
                f"the reload plan put something else than tensor {source!r} into {target!r} of the {self._model} model "
                f"({len(differing)} differ in their checksums); the next update goes through {self._loader}. Please "
                "report this"
            )
        if differing and self._climb is not None:
            self._kept = None  # what is left of the plan holds here
            self._climb.layers.leave(differing)
            names = listed([f"{target} (of {source})" for target, source in differing.items()])
            self.add_reason(f"{self._loader} put something else than planned into {names}, which stays with it")

    def add_reason(self, why: str) -> None:
        """Says something more of what is left to the loader."""
        self.reason = "; ".join(filter(None, (self.reason, why)))

    def succeeded(self) -> None:
        """The update is complete, and was judged if it was compared."""
        climb = self._climb
        if climb is not None and self.proof is not None:
            climb.stage, climb.proved_elsewhere = PlanStage(min(climb.stage + 1, PlanStage.CHECKED)), False
            if self.rung is Rung.PROOF:
                climb.proved_here = True
                self._tell_others(KeptProofs.keep)
        self.proof = None

    def failed(self) -> None:
        """The update broke off: whatever was learned of this model is learned anew, by this process itself."""
        self._climb, self.proof, self._trusting = None, None, False

    def interrupted(self) -> None:
        """The update was broken off between two buckets, and had only done copies of the plan, into fixed places.

        So what is held differs from a whole model in nothing but parameters that every update by this plan writes to
        the last element. It stays, and the next update by it is compared.
        """
        if self._climb is None or not self.rung.by_plan or not self._climb.proved_here:
            self.failed()
            return
        self._climb.stage, self.proof = PlanStage.PROVED, None

    def _is_proved(self, kept: KeptProofs, climb: _Climb[_Layers]) -> bool:
        return self.recall(climb.layers, lambda digest: kept.has(digest, climb.tensors))

    def _tell_others(self, tell: Callable[[KeptProofs, str, Mapping[str, TensorSpec]], None]) -> None:
        if self._kept is not None and self._climb is not None:
            digest = self.digest_of(self._climb.layers)
            if digest:
                tell(self._kept, digest, self._climb.tensors)

    def _refuse_without(self, mode: ReloadMode, why: str) -> None:
        if mode == "plan":
            raise WeightsRejectedError(
                f"reload by plan was asked for and is not possible ({why}); use --reload auto, which leaves the rest "
                f"to {self._loader}"
            )
