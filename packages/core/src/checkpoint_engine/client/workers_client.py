"""How an engine whose workers report each by itself is updated, and what it holds and serves after a failure."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import msgspec

from checkpoint_engine import limits
from checkpoint_engine.background import in_background
from checkpoint_engine.client.endpoint import Endpoint
from checkpoint_engine.client.engine_client import PauseMode
from checkpoint_engine.client.engine_turn import EngineTurn
from checkpoint_engine.client.settlement import Settlement
from checkpoint_engine.contract.failure import Held, describe_failures
from checkpoint_engine.contract.reports import WorkerReport, WorkerStatus, name_of_update
from checkpoint_engine.deadline import Deadline
from checkpoint_engine.errors import CheckpointEngineError, DeadlineError, EngineRequestError, EngineSilentError

__all__ = ["WorkersClient", "WorkersOrder"]

_SILENT = 2
"""Knocks in a row that a front leaves without an answer."""
_FRONT = "/version"
"""What fronts answer, or refuse, by themselves: for SGLang's `/health` its scheduler generates a token first."""

_Converted = TypeVar("_Converted")
_Result = TypeVar("_Result")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkersOrder:
    """What all workers of an engine are to do at once."""

    handles: Mapping[str, str]
    """Empty where no weights of the served model come."""
    version: str
    pause: PauseMode = "none"
    """How running requests are dealt with, by the client or, where `needs_pause` says no, by the engine itself."""
    reset_caches: bool = False
    compare: bool = False
    """Whether weights are only compared with what comes."""


