"""Loads an engine by plan where its parameters are just what its loader copies; engines that repack need more."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from checkpoint_engine.contract.delivery import names_of, nbytes_of
from checkpoint_engine.contract.figures import UpdateFigures
from checkpoint_engine.contract.modes import ReloadMode
from checkpoint_engine.contract.sink import Tensors, TensorSpec
from checkpoint_engine.reload.kept_proofs import KeptProofs
from checkpoint_engine.reload.ladder import Ladder
from checkpoint_engine.reload.plan import ReloadPlan, make_plan
from checkpoint_engine.reload.recorder import Loader, record
from checkpoint_engine.reload.replay import Replay

__all__ = ["Reloader"]


class _PlainParameters:
    """`PlannedLayers` of a model whose parameters stay where they are and as its loader fills them."""

    obstacle = ""

    def __init__(self, plan: ReloadPlan, parameters: Mapping[str, torch.Tensor]) -> None:
        self.plan = plan
        self.device = next(iter(parameters.values())).device
        self._parameters = parameters
        self._wrong: dict[str, str] = {}
        self.targets: set[str] = set()
        self.tensors: set[str] = set()
        """Those that need no loader."""
        self._settle()

    def left_to_loader(self) -> Mapping[str, str]:
        """Tensors and parameters."""
        return {**self.plan.loader_only, **self.plan.flaws, **self._wrong}

    def leave(self, differing: Mapping[str, str]) -> None:
        """Leaves these parameters, and whatever shares a tensor with them, to the loader."""
        for target, source in differing.items():
            self._wrong[target] = f"its loader put something else than {source!r} into it"
        self._settle()

    def _settle(self) -> None:
        self.targets, self.tensors = self.plan.covered(self.plan.targets - self.plan.flaws.keys() - self._wrong.keys())
        self.replay = Replay(self.plan, {target: self._parameters[target] for target in self.targets})


class Reloader:
    """Takes updates for one model: the first by its loader, which proves the plan, and then by plan."""

    def __init__(
        self,
        load: Callable[[Tensors], object],
        parameters: Mapping[str, torch.Tensor],
        meta_model: Callable[[], tuple[Loader, Mapping[str, torch.Tensor]]],
        kept: KeptProofs | None = None,
    ) -> None:
        """Remembers how to load.

        Args:
            load: The engine's own loader.
            parameters: By name; they stay where they are.
            meta_model: Makes a second model without data: its loader and its parameters.
            kept: Proofs of other processes, and for them; None where there shall be none.
        """
        self._load = load
        self._parameters = parameters
        self._meta_model = meta_model
        self._ladder: Ladder[_PlainParameters] = Ladder("the engine's loader", "served", kept and (lambda: kept))
        self._layers: _PlainParameters | None = None
        """What copies fill in this update; None if it goes by the loader."""
        self._nbytes = {True: 0, False: 0}
        """Bytes that came by plan, and by the loader."""
        self._read = 0

    def begin(self, tensors: Mapping[str, TensorSpec], mode: ReloadMode, *, compared: bool = False) -> None:
        """Starts an update; `compared` as in `Update`.

        Raises:
            WeightsRejectedError: nothing but the plan may be used, and it does not cover everything.
        """
        self._nbytes, self._read = {True: 0, False: 0}, 0
        layers = None
        if mode != "loader":
            layers = self._ladder.layers_for(dict(tensors), lambda: self._record(tensors), tensors)
        rung = self._ladder.begin(mode, layers, compared=compared)
        self._layers = layers if rung.by_plan else None

    def wanted(self, bucket: Sequence[tuple[str, int]]) -> tuple[tuple[int, int], ...] | None:
        """See `Selective`."""
        layers = self._layers
        if layers is None or self._ladder.proof is not None or not all(name in layers.tensors for name, _ in bucket):
            return None
        return layers.replay.spans(bucket)

    def load(self, tensors: Tensors) -> None:
        """Loads a bucket."""
        ladder, layers, by_loader = self._ladder, self._layers, tensors
        if ladder.proof is not None and ladder.layers is not None:
            ladder.proof.expect(tensors, ladder.layers.targets)
        if layers is not None:
            self._read += layers.replay.load(tensors, {})
            by_loader = _left(tensors, layers.tensors)
        if by_loader:
            self._load(by_loader)
        loaded = nbytes_of(by_loader)
        self._nbytes[False] += loaded
        self._nbytes[True] += nbytes_of(tensors) - loaded

    def finish(self) -> UpdateFigures:
        """Ends the update; returns how many bytes took which way.

        Raises:
            WorkerError: the copies did not arrive as planned.
        """
        ladder, layers = self._ladder, self._ladder.layers
        if self._layers is not None:
            self._layers.replay.fill_fixed()
        if ladder.proof is not None and layers is not None:
            for target in layers.targets:
                ladder.proof.find(target, self._parameters[target])
            ladder.judge(ladder.proof.differing(layers.targets))
        ladder.succeeded()
        return UpdateFigures(
            reload=ladder.rung.word,
            plan_bytes=self._nbytes[True],
            read_bytes=self._read,
            loader_bytes=self._nbytes[False],
            loader_reason=ladder.reason,
        )

    def failed(self, *, interrupted: bool = False) -> None:
        """The update broke off: the plan is recorded and proved anew, unless only its copies had been done.

        Args:
            interrupted: Whether it was broken off between two calls of `load`, see `EngineSink.interrupted`.
        """
        self._layers = None
        if interrupted and not self._nbytes[False]:
            self._ladder.interrupted()
        else:
            self._ladder.failed()

    def _record(self, tensors: Mapping[str, TensorSpec]) -> _PlainParameters:
        load, targets = self._meta_model()
        return _PlainParameters(make_plan(record(load, targets, tensors), targets), self._parameters)


def _left(tensors: Tensors, planned: set[str]) -> Tensors:
    if planned.issuperset(names_of(tensors)):
        return ()
    return [pair for pair in tensors if pair[0] not in planned]
