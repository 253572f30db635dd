"""Updates as OpenTelemetry spans, made of the trace that a rank keeps; nothing where nobody listens."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

from checkpoint_engine.transfer.order import UpdateOrder
from checkpoint_engine.transfer.report import UpdateReport
from checkpoint_engine.transfer.trace import RankTrace
from checkpoint_engine.version import __version__

__all__ = ["is_listened_to", "run_told", "send_failure", "send_spans"]

_UPDATE = "checkpoint_engine.update"
_NANOSECONDS = 1_000_000_000


def is_listened_to() -> bool:
    """Whether this process has set OpenTelemetry up to record spans."""
    # Whoever has set it up has imported its SDK; without that its API gives out spans that record nothing.
    return "opentelemetry.sdk.trace" in sys.modules and _api() is not None


def run_told(order: UpdateOrder, run: Callable[[], UpdateReport]) -> UpdateReport:
    """Runs an update, tells of it if somebody listens, and returns its report, with the trace if that was asked for."""
    if not is_listened_to():
        return run()
    begin = time.time_ns()
    try:
        report = run()
    except Exception as error:
        send_failure(error, order.version, begin, time.time_ns())
        raise
    send_spans(report)
    return report if order.trace else replace(report, trace=None)


def send_spans(report: UpdateReport) -> None:
    """A span for the update, below the caller's own, and one for each step and each bucket's copy, broadcast, load."""
    api, trace = _api(), report.trace
    if api is None or trace is None or not trace.spans:
        return
    about = {
        "version": report.version,
        "method": report.method,
        "bytes": report.nbytes,
        "tensors": report.tensors,
        "rank": trace.rank,
        "device": trace.device,
    }
    tracer = api.get_tracer("checkpoint_engine", __version__)
    begin, end = min(span.begin for span in trace.spans), max(span.end for span in trace.spans)
    whole = tracer.start_span(_UPDATE, start_time=_unix(trace, begin), attributes=_named(about))
    inside = api.set_span_in_context(whole)
    for span in sorted(trace.spans, key=lambda span: span.begin):
        more = {"bucket": span.bucket, "bytes": span.nbytes or None, "lane": span.lane}
        attributes = _named({name: value for name, value in more.items() if value is not None})
        start = _unix(trace, span.begin)
        part = tracer.start_span(f"checkpoint_engine.{span.name}", inside, start_time=start, attributes=attributes)
        part.end(_unix(trace, span.end))
    whole.end(_unix(trace, end))


def send_failure(error: Exception, version: str, begin: int, end: int) -> None:
    """A span for an update that failed, with its error; times in nanoseconds since 1970."""
    api = _api()
    if api is None:
        return
    tracer = api.get_tracer("checkpoint_engine", __version__)
    span = tracer.start_span(_UPDATE, start_time=begin, attributes=_named({"version": version}))
    span.record_exception(error)
    span.set_status(api.Status(api.StatusCode.ERROR, str(error)))
    span.end(end)


@cache
def _api() -> Any:  # noqa: ANN401 - imported where it is there
    try:
        return importlib.import_module("opentelemetry.trace")
    except ImportError:
        return None


def _named(attributes: dict[str, Any]) -> dict[str, Any]:
    return {f"checkpoint_engine.{name}": value for name, value in attributes.items()}


def _unix(trace: RankTrace, seconds: float) -> int:
    return int((seconds + trace.wall) * _NANOSECONDS)
