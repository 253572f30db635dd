"""Registers blocks of host memory with a device in the background, in order: the first can be copied from meanwhile."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future, wait
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import ExitStack
from queue import Empty, SimpleQueue

import torch

from checkpoint_engine.deadline import Deadline
from checkpoint_engine.device.base import Device, Pinned
from checkpoint_engine.errors import DeadlineError

__all__ = ["Registration"]

logger = logging.getLogger(__name__)

_THREADS = 4
_CLOSE_SECONDS = 30.0
"""A call of the driver cannot be broken off; one for a few gigabytes takes a second."""


class Registration:
    """Blocks of which each is registered as a whole: no copy may straddle two of them."""

    def __init__(self, device: Device, blocks: Sequence[torch.Tensor]) -> None:
        """Begins; `blocks` are 1-D uint8, in the order in which they will be needed."""
        self._device = device
        self._pins: list[Future[Pinned]] = [Future() for _ in blocks]
        self._queue: SimpleQueue[tuple[Future[Pinned], torch.Tensor]] = SimpleQueue()
        for pair in zip(self._pins, blocks, strict=True):
            self._queue.put(pair)
        for _ in range(min(_THREADS, len(blocks))):
            # Daemons: a process that ends frees everything anyway, and must not wait for the driver.
            threading.Thread(target=self._work, name="checkpoint-engine-pin", daemon=True).start()

    def wait(self, number: int, deadline: Deadline) -> None:
        """Returns once that block is registered.

        Raises:
            HostMemoryError: the driver refuses.
            DeadlineError: it did not happen in time.
        """
        try:
            self._pins[number].result(deadline.remaining)
        except FutureTimeoutError:
            raise DeadlineError(
                f"registering segment {number} of the ranks' host memory with the device did not end within "
                f"{deadline.said}; --method broadcast does without"
            ) from None

    def close(self) -> None:
        """Gives up what has not begun, waits for what has, and unregisters all.

        What the driver does not end in time is unregistered as soon as it does.
        """
        begun = [pin for pin in self._pins if not pin.cancel()]
        self._pins = []
        done, late = wait(begun, _CLOSE_SECONDS)
        with ExitStack() as stack:
            for pin in done:
                if pin.exception() is None:
                    stack.callback(pin.result().close)
        if late:
            logger.warning("the driver still registers %d segments after %g s", len(late), _CLOSE_SECONDS)
        for pin in late:
            pin.add_done_callback(self._let_go)

    def _work(self) -> None:
        while True:
            try:
                pin, block = self._queue.get_nowait()
            except Empty:
                return
            if not pin.set_running_or_notify_cancel():
                continue
            try:
                pin.set_result(self._device.pin(block))
            except Exception as error:  # noqa: BLE001 - whatever it is, the update gets it where it needs the block
                pin.set_exception(error)

    def _let_go(self, pin: Future[Pinned]) -> None:
        if pin.exception() is None:
            with self._device.active():
                pin.result().close()
