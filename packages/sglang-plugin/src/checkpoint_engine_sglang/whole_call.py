"""One call of a loader, as at a start, over tensors that come bucket by bucket.

Some of SGLang's loaders tie or check at the end of each call, and do the wrong thing when they see only a part.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager

import torch

from checkpoint_engine.sdk import WorkerError, limits

__all__ = ["WholeCall"]

_SECONDS = limits.UPDATE
"""For what a loader does with one tensor, or once it has all."""

_Pair = tuple[str, torch.Tensor]
_Pairs = Iterator[_Pair]


class _GivenUpError(Exception):
    """There will be no more tensors: the update broke off."""


class WholeCall:
    """The call runs in a thread of its own, and goes on by one tensor at a time."""

    def __init__(self, load: Callable[[_Pairs], object], device: torch.device) -> None:
        """Begins it; `load` gets copies, which live for as long as it holds them."""
        self._asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
        """Whether it wants another tensor; false once it has ended."""
        self._given: queue.SimpleQueue[_Pair | Exception | None] = queue.SimpleQueue()
        self._error: Exception | None = None
        self._ended = False
        self._thread = threading.Thread(
            target=self._run, args=(load, _like_this_thread(device)), name="sglang-loader", daemon=True
        )
        self._thread.start()

    def give(self, name: str, tensor: torch.Tensor) -> None:
        """Hands over one tensor, whose memory may be used again at once.

        Raises:
            CheckpointEngineError: what `load` raised before it.
            WorkerError: it does nothing any more.
        """
        if self._wants_another():
            self._given.put((name, tensor.clone()))

    def finish(self) -> None:
        """Tells that all have come, and waits for the end.

        Raises:
            CheckpointEngineError: what `load` raised.
            WorkerError: it does nothing any more.
        """
        while self._wants_another():
            self._given.put(None)

    def give_up(self) -> None:
        """Ends it as it is."""
        with contextlib.suppress(Exception):  # whatever it raises now, the update has failed already
            while self._wants_another():
                self._given.put(_GivenUpError())

    def _wants_another(self) -> bool:
        if not self._ended:
            try:
                self._ended = not self._asked.get(timeout=_SECONDS)
            except queue.Empty:
                raise WorkerError(f"SGLang's loader has done nothing for {_SECONDS:g} s") from None
        if self._ended:
            self._thread.join(_SECONDS)
            if self._error is not None:
                raise self._error
        return not self._ended

    def _run(self, load: Callable[[_Pairs], object], context: AbstractContextManager[object]) -> None:
        try:
            with context:
                load(self._tensors())
        except Exception as error:  # noqa: BLE001 - raised in the thread that waits for it
            self._error = error
        finally:
            self._asked.put(False)

    def _tensors(self) -> _Pairs:
        while True:
            self._asked.put(True)
            given = self._given.get()
            if given is None:
                return
            if isinstance(given, Exception):
                raise given
            yield given


def _like_this_thread(device: torch.device) -> AbstractContextManager[None]:
    """What torch keeps for each thread, as it is in this one."""
    mode = torch.is_inference_mode_enabled()
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    @contextlib.contextmanager
    def entered() -> Generator[None]:
        with torch.cuda.stream(stream), torch.no_grad(), torch.inference_mode(mode=mode):
            yield

    return entered()
