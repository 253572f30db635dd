"""The sink of an engine: the life of an update is kept here, once; an engine's own sink fills in five hooks."""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Generator
from contextlib import AbstractContextManager
from typing import ClassVar

import msgspec

from checkpoint_engine.contract.delivery import names_of, nbytes_of
from checkpoint_engine.contract.figures import ComparisonFigures, Figures, UpdateFigures
from checkpoint_engine.contract.lifecycle import Lifecycle, WeightsState
from checkpoint_engine.contract.sink import Tensors, Update
from checkpoint_engine.errors import CheckpointStateError, WeightsRejectedError

__all__ = ["ComparisonSink", "EngineSink"]

_STEPS: tuple[str, ...] = ("check", "load", "finish")


class EngineSink(ABC):
    """A `WeightSink` for one worker, which lives as long as the worker."""

    takes_parts: ClassVar[bool] = False
    """Whether it knows what to do with an update that is `partial`; else it is given none."""

    def __init__(self) -> None:
        """Begins with whole weights of an unknown version."""
        self.life = Lifecycle()
        """What the worker holds."""
        self.nbytes = 0
        """Bytes of the tensors that were taken over."""
        self._open = False
        self._at_rest = False
        self._seconds = dict.fromkeys(_STEPS, 0.0)

    # -- what an engine fills in

    @abstractmethod
    def check(self, update: Update) -> None:
        """Refuses what would not fit, before anything has changed; nothing is restored afterwards."""

    @abstractmethod
    def open(self, update: Update) -> None:
        """Makes the models ready; if this or anything after it fails, `restore` is called."""

    @abstractmethod
    def take(self, tensors: Tensors) -> None:
        """Takes tensors over; their memory is used again once the current stream has run dry."""

    @abstractmethod
    def complete(self, update: Update) -> Figures:
        """Completes the models; everything that was announced has come."""

    @abstractmethod
    def restore(self) -> bool:
        """Gives up what is open, and whatever was learned of it; returns whether all weights are the old ones.

        What was learned may stay where the update was `interrupted`, and nothing but copies of a plan was done.
        """

    def running(self) -> AbstractContextManager[object]:
        """What every hook runs in."""
        return contextlib.nullcontext()

    # -- what it holds

    @property
    def version(self) -> str:
        """Of the weights held, as far as they came through here."""
        return self.life.version

    @property
    def dirty(self) -> bool:
        """Whether the weights may be a mixture of old and new."""
        return self.life.dirty

    @property
    def interrupted(self) -> bool:
        """Whether an update that is given up was broken off from outside: no hook of it failed or began to complete."""
        return self._at_rest

    @property
    def state(self) -> WeightsState:
        """How far it is."""
        return self.life.state

    # -- the protocol

    def begin(self, update: Update) -> None:
        """Checks what was announced, then makes the models ready for it.

        Raises:
            WeightsRejectedError: the update does not fit; nothing has changed.
            CheckpointStateError: another update is under way, or the weights are a mixture, which a part cannot heal.
        """
        if update.partial:
            self._check_takes_parts()
        self.life.begin(update)
        self.nbytes, self._open, self._at_rest, self._seconds = 0, False, False, dict.fromkeys(_STEPS, 0.0)
        with self.running():
            try:
                with self._timed("check"):
                    self.check(update)
                    _check_brings_something(update)
            except BaseException:
                self.life.refuse()
                raise
            self._open = True
            self.open(update)
        self._at_rest = True

    def load(self, tensors: Tensors) -> None:
        """Takes tensors over.

        Raises:
            WeightsRejectedError: the engine does not know a tensor, or not in this shape.
            CheckpointStateError: no update is under way.
        """
        self.life.load()
        self._at_rest = False
        with self._timed("load"), self.running():
            self.take(tensors)
        self._at_rest = True
        self.life.deliver(names_of(tensors))
        self.nbytes += nbytes_of(tensors)

    def finish(self) -> Figures:
        """Checks that everything came, and completes the models.

        Raises:
            WeightsRejectedError: tensors are missing.
            CheckpointStateError: no update is under way.
        """
        update = self.life.check_complete()
        tensors, self._at_rest = len(self.life.delivered), False
        with self._timed("finish"), self.running():
            figures = self.complete(update)
        self.life.finish()
        if not isinstance(figures, UpdateFigures):
            return figures
        seconds = {f"{step}_seconds": round(self._seconds[step], 6) for step in _STEPS}
        return msgspec.structs.replace(figures, tensors=tensors, partial=int(update.partial), **seconds)

    def abort(self) -> bool:
        """Gives the update up, wherever it is; returns whether the weights are whole.

        After `finish`, it says that nobody knows whether the device did all that it was told.
        """
        if not self._open:
            return not self.dirty
        self._open, finished, intact = False, not self.life.under_way, False
        try:
            with self.running():
                intact = self.restore()
        finally:
            if intact and not finished:
                self.life.restore()
            else:
                self.life.spoil()
        return not self.dirty

    def _check_takes_parts(self) -> None:
        if not self.takes_parts:
            raise WeightsRejectedError(f"{type(self).__name__} takes whole checkpoints, not some tensors of one")
        if self.dirty:
            raise CheckpointStateError(
                "the weights may be a mixture of old and new, which some tensors alone cannot heal: bring a whole "
                "checkpoint"
            )

    @contextlib.contextmanager
    def _timed(self, step: str) -> Generator[None]:
        start = time.perf_counter()
        yield
        self._seconds[step] += time.perf_counter() - start


def _check_brings_something(update: Update) -> None:
    if not update.tensors and not update.open_ended:
        raise WeightsRejectedError("the update brings no tensors at all; is the checkpoint empty?")


class ComparisonSink(EngineSink):
    """Takes tensors as an update would, and compares; made anew for each comparison. See `Verifiable`."""

    def __init__(self, engine: EngineSink) -> None:
        """Makes one; `engine` is the sink of the worker that is looked at."""
        super().__init__()
        self._engine = engine

    @abstractmethod
    def complete(self, update: Update) -> ComparisonFigures:
        """Compares what is left, and tells what was found."""

    def abort(self) -> bool:
        """Ends the comparison; the engine holds what it held, unless that cannot be put back."""
        try:
            super().abort()
        except BaseException:
            self._engine.life.spoil()
            raise
        return not self._engine.dirty
