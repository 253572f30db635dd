"""What the server's front and its workers tell each other.

SGLang has one kind of request that reaches every worker with a dictionary of our own in it; both ride on that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from checkpoint_engine.errors import EngineRequestError

ORDER = "checkpoint_engine:order"
"""Key of the order among the handles."""

DEFAULT_SECONDS = 600.0

BUSY = "wait for requests"
"""Phase of a report that refuses because requests still hold the cache: nothing has begun, ask again."""


class Order(msgspec.Struct, frozen=True):
    """What the workers are to do."""

    do: Literal["update", "verify", "status"] = "update"
    version: str = ""
    timeout: float = DEFAULT_SECONDS


class Report(msgspec.Struct, frozen=True):
    """What one worker says of itself. `dirty`: its weights, or those of its engine, may be a mixture."""

    rank: int
    """Among the workers of all replicas."""
    ok: bool = True
    dirty: bool = False
    version: str = ""
    updating: bool = False
    error: str = ""
    phase: str = ""
    seconds: float = 0.0
    details: dict[str, str | int | float] = {}
    role: str = ""
    """Its tensor-parallel rank, pipeline stage and replica, for people."""
    lost_hooks: dict[str, str] = {}
    """Hooks that did not find their place in this process, and why."""


class Answer(msgspec.Struct, frozen=True):
    """What all workers of one replica say."""

    reports: list[Report]
    stages: int = 1
    """Pipeline stages."""
    problem: str = ""
    """What went wrong after all workers had the new weights."""


def pack(handles: Mapping[str, str], order: Order) -> dict[str, str]:
    """The dictionary that travels."""
    return {**handles, ORDER: msgspec.json.encode(order).decode()}


def unpack(handles: Mapping[str, str]) -> tuple[dict[str, str], Order | None]:
    """The handles, and the order; None if the request does not come from our front."""
    found = dict(handles)
    text = found.pop(ORDER, None)
    return found, None if text is None else msgspec.json.decode(text, type=Order)


def decode_answer(text: str) -> Answer:
    """What a worker's message says.

    Raises:
        EngineRequestError: it is not from one of our workers; then it is SGLang's own words.
    """
    try:
        return msgspec.json.decode(text, type=Answer)
    except msgspec.MsgspecError:
        raise EngineRequestError(f"the workers answered as SGLang's own do, not as the plugin's: {text}") from None


def describe_failures(reports: list[Report]) -> str:
    """The failures of several workers in one sentence; empty if there is none."""
    failures: dict[str, list[str]] = {}
    for report in reports:
        if not report.ok:
            failures.setdefault(f"failed in {report.phase}: {report.error}", []).append(str(report.rank))
    return "; ".join(f"worker {', '.join(ranks)} {text}" for text, ranks in failures.items())
