"""The hooks in SGLang's scheduler processes, where the workers are."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Generator
from typing import Any, cast

import msgspec

from checkpoint_engine.errors import WorkerError
from checkpoint_engine_sglang import compat, places
from checkpoint_engine_sglang.agreement import GroupOfWorkers, Pending
from checkpoint_engine_sglang.compat import Runner
from checkpoint_engine_sglang.messages import Answer, Order, Report, describe_failures, unpack
from checkpoint_engine_sglang.worker import Worker

logger = logging.getLogger(__name__)

_SIDE = "_checkpoint_engine_side"

lost_hooks: dict[str, str] = {}
"""Of this process."""

Original = Callable[[Any, Any], Any]


class SchedulerSide:
    """What stands beside one scheduler: takes requests for updates in place of SGLang's own method."""

    def __init__(self, manager: Any) -> None:  # noqa: ANN401 - SGLang's own object
        self.scheduler = compat.scheduler_of(manager)
        self._manager = manager
        self._worker: Worker | None = None
        self._waiting: list[tuple[Original, Any]] = []
        self._asked: list[tuple[Pending[Report], Any]] = []
        """Requests for the status that other stages have not answered yet."""
        self._collected: list[Any] | None = None
        self._is_updated = False

    def handle(self, original: Original, request: Any) -> Any:  # noqa: ANN401
        """Answers a request, or returns None where that must wait until the next stage has it, too."""
        position = compat.position_of(self._manager)
        if position.stages > 1 and position.stage < position.stages - 1:
            self._waiting.append((original, request))
            return None
        if position.stages > 1 and _is_question(request):
            self._ask(original, request)
            self._asked = [asked for asked in self._asked if not asked[0].is_over()]
            return _answer(success=True, message="")  # the first stage has what counts
        return self._do(original, request)

    def after_sending(self, sent: object) -> None:
        """Takes the updates that had to wait: the next pipeline stage has their requests now."""
        sent_requests = cast("list[Any]", sent) if isinstance(sent, list) else []
        waiting, self._waiting = self._waiting, []
        for original, request in waiting:
            if not any(request is one for one in sent_requests):
                self._waiting.append((original, request))
            elif _is_question(request):
                self._ask(original, request)
            else:
                compat.send_answer(self.scheduler, self._do(original, request), request)
        self._answer_questions()

    def after_resuming(self) -> None:
        """Holds an engine that must not run."""
        if self._worker is not None:
            self._worker.stay_paused_if_dirty()

    def update_runner(self, original: Original, updater: Any, request: Any) -> Any:  # noqa: ANN401
        """In place of SGLang's update of one model: all models of this worker were updated at once before."""
        if self._collected is not None:
            self._collected.append(updater)
            return True, ""
        if self._is_updated:
            return True, "Succeeded to update model weights."
        return original(updater, request)

    # -- inside

    def _ask(self, original: Original, request: Any) -> None:  # noqa: ANN401
        """Stages that have batches under way wait for each other in another order: nobody may wait here as well."""
        try:
            worker = self._worker or self._make_worker(original, request)
            self._worker = worker
            self._asked.append((worker.start_status(), request))
        except Exception as error:
            logger.exception("this worker cannot tell its status")
            compat.send_answer(self.scheduler, _answer(success=False, message=repr(error)), request)

    def _answer_questions(self) -> None:
        asked, self._asked = self._asked, []
        for pending, request in asked:
            if not pending.is_over():
                self._asked.append((pending, request))
                continue
            stages = compat.position_of(self._manager).stages
            try:
                answer = _answer(success=True, message=_encode(Answer(pending.result(), stages)))
            except WorkerError as error:
                answer = _answer(success=False, message=str(error))
            compat.send_answer(self.scheduler, answer, request)

    def _do(self, original: Original, request: Any) -> Any:  # noqa: ANN401
        handles, order = unpack(request.zmq_handles)
        from_front = order is not None
        order = order or Order(version=request.weight_version or "")
        try:
            worker = self._worker or self._make_worker(original, request)
            self._worker = worker
        except Exception as error:
            # What keeps one worker from being made keeps every other one from it: they run the same code.
            logger.exception("this SGLang is not as the plugin knows it")
            return _answer(success=False, message=f"this SGLang ({places.version()}) cannot be updated: {error!r}")
        stages = worker.position.stages
        if order.do == "status":
            return _answer(success=True, message=_encode(Answer(worker.status(), stages)))
        if order.do == "verify":
            reports = worker.verify(handles, order)
            return _answer(success=not describe_failures(reports), message=_encode(Answer(reports, stages)))
        reports = worker.update(handles, order, flush=bool(request.flush_cache))
        failures = describe_failures(reports)
        if failures:
            words = _encode(Answer(reports, stages)) if from_front else f"{failures}; {_state(worker)}"
            return _answer(success=False, message=words)
        with self._updated(), compat.retracted_set_aside(self._manager):
            done = original(self._manager, request)
        if not from_front:
            return done
        problem = "" if done.success else str(done.message)
        return _answer(success=bool(done.success), message=_encode(Answer(reports, stages, problem)))

    @contextlib.contextmanager
    def _updated(self) -> Generator[None]:
        """SGLang's own method does what comes after the weights: version, cache, metrics."""
        self._is_updated = True
        try:
            yield
        finally:
            self._is_updated = False

    def _make_worker(self, original: Original, request: Any) -> Worker:  # noqa: ANN401
        workers = GroupOfWorkers(compat.world_group(self._manager))
        worker = Worker(self._manager, self._find_runners(original, request), workers)
        worker.lost_hooks = lost_hooks
        return worker

    def _find_runners(self, original: Original, request: Any) -> list[Runner]:  # noqa: ANN401
        known = compat.select_runners(self._manager)
        if known is not None:
            return known
        # Before 0.5.21 only SGLang's own method knows which models a worker has: it is run, and they are noted.
        quiet = copy.copy(request)
        quiet.flush_cache, quiet.weight_version = False, None
        self._collected = []
        try:
            original(self._manager, quiet)
            return [
                compat.describe_runner("target" if index == 0 else f"draft_{index}", updater)
                for index, updater in enumerate(self._collected)
            ]
        finally:
            self._collected = None