class WorkersClient:
    """A client for engines whose workers each report what they did; the same order of steps for all of them.

    Subclasses say how their engine is asked, pauses, resumes, drops caches and publishes a version.
    """

    setup_hint: ClassVar[str] = ""
    """Added to errors that look as if the engine had been started without our worker methods."""

    def __init__(self, endpoint: str | Endpoint, *, timeout: float = 60.0) -> None:
        self.endpoint = Endpoint(endpoint) if isinstance(endpoint, str) else endpoint
        self.timeout = timeout

    # -- what engines differ in

    def wait_ready(self, deadline: Deadline) -> None:
        """See `EngineClient`."""
        raise NotImplementedError

    def world_size(self) -> int | None:
        """See `EngineClient`."""
        raise NotImplementedError

    def ask_workers(self, order: WorkersOrder, deadline: Deadline) -> list[WorkerReport]:
        """Has all workers do as they are told; returns what each reports, in order of rank.

        Raises:
            EngineRequestError: the engine answers with an error, or not as its plugin does.
            DeadlineError: it does not answer in time.
        """
        raise NotImplementedError

    def status(self, deadline: Deadline) -> list[WorkerStatus]:
        """What every worker holds now.

        Raises:
            EngineRequestError: the engine answers with an error.
            DeadlineError: it does not answer in time.
        """
        raise NotImplementedError

    def needs_pause(self, mode: PauseMode) -> bool:
        """Whether the engine is paused before such an update, and resumed after it."""
        return mode != "none"

    def pause(self, mode: PauseMode, *, reset_caches: bool, deadline: Deadline) -> None:
        """Stops the engine from running requests."""
        raise NotImplementedError

    def resume(self, deadline: Deadline) -> None:
        """Lets it run requests again."""
        raise NotImplementedError

    def is_paused(self, deadline: Deadline) -> bool:
        """Whether it is paused; False if it cannot tell."""
        del deadline
        return False

    def reset_caches(self, deadline: Deadline) -> None:
        """Drops what was computed with the old weights."""
        raise NotImplementedError

    def reset_caches_late(self, deadline: Deadline) -> None:
        """The same after an update that failed although all workers hold the new weights."""
        self.reset_caches(deadline)

    def publish_version(self, version: str, deadline: Deadline) -> None:
        """Tells the engine the name of the weights it now serves, if it wants to know."""

    # -- what they share

    def update_weights(
        self,
        handles: Mapping[str, str],
        *,
        version: str,
        pause: PauseMode,
        reset_caches: bool,
        timeout: float,
    ) -> None:
        """Pauses, updates all workers, resets caches, publishes the version, resumes; see `EngineClient`.

        An engine has one updater at a time, others wait for their turn. One that somebody else had paused stays paused.
        """
        self.carry_out(WorkersOrder(handles, version, pause, reset_caches), timeout)

    def carry_out(self, order: WorkersOrder, timeout: float) -> None:
        """The same with any order that changes what the engine serves."""
        deadline = Deadline(timeout)
        with EngineTurn(self.endpoint.address).take(deadline) as turn:
            self._update_in_turn(order, turn, deadline)

    def _update_in_turn(self, order: WorkersOrder, turn: EngineTurn, deadline: Deadline) -> None:
        was_left_paused = turn.paused
        try:
            resetting = self._make_ready(order, turn, deadline)
        except CheckpointEngineError as error:
            raise self._untouched(error, order, turn, serves=not was_left_paused) from error
        try:
            self._while_it_lives(lambda: self._ask_all(order, deadline))
        except (EngineRequestError, DeadlineError) as error:
            raise self._settled(error, order, turn) from error
        try:
            self._while_it_lives(lambda: self._conclude(order, resetting, turn, deadline))
        except (EngineRequestError, DeadlineError) as error:
            stays = "and may still be paused" if turn.paused else "but its caches may be stale"
            held = type(error)(f"{error}; all workers hold version {order.version!r} {stays}: update again")
            held.held = Held.NEW.value
            raise held from error

    def _make_ready(self, order: WorkersOrder, turn: EngineTurn, deadline: Deadline) -> Future[None] | None:
        """Pauses it, if so ordered, and sees whether its workers hear; returns the dropping of caches that goes on."""
        hearing = in_background(lambda: self._knock(turn, deadline), "checkpoint-engine-knocks")
        if not self.needs_pause(order.pause):
            if hearing.result() and not self.is_paused(deadline):
                raise EngineRequestError(
                    f"{self.endpoint.address} has replicas of experts, which take each step together: one that took "
                    "weights within a step would keep the others from ending theirs; use pause mode keep, abort or wait"
                )
            return None
        if self._while_it_lives(lambda: self._is_paused_by_somebody(turn, deadline)):
            turn.note_pause_of_others()
        else:
            turn.note_pause()
        self._while_it_lives(lambda: self.pause(order.pause, reset_caches=order.reset_caches, deadline=deadline))
        hearing.result()
        if not order.reset_caches:
            return None
        # Nothing fills them until it is resumed: they need not wait for the new weights.
        return in_background(lambda: self.reset_caches(deadline), "checkpoint-engine-caches")

    def _conclude(
        self, order: WorkersOrder, resetting: Future[None] | None, turn: EngineTurn, deadline: Deadline
    ) -> None:
        """What follows once all workers have the new weights."""
        if resetting is not None:
            resetting.result()  # its requests end with the deadline
        elif order.reset_caches:
            self.reset_caches(deadline)
        if order.handles:
            self.publish_version(order.version, deadline)
        Settlement(self, turn).resume(deadline)

    def _untouched(
        self, error: CheckpointEngineError, order: WorkersOrder, turn: EngineTurn, *, serves: bool
    ) -> CheckpointEngineError:
        """The error of an update for which the engine could not be made ready; it `serves` if it did before."""
        if not serves:
            return self._settled(error, order, turn)
        resumed = not isinstance(error, EngineSilentError) and Settlement(self, turn).resume_quietly()
        open_again = "and serves them" if resumed or not turn.paused else "but may be paused: update again"
        said = type(error)(f"{error}; nothing was sent to it: it still holds its old weights, {open_again}")
        said.held = Held.OLD.value
        return said

    def verify_weights(self, handles: Mapping[str, str], *, version: str, timeout: float) -> None:
        """Has every worker compare its weights with the checkpoint that `handles` offer.

        The engine is paused meanwhile only where its replicas take each step together.

        Raises:
            EngineRequestError: the engine refuses, or a worker failed; the message names the worker.
            DeadlineError: it does not answer in time.
        """
        order, deadline = WorkersOrder(handles, version, pause="keep", compare=True), Deadline(timeout)
        turn = EngineTurn(self.endpoint.address)
        if not self._knock(turn, deadline):
            self._ask_all(order, deadline)
            return
        with turn.take(deadline):
            if self.is_paused(deadline):  # whoever did that ends it
                self._ask_all(order, deadline)
            else:
                self._compare_paused(order, turn, deadline)

    def _compare_paused(self, order: WorkersOrder, turn: EngineTurn, deadline: Deadline) -> None:
        turn.note_pause()
        try:
            self._while_it_lives(lambda: self.pause(order.pause, reset_caches=False, deadline=deadline))
            self._while_it_lives(lambda: self._ask_all(order, deadline))
        except (EngineRequestError, DeadlineError) as error:
            if Settlement(self, turn).resume_quietly():
                raise
            raise type(error)(
                f"{error}; it was paused to be compared, and may still be: update it, or resume it"
            ) from error
        Settlement(self, turn).resume(Deadline(limits.SETTLE))

    def settle_orphan(self, deadline: Deadline) -> str:
        """After the death of a sender: has the engine serve if its weights are whole; says what it holds now.

        Raises:
            CheckpointEngineError: it cannot be asked, or another sender updates it.
        """
        with EngineTurn(self.endpoint.address).take(deadline) as turn:
            return f"{self.endpoint.address}: {Settlement(self, turn).after_death(deadline)}"

    def _is_paused_by_somebody(self, turn: EngineTurn, deadline: Deadline) -> bool:
        """Whether a person has paused it, or a loop of theirs: a pause that an update has left is ours to end."""
        if not self.is_paused(deadline) or turn.paused:
            return False
        return turn.paused_by_others or not any(worker.dirty for worker in self.status(deadline))

    def _ask_all(self, order: WorkersOrder, deadline: Deadline) -> None:
        reports = self.ask_workers(order, deadline)
        failed = [failure for worker, report in enumerate(reports) if (failure := report.failure(worker)) is not None]
        if failed or not reports:
            raise EngineRequestError(f"{self.endpoint.address}: {describe_failures(failed) or 'no worker answered'}")
        if not order.compare and any(report.verified for report in reports):
            raise EngineRequestError(
                f"{self.endpoint.address} was to be updated, but the parameter server only had it compare: with "
                "`reload='verify'` belongs the client's `verify_weights`"
            )

    def _settled(self, error: CheckpointEngineError, order: WorkersOrder, turn: EngineTurn) -> CheckpointEngineError:
        """After a failure: has the engine serve again if its weights are whole; the error then says what it holds."""
        updates = {name_of_update(handle) for handle in order.handles.values()}
        settlement = Settlement(self, turn)
        if isinstance(error, EngineSilentError):  # it would not say that either, and whoever waits for us has waited
            held, found = settlement.unheard()
        else:
            held, found = settlement.after(order.version, updates, reset_caches=order.reset_caches)
            found = found.replace(f" ({error})", "")  # said already
        settled = type(error)(f"{error}; {found}")
        settled.held = held.value
        return settled

    def _while_it_lives(self, call: Callable[[], _Result]) -> _Result:
        """Has the engine do something that may take long; gives up once its front answers nothing else either.

        Raises:
            EngineSilentError: it did so twice in a row.
        """
        asked = in_background(call, "checkpoint-engine-asks")
        while not wait([asked], limits.KNOCK).done:
            if all(self._is_silent() for _ in range(_SILENT)) and not asked.done():
                raise EngineSilentError(
                    f"{self.endpoint.address} accepts connections and answers nothing: is its process stopped?"
                )
        return asked.result()

    def _is_silent(self) -> bool:
        """Whether its front answers nothing at all; one where nobody listens is not silent."""
        try:
            self.endpoint.send("GET", _FRONT, Deadline(limits.KNOCK))
        except DeadlineError:
            return True
        except EngineRequestError:
            return False
        return False

    def _knock(self, turn: EngineTurn, deadline: Deadline) -> bool:
        """Finds out whether its workers hear; returns whether replicas of it take each step together.

        Raises:
            EngineSilentError: they do not.
        """
        patience = Deadline(min(limits.HEAR, deadline.remaining))
        try:
            workers = self.status(patience)
        except (DeadlineError, EngineRequestError) as error:
            if isinstance(error, DeadlineError) or patience.expired:
                raise EngineSilentError(
                    f"{error}: is a worker stopped (SIGCONT continues it), busy with another update, or in a step that "
                    "takes longer (then pause the engine first)?"
                ) from error
            return False  # what it cannot say does not matter here; whether it can be updated shows next
        turn.steps_elsewhere = any(worker.steps_elsewhere for worker in workers)
        return any(worker.in_step > 1 for worker in workers)

    def _converted(self, results: object, kind: type[_Converted]) -> _Converted:
        """What workers say, from its JSON."""
        try:
            return msgspec.convert(results, kind)
        except msgspec.MsgspecError as error:
            hint = self.setup_hint or "is its plugin of another version?"
            raise EngineRequestError(
                f"the workers of {self.endpoint.address} returned something unexpected ({error}): {results!r}; {hint}"
            ) from error
