"""Publishes what becomes of a parameter server's updates, where somebody shall hear of it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TypedDict

from checkpoint_engine.contract.failure import Failure
from checkpoint_engine.contract.modes import Operation
from checkpoint_engine.contract.phase import Phase
from checkpoint_engine.events import EventPublisher, UpdateBegan, UpdateEnded, UpdateFailed
from checkpoint_engine.transfer.order import UpdateOrder
from checkpoint_engine.transfer.report import UpdateReport

__all__ = ["UpdateEvents"]

_VARIABLE = "CHECKPOINT_ENGINE_EVENTS"


class UpdateEvents:
    """Rank 0 speaks for all: an update is over on all ranks when it is over on one."""

    def __init__(self, address: str | None, rank: int) -> None:
        """Binds the address, or that of the environment, if this is rank 0 and there is one.

        Raises:
            SettingError: it is no address.
            AddressInUseError: it is taken.
        """
        address = os.environ.get(_VARIABLE, "") if address is None else address
        self._publisher = EventPublisher(address) if address and rank == 0 else None

    @contextmanager
    def of(self, order: UpdateOrder, report: Callable[[], UpdateReport | None]) -> Generator[None]:
        """Tells that an update begins, and what has become of it; of comparisons it says nothing."""
        publisher = self._publisher
        if publisher is None or order.operation is Operation.COMPARE:
            yield
            return

        publisher.publish(UpdateBegan(**_told(order, publisher.session)))
        try:
            yield
        except Exception as error:
            failure = Failure.of(error, Phase.UPDATE, 0)
            publisher.publish(
                UpdateFailed(
                    **_told(order, publisher.session),
                    error=failure.error,
                    message=failure.message,
                    phase=failure.phase.value,
                    rank=failure.rank,
                    held=failure.held.value,
                )
            )
            raise
        if (ended := report()) is not None:
            told = _told(order, publisher.session, ended.method)
            publisher.publish(UpdateEnded(**told, nbytes=ended.nbytes, tensors=ended.tensors, seconds=ended.seconds))

    def close(self) -> None:
        """Sends what is left, and ends."""
        if self._publisher is not None:
            self._publisher.close()


class _Told(TypedDict):
    session: str
    time: float
    checkpoint: str
    version: str
    method: str
    ranks: int


def _told(order: UpdateOrder, session: str, method: str = "") -> _Told:
    return _Told(
        session=session,
        time=time.time(),
        checkpoint=order.name,
        version=order.version,
        method=method or order.method.value,
        ranks=order.ranks,
    )
