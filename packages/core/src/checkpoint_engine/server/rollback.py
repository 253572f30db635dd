"""After an update failed: engines get back what the one before brought them, out of memory that still holds it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

import msgspec

from checkpoint_engine import limits
from checkpoint_engine.collective import RankGroup
from checkpoint_engine.contract.failure import Held
from checkpoint_engine.contract.modes import Operation
from checkpoint_engine.errors import CheckpointEngineError, CheckpointStateError, UpdateError, WorkerSilentError
from checkpoint_engine.source.store import CheckpointStore, Registered
from checkpoint_engine.transfer.order import UpdateOrder
from checkpoint_engine.transfer.update import UpdateRun

__all__ = ["Rollback"]


@dataclass(frozen=True)
class _Brought:
    """An update that succeeded, as one rank remembers it."""

    order: UpdateOrder
    held: Registered | None
    """What this rank held of its checkpoint."""
    updates: tuple[str, ...]
    """What the workers that this rank feeds call it, see `name_of_update`."""

    def obstacle(self, store: CheckpointStore, order: UpdateOrder, failed: UpdateRun) -> str:
        """Why the workers of the run that failed cannot have this back from here; empty if they can."""
        name = self.order.name
        if self.order.partial:
            return f"the update before, to {self.order.version!r}, brought only a part of the weights"
        if self.order.workers != order.workers:
            return "the update before was one of other engines"
        if self.held is not None:
            if name not in store.names() or store.get(name) is not self.held:
                return f"{name!r} is not in host memory any more"
            if self.held.is_of_others:
                return f"{name!r} lay in device memory that is not ours, and may hold other values by now"
        if not failed.workers_held(self.updates):
            return f"the engine did not hold {self.order.version!r} as these ranks had brought it"
        return ""


class _View(msgspec.Struct, frozen=True):
    """How a rank sees it after an update failed."""

    held: Held
    """What the workers hold that it feeds."""
    obstacle: str
    """Why this rank cannot take part in a rollback; empty if it can."""


class Rollback:
    """What one rank remembers of what was brought, and how all ranks bring it again."""

    def __init__(self, store: CheckpointStore) -> None:
        self._store = store
        self._brought: dict[tuple[int, ...], _Brought] = {}
        """The last update that succeeded, by the ranks whose engines it reached."""

    def note(self, order: UpdateOrder, held: Registered | None, run: UpdateRun) -> None:
        """An update has succeeded; `held` is what this rank held of it."""
        if order.operation is not Operation.REPLACE:
            return
        if held is not None and held.is_of_others:
            # It is never brought again, and whoever was asked may hold a trainer's tensors.
            order = replace(order, ask_engine=_unasked)
        self._brought[order.receivers] = _Brought(order, held, run.names)

    def close(self) -> None:
        """Forgets everything."""
        self._brought.clear()

    def after(
        self,
        order: UpdateOrder,
        failed: UpdateRun,
        error: UpdateError,
        group: RankGroup,
        again: Callable[[UpdateOrder], object],
    ) -> None:
        """Gives the engines back what they had, where that can be done; `error` says so then, and why not otherwise.

        All ranks to which the update failed call it; `again` carries out an order.
        """
        before = self._brought.get(order.receivers)
        if order.operation is not Operation.REPLACE or not order.rollback or failed.all_finished or before is None:
            return
        try:
            mine = _View(failed.held, before.obstacle(self._store, order, failed))
            why = _why_not(_exchanged(group, mine), order.receivers)
            if why is None and not _engines_are_through(group, failed, error):
                why = "an engine has not answered yet"
        except CheckpointEngineError as trouble:
            why = str(trouble) if failed.held is not Held.OLD else ""
        if why is None:
            # A plan is recorded anew after a failure, so that nothing but `auto` may work.
            back = replace(before.order, timeout=order.timeout, trace=False, keep=False, reload="auto")
            _bring_back(back, error, again)
        elif why:
            error.add(f"not rolled back ({why}): update again")


def _unasked(handles: Sequence[tuple[str, str]]) -> None:
    raise CheckpointStateError(f"the engine with {len(handles)} workers cannot get back what lies in others' memory")


def _exchanged(group: RankGroup, mine: _View) -> list[_View]:
    """What all ranks think of it."""
    timeout = timedelta(seconds=limits.ROLLBACK_TALK)
    parts = group.gather("rollback", msgspec.msgpack.encode(mine), timeout, "all ranks saying what their workers hold")
    return [msgspec.msgpack.decode(part, type=_View) for part in parts]


def _why_not(views: Sequence[_View], receivers: Collection[int]) -> str | None:
    """Why engines stay as they are: in words, empty where nothing need be said; None if they are rolled back."""
    if {views[rank].held for rank in receivers} in ({Held.OLD}, {Held.NEW}):
        return ""
    return next((f"rank {rank}: {view.obstacle}" for rank, view in enumerate(views) if view.obstacle), None)


def _engines_are_through(group: RankGroup, failed: UpdateRun, error: UpdateError) -> bool:
    """Whether no engine is asked for the update that failed any more; its client settles first."""
    # An engine whose worker is stopped answers once that is continued.
    patience = limits.KNOCK if error.kind == WorkerSilentError.__name__ else 2 * limits.SETTLE
    mine = b"1" if failed.engine_is_through(patience) else b""
    timeout = timedelta(seconds=patience + limits.ROLLBACK_TALK)
    return all(group.gather("through", mine, timeout, "all engines having answered"))


def _bring_back(order: UpdateOrder, error: UpdateError, again: Callable[[UpdateOrder], object]) -> None:
    try:
        again(order)
    except CheckpointEngineError as trouble:
        error.held = trouble.held
        error.add(f"the rollback to {order.version!r} failed too ({trouble}): update again")
        return
    error.rolled_back, error.held = order.version, Held.OLD.value
    error.add(f"rolled back: all workers hold version {order.version!r} again")
