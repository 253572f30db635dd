"""The hooks in SGLang's scheduler processes, where the workers are."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable
from typing import Any, cast

import msgspec

from checkpoint_engine.sdk import WorkerError
from checkpoint_engine_sglang import compat, installation
from checkpoint_engine_sglang.agreement import Pending, WorkerGroup
from checkpoint_engine_sglang.compat import Runner
from checkpoint_engine_sglang.messages import Order, ReplicaReports, Report, failures_in, unpack
from checkpoint_engine_sglang.worker import WorkerSide

__all__ = [
    "Original",
    "SchedulerSide",
    "lost_hooks",
    "resume",
    "send_to_next_stage",
    "update_otherwise",
    "update_runner",
    "update_workers",
]

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
        self._worker: WorkerSide | None = None
        self._waiting: list[tuple[Original, Any]] = []
        self._asked: list[tuple[Pending[Report], Any]] = []
        """Requests for the status that other stages have not answered yet."""
        self._collected: list[Any] | None = None
        self._is_updated = False
        self._others: tuple[str, str] | None = None
        """Version and door of weights that SGLang's own routes brought before anybody asked this worker."""

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

    def after_others(self, version: str, door: str) -> None:
        """Notes that SGLang's own routes have changed the weights."""
        self._others = version, door
        if self._worker is not None:
            self._worker.others_brought(version, door)

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
                answer = _answer(success=True, message=_encode(ReplicaReports(pending.result(), stages)))
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
            return _answer(
                success=False, message=f"this SGLang ({installation.version()}) cannot be updated: {error!r}"
            )
        stages = worker.position.stages
        if order.do == "status":
            return _answer(success=True, message=_encode(ReplicaReports(worker.status(), stages)))
        if order.do == "adapter":
            return _answer(success=True, message=_encode(ReplicaReports(worker.take_adapter(order), stages)))
        start = time.perf_counter()
        reports = worker.run(handles, order, flush=bool(request.flush_cache))
        failures = failures_in(reports)
        done = self._complete(original, request) if all(report.complete for report in reports) else None
        if order.do == "update":
            compat.observe_weight_load(self._manager, time.perf_counter() - start)
        if not from_front:
            return _answer(success=False, message=f"{failures}; {worker.describe()}") if failures else done
        problem = "" if done is None or done.success else str(done.message)
        answer = _encode(ReplicaReports(reports, stages, problem))
        return _answer(success=not failures and not problem, message=answer)

    def _complete(self, original: Original, request: Any) -> Any:  # noqa: ANN401
        """SGLang's own method does what comes after the weights: version, cache, metrics."""
        self._is_updated = True
        try:
            with compat.retracted_set_aside(self._manager):
                return original(self._manager, request)
        finally:
            self._is_updated = False

    def _make_worker(self, original: Original, request: Any) -> WorkerSide:  # noqa: ANN401
        workers = WorkerGroup(compat.world_group(self._manager))
        worker = WorkerSide(self._manager, self._find_runners(original, request), workers)
        worker.lost_hooks = lost_hooks
        if self._others is not None:
            worker.others_brought(*self._others)
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
    return _side_of(manager).handle(original, request)


def update_otherwise(original: Original, manager: Any, request: Any) -> Any:  # noqa: ANN401
    """Around the scheduler's handlers of SGLang's own updates: from disk, from tensors, and distributed ones."""
    done: Any = None
    try:
        done = original(manager, request)
        return done
    finally:
        version = str(getattr(request, "weight_version", "") or "") if _succeeded(done) else ""
        _side_of(manager).after_others(version, _door_of(request))


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


def _side_of(manager: Any) -> SchedulerSide:  # noqa: ANN401
    scheduler = compat.scheduler_of(manager)
    side = cast("SchedulerSide | None", getattr(scheduler, _SIDE, None))
    if side is None:
        side = SchedulerSide(manager)
        setattr(scheduler, _SIDE, side)
        _only[:] = [side]
    return side


def _door_of(request: Any) -> str:  # noqa: ANN401
    """SGLang's own route, by the kind of its request (`UpdateWeightFromDiskReqInput` and the like)."""
    kind = type(request).__name__
    ways = {"Disk": "disk", "Distributed": "distributed", "Tensor": "tensor"}
    found = next((way for word, way in ways.items() if word in kind), "")
    return f"SGLang's /update_weights_from_{found}" if found else "SGLang's own"


def _succeeded(done: Any) -> bool:  # noqa: ANN401 - SGLang's answer, or a pair before it had a type of its own
    success = cast("Any", done[0]) if isinstance(done, tuple) else getattr(done, "success", False)
    return bool(success)


def _is_question(request: Any) -> bool:  # noqa: ANN401
    _, order = unpack(request.zmq_handles)
    return order is not None and order.do == "status"


def _answer(*, success: bool, message: str) -> Any:  # noqa: ANN401
    return compat.answer_type()(success=success, message=message)


def _encode(answer: ReplicaReports) -> str:
    return msgspec.json.encode(answer).decode()
