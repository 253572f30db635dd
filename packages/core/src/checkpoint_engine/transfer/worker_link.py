"""The sender's side of the link to one engine worker, during one update."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Collection, Sequence
from typing import TypeVar

import torch

from checkpoint_engine import limits
from checkpoint_engine.contract.failure import Held
from checkpoint_engine.contract.modes import WireMode
from checkpoint_engine.deadline import Cancel, Deadline
from checkpoint_engine.device import ExportedMemory
from checkpoint_engine.errors import (
    CheckpointEngineError,
    LinkClosedError,
    LinkError,
    WorkerError,
    WorkerSilentError,
    WorkerTracebackError,
)
from checkpoint_engine.link.channel import Listener, SenderChannel
from checkpoint_engine.link.messages import (
    PROTOCOL,
    Abort,
    Aborted,
    Accepted,
    Begin,
    Failed,
    Finish,
    Finished,
    FromReceiver,
    Hello,
    Load,
    Loaded,
    Released,
    Wanted,
    encode_buckets,
)
from checkpoint_engine.planning.buckets import BucketPlan
from checkpoint_engine.transfer.announcement import Announcement
from checkpoint_engine.transfer.trace import Span
from checkpoint_engine.version import __version__

__all__ = ["WorkerLink"]

_NO_BUCKETS = encode_buckets(())
_Answer = TypeVar("_Answer", Accepted, Loaded, Released, Finished)


class WorkerLink:
    """Feeds one engine worker. Loads are answered in order, so `done` is the last bucket that is finished."""

    def __init__(self, channel: SenderChannel, hello: Hello, device: str, deadline: Deadline) -> None:
        self._channel = channel
        self._hello = hello
        self._device = device
        self._deadline = deadline
        self._loading: deque[tuple[int, float]] = deque()
        self._over = False
        self._lets_go = False
        self.held = Held.OLD
        """What the worker holds, as far as it has said so or nothing was sent to it."""
        self.done = -1
        self.loads: dict[int, tuple[float, float]] = {}
        """When the worker began to load a bucket, on the host's monotonic clock, and the seconds that it took."""

    @classmethod
    def accept(cls, listener: Listener, deadline: Deadline, cancel: Cancel, device: str) -> WorkerLink:
        """Waits until the engine's worker on `device` has connected.

        Raises:
            DeadlineError: it did not come.
        """
        channel, hello = listener.accept(deadline, cancel, f"the engine worker on {device} connecting")
        return cls(channel, hello, device, deadline)

    def announce(
        self,
        update_id: str,
        checkpoint: str,
        version: str,
        what: Announcement,
        memory: ExportedMemory,
        reload: WireMode,
        remote: Sequence[int] = (),
        *,
        checksums: bool = False,
        partial: bool = False,
    ) -> None:
        """Announces the update; the worker then makes itself ready for it.

        Of the buckets in `remote` it says what it wants; with `checksums` it compares what arrives.

        Raises:
            WorkerError: the update is `partial`, and the worker takes whole checkpoints only.
        """
        if partial and not self._hello.takes_parts:
            raise WorkerError(
                f"the engine worker on {self._device} (checkpoint-engine-core {self._hello.library}) takes whole "
                "checkpoints, not some tensors of one: bring all, or upgrade its plugin"
            )
        known = what.layout in self._hello.layouts
        message = Begin(
            PROTOCOL,
            __version__,
            str(torch.__version__),
            update_id,
            checkpoint,
            version,
            memory.memory,
            _NO_BUCKETS if known else what.buckets,
            reload,
            what.layout if known else "",
            tuple(remote),
            checksums,
            partial,
        )
        self._lets_go = not memory.memory.lease
        self._channel.send(message, self._deadline, memory.descriptors)

    def wait_until_ready(self) -> tuple[Wanted, ...]:
        """Waits until the worker is ready for buckets; returns what it wants of those that are fetched.

        Raises:
            WorkerError: the worker refuses the update.
        """
        return self._expect(Accepted, "accepting the update").wanted

    def load(self, bucket: int, offset: int, segment: int = 0, *, again: bool = False) -> None:
        """Tells the worker that a bucket lies at `offset`; does not wait."""
        self.held = Held.UNKNOWN
        self._channel.send(Load(bucket, offset, segment, again), self._deadline)
        self._loading.append((bucket, time.perf_counter()))

    def wait_until_loaded(self, count: int) -> None:
        """Waits until so many buckets are loaded, whichever those are.

        Raises:
            WorkerError: the worker failed.
            LinkError: it is gone.
        """
        while self._loading and len(self.loads) < count:
            self._take_loaded()

    def poll(self) -> None:
        """Takes in answers that are there already.

        Raises:
            WorkerError: the worker failed.
            LinkError: it is gone.
            DeadlineError: it takes too long.
        """
        while self._loading and self._channel.ready():
            self._take_loaded()
        if self._loading:
            self._deadline.check(f"the engine worker on {self._device} loading bucket {self._loading[0][0]}")

    def spans(self, plan: BucketPlan) -> list[Span]:
        """When the worker loaded each bucket."""
        return [
            Span("load", f"bucket {index}", began, began + seconds, index, plan.buckets[index].nbytes)
            for index, (began, seconds) in self.loads.items()
        ]

    def ask_to_finish(self, sums: tuple[int, ...]) -> None:
        """Has the worker complete the update, once it has compared checksums, if any; does not wait."""
        self.held = Held.UNKNOWN
        self._channel.send(Finish(sums), self._deadline)

    def wait_until_released(self) -> None:
        """Waits until the worker has unmapped the staging memory, unless it keeps that.

        Raises:
            WorkerError: the worker failed.
        """
        if self._lets_go:
            self._expect(Released, "unmapping the staging memory")

    def wait_until_finished(self) -> Finished:
        """Waits until it has.

        Raises:
            WorkerError: the worker failed.
        """
        finished = self._expect(Finished, "finishing the update")
        self._over = True
        self.held = Held.NEW
        return finished

    def held_before(self, updates: Collection[str]) -> bool:
        """Whether the weights that it held whole before this update came by one of these."""
        return self._hello.holds in updates

    @property
    def channel(self) -> SenderChannel:
        """What it talks over."""
        return self._channel

    def failure(self) -> CheckpointEngineError | None:
        """What the worker said of its own failure, if it did so without being asked."""
        with contextlib.suppress(LinkError):
            while not self._over and self._channel.ready():
                answer = self._channel.receive(Deadline(limits.LAST_WORD), "an answer")
                if isinstance(answer, Failed):
                    self._over = True
                    return self._as_error(answer)
        return None

    def tell_to_abort(self, reason: str, deadline: Deadline) -> bool:
        """Makes the worker give the update up, if it has not done so; returns whether it was told."""
        if self._over:
            return False
        self._over = True
        self._channel.cancel = Cancel()  # the one that ended the update must not end this wait as well
        with contextlib.suppress(LinkError, CheckpointEngineError):  # the cause of the abort is what counts
            self._channel.send(Abort(reason), deadline)
        return True

    def wait_until_aborted(self, deadline: Deadline) -> None:
        """Waits until it has; never raises for a worker that is gone."""
        with contextlib.suppress(LinkError, CheckpointEngineError):  # the cause of the abort is what counts
            while True:
                answer = self._channel.receive(deadline, "the worker giving up")
                if isinstance(answer, Aborted | Failed | Finished):
                    self._note(answer)
                    return

    def as_stopped(self) -> WorkerSilentError:
        """The error of a worker whose process is stopped."""
        return WorkerSilentError(
            f"the engine worker on {self._device} (pid {self._channel.peer}) was stopped {limits.SILENCE:g} s ago and "
            "takes nothing: continue it (SIGCONT), or restart the engine"
        )

    def close(self) -> None:
        """Closes the link; a worker in the middle of an update gives it up."""
        self._channel.close()

    def _take_loaded(self) -> None:
        bucket, told = self._loading[0]
        loaded = self._expect(Loaded, f"loading bucket {bucket}")
        if loaded.bucket != bucket:
            raise LinkError(f"the worker on {self._device} answered for bucket {loaded.bucket}, expected {bucket}")
        self._loading.popleft()
        self.done = bucket
        now = time.perf_counter()
        # A worker in another time namespace, or of an older version, does not know our clock.
        began = loaded.began if told <= loaded.began <= now else now - loaded.seconds
        self.loads[bucket] = began, loaded.seconds

    def _expect(self, kind: type[_Answer], doing: str) -> _Answer:
        try:
            answer: FromReceiver = self._channel.receive(self._deadline, f"the engine worker on {self._device} {doing}")
        except LinkClosedError as error:
            self._over = True
            raise WorkerError(
                f"the engine worker on {self._device} died or hung up instead of {doing}; look into the engine's log"
            ) from error
        if isinstance(answer, Failed):
            self._over = True
            raise self._as_error(answer)
        if not isinstance(answer, kind):
            raise LinkError(f"expected {kind.__name__} from the worker on {self._device}, {type(answer).__name__} came")
        return answer

    def _note(self, answer: Aborted | Failed | Finished) -> None:
        if isinstance(answer, Finished) or (isinstance(answer, Failed) and answer.complete):
            self.held = Held.NEW
        else:
            self.held = Held.MIXTURE if answer.dirty else Held.OLD

    def _as_error(self, failed: Failed) -> WorkerError:
        self._note(failed)
        state = "holds the new weights" if failed.complete else "keeps its old weights"
        if failed.dirty:
            state = "may hold a mixture of weights until a full update succeeds"
        error = WorkerError(
            f"the engine worker on {self._device} failed in {failed.phase}: {failed.error}: {failed.message} "
            f"(the worker {state})"
        )
        if failed.dirty:  # that a worker's weights are whole says nothing of the engine's other workers
            error.held = Held.MIXTURE.value
        if failed.traceback:  # whoever prints this error's traceback sees the worker's first
            error.__cause__ = WorkerTracebackError(f"in the engine's worker\n{failed.traceback}")
        return error
