"""What a trainer sends by several of vLLM's calls, brought to a worker's sink as one update.

vLLM's start does not say what will come. What the last complete update brought is what the next one is checked against
and planned for; the first goes by vLLM's loader, unless its first call brings everything.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Mapping

from checkpoint_engine.sdk import CheckpointStateError, Tensors, TensorSpec, Update, WeightsRejectedError, listed
from checkpoint_engine_vllm.extension import WorkerState

__all__ = ["IncomingUpdate"]

logger = logging.getLogger(f"vllm.{__name__}")

_Specs = Mapping[str, TensorSpec]


class IncomingUpdate:
    """The updates of one worker that come in so, one after the other."""

    def __init__(self, state: WorkerState, door: str, abandon: Callable[[], None]) -> None:
        """`abandon` is called when somebody asks the worker to give up what is under way."""
        self._state = state
        self._abandon = abandon
        self._sink = state.sink
        self._door = door
        self._expected: dict[str, TensorSpec] = {}
        """What the last complete update brought."""
        self._arrived: dict[str, TensorSpec] = {}
        self._open = False
        self._open_ended = False
        self._count = 0

    @property
    def is_open(self) -> bool:
        """Whether the sink has begun an update that is not complete."""
        return self._open

    def start(self) -> None:
        """An update is about to come.

        Raises:
            CheckpointStateError: the worker is taking one that comes another way.
        """
        self._state.claim(self._door, self._abandon)
        self._arrived = {}

    def load(self, specs: _Specs, tensors: Tensors) -> None:
        """Takes tensors over, and begins with the first.

        Raises:
            WeightsRejectedError: they do not fit, or are not those that were announced.
        """
        twice = [name for name in specs if name in self._arrived]
        if twice:
            raise WeightsRejectedError(f"{listed(twice)} came twice in one update; do two trainers send at once?")
        if not self._open:
            self.begin(specs)
        if not self._open_ended:
            expected = self._expected
            strange = [name for name, spec in specs.items() if not _same(expected.get(name), spec)]
            if strange:
                raise WeightsRejectedError(
                    f"{listed(strange)} did not come in the last update, or not in this form; the next one is taken by "
                    "vLLM's loader, whatever it brings"
                )
        self._arrived.update(specs)
        self._sink.load(tensors)

    def begin(self, first: _Specs) -> None:
        """Checks and plans, if it is known what comes.

        Raises:
            WeightsRejectedError: what came last time, or all that comes now, does not fit.
        """
        known = self._expected if _brings(first, self._expected) else dict(first)
        try:
            self._begin(known)
        except WeightsRejectedError as error:
            if self._expected:
                self._expected = {}
                raise
            logger.info("what comes is not known yet, so vLLM's loader takes it: %s", error)
            self._begin({})
        self._expected = known

    def check_complete(self) -> None:
        """Whether all has come that was announced.

        Raises:
            WeightsRejectedError: something has not.
            CheckpointStateError: nothing came at all.
        """
        if not self._open:
            raise CheckpointStateError("this weight update brought nothing: update_weights was not called")
        self._sink.life.check_complete()

    def finish(self) -> None:
        """Completes the models."""
        figures = self._sink.finish()
        self._open, self._expected = False, dict(self._arrived)
        self._state.succeeded(figures)

    def give_up(self, error: Exception | None = None) -> None:
        """Ends the update wherever it is; forgets what was expected, so that the next may bring anything."""
        if self._open:
            self._open, self._expected = False, {}
            self._sink.abort()
        self._state.release(error)

    def _begin(self, tensors: _Specs) -> None:
        self._count += 1
        self._open_ended = not tensors
        name, version = uuid.uuid4().hex[:16], f"{self._door} {self._count}"
        update = Update(name, self._door, version, tensors, open_ended=self._open_ended)
        try:
            self._sink.begin(update)
        except BaseException:
            if self._sink.life.under_way:  # it was not refused: something was made ready before it failed
                self._sink.abort()
            raise
        self._open = True


def _brings(first: _Specs, expected: _Specs) -> bool:
    """Whether an update that begins so may be the expected one."""
    return bool(expected) and all(expected.get(name) == spec for name, spec in first.items())


def _same(expected: TensorSpec | None, spec: TensorSpec) -> bool:
    return expected is spec or expected == spec
