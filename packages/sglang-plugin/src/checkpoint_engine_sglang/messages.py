"""What the server's front and its workers tell each other.

SGLang has one kind of request that reaches every worker with a dictionary of our own in it; both ride on that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from checkpoint_engine.sdk import EngineRequestError, limits
from checkpoint_engine.sdk.client import Failure, Phase, describe_failures

__all__ = [
    "BUSY",
    "Order",
    "ReplicaReports",
    "Report",
    "decode_reports",
    "failures_in",
    "pack",
    "unpack",
]

_ORDER = "checkpoint_engine:order"
"""Key of the order among the handles."""

BUSY = Phase.WAIT.value
"""Phase of a report that refuses because requests still hold the cache: nothing has begun, ask again."""


class Order(msgspec.Struct, frozen=True):
    """What the workers are to do."""

    do: Literal["update", "verify", "status", "adapter"] = "update"
    version: str = ""
    timeout: float = limits.UPDATE
    door: str = ""
    """The way in that it came by, for people."""
    give_up: str = ""
    """Path of a file: once it is there, workers of the front's host give up."""
    adapter: tuple[str, str, str, bool] = ("", "", "", False)
    """A LoRA adapter's identity, its name for SGLang, the directory of its files, and whether it is pinned."""


class Report(msgspec.Struct, frozen=True):
    """What one worker says of itself. `dirty`: its weights, or those of its engine, may be a mixture."""

    rank: int
    """Among the workers of all replicas."""
    ok: bool = True
    dirty: bool = False
    complete: bool = False
    """Whether it holds the weights of the update that it was asked for, also where nobody could be told."""
    version: str = ""
    update: str = ""
    """The one that brought its weights, as the client names it."""
    updating: bool = False
    partial: bool = False
    """Whether `version` brought a part of the weights, over those of `whole_version`."""
    whole_version: str = ""
    error: str = ""
    phase: str = ""
    seconds: float = 0.0
    details: dict[str, str | int | float] = {}
    door: str = ""
    """By which way the last update that succeeded came in."""
    last_update: dict[str, str | int | float] = {}
    """Its figures."""
    role: str = ""
    """Its tensor-parallel rank, pipeline stage and replica, for people."""
    lost_hooks: dict[str, str] = {}
    """Hooks that did not find their place in this process, and why."""


class ReplicaReports(msgspec.Struct, frozen=True):
    """What all workers of one replica say."""

    reports: list[Report]
    stages: int = 1
    """Pipeline stages."""
    problem: str = ""
    """What went wrong after all workers had the new weights."""


def pack(handles: Mapping[str, str], order: Order) -> dict[str, str]:
    """The dictionary that travels."""
    return {**handles, _ORDER: msgspec.json.encode(order).decode()}


def unpack(handles: Mapping[str, str]) -> tuple[dict[str, str], Order | None]:
    """The handles, and the order; None if the request does not come from our front."""
    found = dict(handles)
    text = found.pop(_ORDER, None)
    return found, None if text is None else msgspec.json.decode(text, type=Order)


def decode_reports(text: str) -> ReplicaReports:
    """What a worker's message says.

    Raises:
        EngineRequestError: it is not from one of our workers; then it is SGLang's own words.
    """
    try:
        return msgspec.json.decode(text, type=ReplicaReports)
    except msgspec.MsgspecError:
        raise EngineRequestError(f"the workers answered as SGLang's own do, not as the plugin's: {text}") from None


def failures_in(reports: list[Report]) -> str:
    """The failures of several workers in one sentence; empty if there is none."""
    return describe_failures(
        Failure.of_worker(report.rank, report.phase, report.error) for report in reports if not report.ok
    )
