"""Records what vLLM's loader does before the first weights come: once an engine has started, and serves nobody yet."""

from __future__ import annotations

import functools
import importlib
import logging
import sys
import time
from typing import Any

from checkpoint_engine_vllm.protocols import Worker

__all__ = ["register"]

logger = logging.getLogger(f"vllm.{__name__}")  # below vLLM's own, which decides on what its users see

_WORKERS = "vllm.v1.worker.worker_base"
_LAST_OF_START = "compile_or_warm_up_model"
_MARK = "_checkpoint_engine_ahead"


def register() -> None:
    """Has each worker of this process do so at the end of its start; nothing in a process that has imported none."""
    wrapper: Any = getattr(sys.modules.get(_WORKERS), "WorkerWrapperBase", None)
    if wrapper is None or hasattr(wrapper, _MARK):
        return
    # What the wrapper's class lacks is looked for on its worker.
    finish = getattr(wrapper, _LAST_OF_START, None) or _finish_start

    @functools.wraps(finish)
    def finish_and_record(self: Any, *args: object, **kwargs: object) -> object:  # noqa: ANN401 - vLLM's own class
        finished = finish(self, *args, **kwargs)
        _record(self.worker)
        return finished

    setattr(wrapper, _LAST_OF_START, finish_and_record)
    setattr(wrapper, _MARK, True)


def _finish_start(self: Any, *args: object, **kwargs: object) -> object:  # noqa: ANN401 - vLLM's own class
    return getattr(self.worker, _LAST_OF_START)(*args, **kwargs)


def _record(worker: Worker) -> None:
    """Nothing here ever keeps an engine from starting: what is not recorded now is recorded in the first update."""
    begin = time.perf_counter()
    try:
        sink = importlib.import_module("checkpoint_engine_vllm.extension").state_of(worker).sink  # late, as it is slow
        tensors = sink.record_ahead() if hasattr(sink, "record_ahead") else 0
    except Exception as error:  # noqa: BLE001 - whatever it is, the first update meets it as well, and says so
        logger.info("the reload plan is recorded in the first update, and not now: %r", error)
        return
    if tensors:
        seconds = time.perf_counter() - begin
        logger.info("recorded the reload plan of %d tensors ahead of the first update, in %.1f s", tensors, seconds)
