"""The engine workers that one rank feeds: a link to each of them, all told the same. Mostly that is one."""

from __future__ import annotations

from collections.abc import Sequence

from checkpoint_engine.deadline import Cancel, Deadline
from checkpoint_engine.errors import CheckpointEngineError
from checkpoint_engine.link.channel import Listener, SenderChannel
from checkpoint_engine.link.messages import Wanted
from checkpoint_engine.transfer.worker_link import GOODBYE_SECONDS, WorkerLink


class Workers:
    """Links that were accepted, in the order of the workers."""

    def __init__(self) -> None:
        self.links: list[WorkerLink] = []

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

    def wait_until_ready(self) -> list[tuple[Wanted, ...]]:
        """Waits until all are ready for buckets; returns what each wants of those that are away.

        Raises:
            WorkerError: one refuses the update.
        """
        return [link.wait_until_ready() for link in self.links]

    def finish(self) -> dict[str, str | int | float]:
        """Has all complete the update side by side; returns what the first tells of itself.

        Raises:
            WorkerError: one failed.
        """
        for link in self.links:
            link.ask_to_finish()
        finished = [link.wait_until_finished() for link in self.links]
        return finished[0].details

    def failure(self) -> CheckpointEngineError | None:
        """What the first one that failed said by itself."""
        return next((failure for link in self.links if (failure := link.failure()) is not None), None)

    def abort(self, reason: str) -> None:
        """Makes all give the update up."""
        deadline = Deadline(GOODBYE_SECONDS)
        told = [link for link in self.links if link.tell_to_abort(reason, deadline)]
        for link in told:
            link.wait_until_aborted(deadline)

    def close(self) -> None:
        """Closes the links."""
        for link in self.links:
            link.close()