# -- the hooks, as SGLang calls them --------------------------------------------------------------------------------

_only: list[SchedulerSide] = []
"""That of this process, once it was asked for anything."""


def update_workers(original: Original, manager: Any, request: Any) -> Any:  # noqa: ANN401
    """Around the scheduler's handler of a request for an update."""
    scheduler = compat.scheduler_of(manager)
    side = getattr(scheduler, _SIDE, None)
    if side is None:
        side = SchedulerSide(manager)
        setattr(scheduler, _SIDE, side)
        _only[:] = [side]
    return side.handle(original, request)


def update_runner(original: Original, updater: Any, request: Any) -> Any:  # noqa: ANN401
    """Around the update of one model."""
    return _only[0].update_runner(original, updater, request) if _only else original(updater, request)


def send_to_next_stage(original: Callable[..., Any], scheduler: Any, data: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
    """Around the sending of requests to the next pipeline stage."""
    work = original(scheduler, data, *args, **kwargs)
    side = getattr(scheduler, _SIDE, None)
    if side is not None:
        side.after_sending(data)
    return work


def resume(original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
    """Around the handler of a request to run again."""
    done = original(scheduler, *args, **kwargs)
    side = getattr(scheduler, _SIDE, None)
    if side is not None:
        side.after_resuming()
    return done


def _is_question(request: Any) -> bool:  # noqa: ANN401
    _, order = unpack(request.zmq_handles)
    return order is not None and order.do == "status"


def _state(worker: Worker) -> str:
    if worker.dirty:
        return "its weights may be a mixture now; it answers no requests until an update succeeds"
    return "it still holds its old weights"


def _answer(*, success: bool, message: str) -> Any:  # noqa: ANN401
    return compat.answer_type()(success=success, message=message)


def _encode(answer: Answer) -> str:
    return msgspec.json.encode(answer).decode()
