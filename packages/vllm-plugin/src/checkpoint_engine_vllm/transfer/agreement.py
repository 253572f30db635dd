"""Has all workers of an engine fail if one does: vLLM's sessions are kept by each worker on its own."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch

from checkpoint_engine.sdk import CheckpointEngineError, WorkerError, limits

__all__ = ["all_or_none"]

_TEXT = 512
"""Bytes of what a worker tells the others of its failure."""

_Result = TypeVar("_Result")
_dist: Any = torch.distributed
"""Whose functions torch leaves without types."""


def all_or_none(what: str, do: Callable[[], _Result]) -> _Result:
    """Does something on every worker; all call this together.

    Raises:
        Exception: what `do` raised here.
        WorkerError: it succeeded here and not on another worker, which is named.
    """
    group = _workers()
    if group is None:
        return do()
    result, failed = None, None
    try:
        result = do()
    except Exception as error:  # noqa: BLE001 - raised below, once the others know of it
        failed = error
    told = _tell_all(group, "" if failed is None else f"{type(failed).__name__}: {failed}", what)
    if failed is not None:
        raise failed
    for rank, text in enumerate(told):
        if text:
            raise WorkerError(f"{what} succeeded here, but not on worker {rank}: {text}")
    return result  # type: ignore[return-value]


def _workers() -> Any:  # noqa: ANN401 - vLLM's own class
    """All workers of the engine as a group; None if there is one."""
    try:
        group: Any = importlib.import_module("vllm.distributed").get_world_group()
    except (ImportError, AttributeError, AssertionError):  # vLLM asserts that workers are connected
        return None
    return group.cpu_group if group.world_size > 1 else None


def _tell_all(group: Any, text: str, what: str) -> list[str]:  # noqa: ANN401 - a group of torch's
    mine = torch.zeros(_TEXT, dtype=torch.uint8)
    raw = text.encode()[:_TEXT]
    if raw:
        mine[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    all_of_them = [torch.zeros_like(mine) for _ in range(_dist.get_world_size(group))]
    try:
        _dist.all_gather(all_of_them, mine, group=group, async_op=True).wait(timedelta(seconds=limits.UPDATE))
    except RuntimeError as error:
        raise CheckpointEngineError(
            f"{what}: the engine's other workers did not answer within {limits.UPDATE:g} s ({error}); see vLLM's log"
        ) from error
    return [theirs.numpy().tobytes().rstrip(b"\0").decode(errors="replace") for theirs in all_of_them]
