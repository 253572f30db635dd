"""Loads an engine by plan where its parameters are just what its loader copies; engines that repack need more."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence

import torch

from checkpoint_engine.engine.adapter import TensorSpec
from checkpoint_engine.errors import WeightsRejectedError, WorkerError
from checkpoint_engine.link.messages import ReloadMode
from checkpoint_engine.reload.delivery import names_of, nbytes_of
from checkpoint_engine.reload.plan import ReloadPlan, make_plan
from checkpoint_engine.reload.proof import Proof
from checkpoint_engine.reload.recorder import Loader, record
from checkpoint_engine.reload.replay import Replay

Tensors = Sequence[tuple[str, torch.Tensor]]


class Trust(enum.IntEnum):
    """How far a plan has come."""

    RECORDED = 0
    """The loader has run without data."""
    PROVED = 1
    """An update by the loader put every piece where the plan says."""
    CHECKED = 2
    """An update by plan was compared as well."""


class Reloader:
    """Takes updates for one model: the first by its loader, which proves the plan, and then by plan."""

    def __init__(
        self,
        load: Callable[[Tensors], object],
        parameters: Mapping[str, torch.Tensor],
        shadow: Callable[[], tuple[Loader, Mapping[str, torch.Tensor]]],
    ) -> None:
        """Remembers how to load.

        Args:
            load: The engine's own loader.
            parameters: By name; they stay where they are.
            shadow: Makes a second model without data: its loader and its parameters.
        """
        self._load = load
        self._parameters = parameters
        self._shadow = shadow
        self._tensors: dict[str, TensorSpec] = {}
        self._trust = Trust.RECORDED
        self._plan: ReloadPlan | None = None
        self._replay: Replay | None = None
        self._planned: set[str] = set()
        """Tensors that need no loader."""
        self._targets: set[str] = set()
        self._proof: Proof | None = None
        self._by_plan = False
        self._nbytes = {True: 0, False: 0}
        """Bytes that came by plan, and by the loader."""

    def begin(self, tensors: Mapping[str, TensorSpec], mode: ReloadMode) -> None:
        """Starts an update.

        Raises:
            WeightsRejectedError: nothing but the plan may be used, and it does not cover everything.
        """
        self._nbytes = {True: 0, False: 0}
        self._proof, self._by_plan = None, False
        if mode == "loader":
            return
        plan = self._plan_for(tensors)
        if mode == "plan" and (plan.flaws or plan.loader_only):
            flaws = {**plan.loader_only, **plan.flaws}
            name, reason = next(iter(flaws.items()))
            raise WeightsRejectedError(
                f"reload by plan was asked for and does not reach {name!r} ({reason}); use --reload auto"
            )
        self._by_plan = self._trust > Trust.RECORDED
        self._proof = Proof(plan, next(iter(self._parameters.values())).device) if self._trust < Trust.CHECKED else None

    def wanted(self, bucket: Sequence[tuple[str, int]]) -> tuple[tuple[int, int], ...] | None:
        """See `Selective`."""
        by_plan = self._by_plan and self._proof is None and all(name in self._planned for name, _ in bucket)
        return self._replay.spans(bucket) if by_plan and self._replay is not None else None

    def load(self, tensors: Tensors) -> None:
        """Loads a bucket."""
        if self._proof is not None:
            self._proof.expect(tensors, self._targets)
        by_loader = tensors
        if self._by_plan and self._replay is not None:
            self._replay.load(tensors, {})
            by_loader = self._left_to_loader(tensors)
        if by_loader:
            self._load(by_loader)
        loaded = nbytes_of(by_loader)
        self._nbytes[False] += loaded
        self._nbytes[True] += nbytes_of(tensors) - loaded

    def finish(self) -> Mapping[str, str | int | float]:
        """Ends the update; returns how many bytes took which way.

        Raises:
            WorkerError: the copies did not arrive as planned.
        """
        if self._by_plan and self._replay is not None:
            self._replay.fill_fixed()
        if self._proof is not None:
            for target in self._targets:
                self._proof.find(target, self._parameters[target])
            wrong = self._proof.differing(self._targets)
            if wrong and self._by_plan:
                target, source = next(iter(wrong.items()))
                raise WorkerError(f"the reload plan put something else than tensor {source!r} into {target!r}")
            # What the loader put elsewhere stays with the loader.
            self._use(self._targets - wrong.keys())
            self._trust = Trust(self._trust + 1)
        way = "plan" if self._by_plan else "proof" if self._proof is not None else "loader"
        return {"reload": way, "plan_bytes": self._nbytes[True], "loader_bytes": self._nbytes[False]}

    def failed(self) -> None:
        """The update broke off: the plan is recorded and proved anew."""
        self._plan, self._tensors = None, {}

    def _left_to_loader(self, tensors: Tensors) -> Tensors:
        if self._planned.issuperset(names_of(tensors)):
            return ()
        return [pair for pair in tensors if pair[0] not in self._planned]

    def _plan_for(self, tensors: Mapping[str, TensorSpec]) -> ReloadPlan:
        if self._plan is None or self._tensors != tensors:
            load, targets = self._shadow()
            self._plan, self._tensors = make_plan(record(load, targets, tensors), targets), dict(tensors)
            self._trust = Trust.RECORDED
            self._use(self._plan.targets - self._plan.flaws.keys())
        return self._plan

    def _use(self, targets: set[str]) -> None:
        """Plans as many of these targets as possible: whatever shares a tensor with the loader's is the loader's."""
        if self._plan is not None:
            self._targets, self._planned = self._plan.covered(targets)
            self._replay = Replay(self._plan, {target: self._parameters[target] for target in self._targets})
