"""What vLLM keeps of an update between start and finish, in the worker itself, where its engines do not reach.

Seen in 0.25 to 0.33: a session that is started and never finished, because a trainer died or a finish failed, makes
every later start fail; and a worker in which an update failed forgets its session while the others keep theirs.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

__all__ = ["end", "heal_starts", "worker_in_the_making"]

logger = logging.getLogger(f"vllm.{__name__}")

_ACTIVE = "_weight_update_active"
_STARTS = ("start_weight_update", "start_draft_weight_update")


def worker_in_the_making(vllm_config: object) -> Any:  # noqa: ANN401 - vLLM's own class
    """The worker that makes its weight-transfer engine right now; None if this is called from elsewhere.

    vLLM hands an engine the model and its configuration; the draft model and loaded adapters are known to the worker
    alone, whose method is among the callers.
    """
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if getattr(caller, "vllm_config", None) is vllm_config and hasattr(caller, "model_runner"):
            return caller
        frame = frame.f_back
    return None


def end(worker: object) -> None:
    """Lets the next start begin anew, whatever became of this session."""
    if hasattr(worker, _ACTIVE):
        setattr(worker, _ACTIVE, False)


def heal_starts(worker: Any, give_up: Callable[[], None]) -> None:  # noqa: ANN401 - vLLM's own class
    """Has `give_up` called where a session is started while another one is open, in place of vLLM's refusal."""
    for name in _STARTS:
        start: Callable[[], None] | None = getattr(worker, name, None)
        if start is not None:
            setattr(worker, name, _anew(worker, start, give_up))


def _anew(worker: object, start: Callable[[], None], give_up: Callable[[], None]) -> Callable[[], None]:
    def start_anew() -> None:
        if getattr(worker, _ACTIVE, False):
            logger.warning("a weight update was started and never finished; it is given up for the one that starts now")
            give_up()
            end(worker)
        start()

    return start_anew
