"""The engine workers that one rank feeds: a link to each of them, all told the same. Mostly that is one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from checkpoint_engine import limits
from checkpoint_engine.contract.failure import Held
from checkpoint_engine.deadline import Cancel, Deadline
from checkpoint_engine.errors import CheckpointEngineError
from checkpoint_engine.link.channel import Listener, SenderChannel
from checkpoint_engine.link.messages import Wanted
from checkpoint_engine.processes import StoppedWatch, is_stopped
from checkpoint_engine.transfer.worker_link import WorkerLink

__all__ = ["WorkerLinks"]


class WorkerLinks:
    """Links that were accepted, in the order of the workers."""

    def __init__(self) -> None:
        self.links: list[WorkerLink] = []
        self._stopped = StoppedWatch()
        self.wanted: list[tuple[Wanted, ...]] = []
        """What each wants of the buckets that are fetched from other hosts, once all are ready."""

    def accept(self, listeners: Sequence[Listener], deadline: Deadline, cancel: Cancel, names: Sequence[str]) -> None:
        """Waits until every worker has connected; nobody else is expected afterwards.

        Raises:
            DeadlineError: one did not come.
        """
        for listener, name in zip(listeners, names, strict=True):
            self.links.append(WorkerLink.accept(listener, deadline, cancel, name))
            listener.close()  # a process that is killed leaves no socket behind

    @property
    def channels(self) -> list[SenderChannel]:
        """What they talk over."""
        return [link.channel for link in self.links]

    def wait_until_ready(self) -> None:
        """Waits until all are ready for buckets, and have said what they want of those that are fetched.

        Raises:
            WorkerError: one refuses the update.
        """
        self.wanted = [link.wait_until_ready() for link in self.links]

    def finish(self, released: Callable[[], None], sums: tuple[int, ...] = ()) -> dict[str, str | int | float]:
        """Has all complete the update side by side; returns what the first tells of itself.

        With `sums` of all tensors they compare those first. Calls `released` as soon as none has staging memory mapped
        that is not to stay.

        Raises:
            WorkerError: one failed.
        """
        for link in self.links:
            link.ask_to_finish(sums)
        for link in self.links:
            link.wait_until_released()
        released()
        finished = [link.wait_until_finished() for link in self.links]
        return finished[0].details

    def failure(self) -> CheckpointEngineError | None:
        """What the first one that failed said by itself."""
        return next((failure for link in self.links if (failure := link.failure()) is not None), None)

    def stopped(self) -> CheckpointEngineError | None:
        """Says which worker does nothing any more because somebody has stopped its process; for any thread."""
        return next((link.as_stopped() for link in self.links if self._stopped.overdue(link.channel.peer)), None)

    def held(self) -> Held:
        """What the workers hold that have connected; the others hold what they held."""
        held = {link.held for link in self.links} or {Held.OLD}
        return held.pop() if len(held) == 1 else Held.MIXTURE

    def held_before(self, updates: Collection[str]) -> bool:
        """Whether what they all held whole before this update came by one of these."""
        return all(link.held_before(updates) for link in self.links)

    def abort(self, reason: str) -> None:
        """Makes all give the update up."""
        deadline = Deadline(limits.RANK_GOODBYE)
        told = [link for link in self.links if link.tell_to_abort(reason, deadline)]
        for link in told:
            if not is_stopped(link.channel.peer):  # it answers nobody; it gives up as soon as it is continued
                link.wait_until_aborted(deadline)

    def close(self) -> None:
        """Closes the links."""
        for link in self.links:
            link.close()
