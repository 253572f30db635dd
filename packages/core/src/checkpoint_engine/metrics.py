"""Figures of updates for Prometheus: on the parameter server's side, and beside an engine's own."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from checkpoint_engine.contract.failure import Failure
from checkpoint_engine.contract.figures import UpdateFigures
from checkpoint_engine.errors import MissingDependencyError, SenderAbortedError

__all__ = ["UpdateMetrics", "engine_metrics"]

_PREFIX = "checkpoint_engine"
_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_STEPS = ("check", "load", "finish")
_NUMBER = re.compile(r"(\d+)\D*$")


class UpdateMetrics:
    """The metrics of one process."""

    def __init__(self, registry: Any = None) -> None:  # noqa: ANN401 - prometheus_client's own
        """Adds them to a registry; to the process's own if None.

        Raises:
            MissingDependencyError: prometheus-client is not installed.
        """
        prometheus = _prometheus()
        own = {"registry": registry or prometheus.REGISTRY}
        # Several processes of an engine may share their metrics through files: the last word counts then.
        latest = {**own, "multiprocess_mode": "mostrecent"}
        self._seconds = prometheus.Histogram(
            f"{_PREFIX}_update_seconds", "Seconds of an update, by phase.", ["phase"], buckets=_BOUNDS, **own
        )
        self._bytes = prometheus.Counter(f"{_PREFIX}_update_bytes", "Bytes of tensors that updates brought.", **own)
        self._rate = prometheus.Gauge(
            f"{_PREFIX}_update_bytes_per_second", "Of the last update that succeeded.", **latest
        )
        self._failures = prometheus.Counter(
            f"{_PREFIX}_update_failures", "Updates that failed, by class of error and phase.", ["kind", "phase"], **own
        )
        self._dirty = prometheus.Gauge(
            f"{_PREFIX}_weights_dirty", "1 while weights may be a mixture of old and new.", **latest
        )
        self._number = prometheus.Gauge(
            f"{_PREFIX}_weights_version", "The last number in the version of the weights; -1: it has none.", **latest
        )
        # Shared files keep every label for ever: there the number must do.
        shared = "PROMETHEUS_MULTIPROC_DIR" in os.environ
        name, help_text = f"{_PREFIX}_weights_version_info", "The version of the weights, as a label."
        self._named = None if shared else prometheus.Gauge(name, help_text, ["version"], **own)
        self._version: str | None = None

    def succeeded(self, seconds: Mapping[str, float], nbytes: int, version: str) -> None:
        """Notes an update; `seconds` by phase, with `total` among them."""
        for phase, duration in seconds.items():
            self._seconds.labels(phase).observe(duration)
        self._bytes.inc(nbytes)
        total = seconds.get("total", 0.0)
        self._rate.set(nbytes / total if total > 0 else 0.0)
        self._dirty.set(0)
        self._hold(version)

    def failed(self, kind: str, phase: str, *, dirty: bool | None = None) -> None:
        """Notes a failure; `dirty` says whether weights may be a mixture, None if nobody knows."""
        self._failures.labels(kind or "unknown", phase).inc()
        if dirty is not None:
            self._dirty.set(int(dirty))

    def observe(self, reports: Sequence[Mapping[str, Any]]) -> None:
        """Notes an update by what an engine's workers say of it: a report and figures in one map each.

        Seconds and bytes are those of the worker that took longest, and most.
        """
        failures = [
            Failure.of_worker(number, str(report.get("phase", "")), str(report.get("error", "")))
            for number, report in enumerate(reports)
            if not report.get("ok", True)
        ]
        if failures:
            first = min(failures, key=lambda each: each.error == SenderAbortedError.__name__)
            self.failed(first.error, first.phase.value, dirty=any(bool(each.get("dirty")) for each in reports))
        if failures or not reports:
            return
        figures = [UpdateFigures.from_details(report) for report in reports]
        seconds = {step: max(float(getattr(each, f"{step}_seconds")) for each in figures) for step in _STEPS}
        seconds["total"] = max(float(report.get("seconds", 0.0)) for report in reports)
        nbytes = max(each.plan_bytes + each.loader_bytes for each in figures)
        self.succeeded(seconds, nbytes, str(reports[0].get("version", "")))

    def _hold(self, version: str) -> None:
        number = _NUMBER.search(version)
        self._number.set(int(number[1]) if number else -1)
        if self._named is None or version == self._version:
            return
        if self._version is not None:
            self._named.remove(self._version)
        self._named.labels(version).set(1)
        self._version = version


_of_engine: list[UpdateMetrics] = []
"""At most one in a process: the engine's registry takes each name once."""


def engine_metrics() -> UpdateMetrics | None:
    """Those that show in the `/metrics` of the engine whose process this is; None without prometheus-client."""
    if not _of_engine:
        try:
            _of_engine.append(UpdateMetrics())
        except MissingDependencyError:
            return None
    return _of_engine[0]


def _prometheus() -> Any:  # noqa: ANN401 - imported where it is there
    try:
        return importlib.import_module("prometheus_client")
    except ImportError as error:
        raise MissingDependencyError(
            "metrics need prometheus-client, which is missing: pip install 'checkpoint-engine-core[api]'"
        ) from error
