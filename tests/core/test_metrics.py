"""Figures of updates, as Prometheus reads them."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from checkpoint_engine.metrics import UpdateMetrics

pytestmark = pytest.mark.pure

NAME = "checkpoint_engine_"
REPORT = {"ok": True, "dirty": False, "seconds": 2.0, "load_seconds": 1.5, "plan_bytes": 3000, "loader_bytes": 1000}


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def test_what_an_engines_workers_report(registry: CollectorRegistry) -> None:
    metrics = UpdateMetrics(registry)
    metrics.observe([{**REPORT, "version": "step-8"}, {**REPORT, "seconds": 4.0, "version": "step-8"}])
    read = registry.get_sample_value
    assert read(f"{NAME}update_seconds_sum", {"phase": "total"}) == 4.0
    assert read(f"{NAME}update_seconds_sum", {"phase": "load"}) == 1.5
    assert read(f"{NAME}update_bytes_total") == 4000
    assert read(f"{NAME}update_bytes_per_second") == 1000
    assert read(f"{NAME}weights_version") == 8
    assert read(f"{NAME}weights_version_info", {"version": "step-8"}) == 1


def test_only_the_version_held_is_a_label(registry: CollectorRegistry) -> None:
    metrics = UpdateMetrics(registry)
    for version in ("step-8", "base", "base"):
        metrics.succeeded({"total": 1.0}, 10, version)
    (info,) = (family for family in registry.collect() if family.name == f"{NAME}weights_version_info")
    assert [sample.labels for sample in info.samples] == [{"version": "base"}]
    assert registry.get_sample_value(f"{NAME}weights_version") == -1


def test_a_failure_is_counted_by_class_and_phase_and_says_what_is_held(registry: CollectorRegistry) -> None:
    metrics = UpdateMetrics(registry)
    failed = {"ok": False, "dirty": True, "phase": "load", "error": "LinkError: it broke", "version": "old"}
    told = {**failed, "error": "SenderAbortedError: another failed", "phase": "finish"}
    metrics.observe([REPORT, told, failed, told])
    labels = {"kind": "LinkError", "phase": "load"}
    assert registry.get_sample_value(f"{NAME}update_failures_total", labels) == 1
    assert registry.get_sample_value(f"{NAME}weights_dirty") == 1
    metrics.failed("SettingError", "start")  # nobody knows more of the weights than before
    assert registry.get_sample_value(f"{NAME}weights_dirty") == 1
    metrics.observe([REPORT])
    assert registry.get_sample_value(f"{NAME}weights_dirty") == 0
