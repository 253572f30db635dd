"""Updates as spans of the real OpenTelemetry SDK."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from checkpoint_engine.errors import UpdateError
from tests.core.cluster import Cluster, check

_exporter = InMemorySpanExporter()


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    if not isinstance(trace.get_tracer_provider(), TracerProvider):  # once in a process
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(_exporter))
        trace.set_tracer_provider(provider)
    _exporter.clear()
    yield _exporter
    _exporter.clear()


def test_an_update_is_a_span_of_the_callers_with_its_steps_below(
    spans: InMemorySpanExporter, clusters: Callable[[int], Cluster]
) -> None:
    cluster = clusters(1)
    cluster.register("a", {"t": torch.ones(1000), "u": torch.ones(10)})
    with trace.get_tracer("trainer").start_as_current_span("step"):
        cluster.servers[0].update("a", cluster.asker(0))
    found = {span.name: span for span in spans.get_finished_spans()}
    whole, step = found["checkpoint_engine.update"], found["step"]
    assert whole.parent is not None
    assert whole.parent.span_id == step.context.span_id
    assert step.start_time <= whole.start_time <= whole.end_time <= step.end_time
    assert whole.attributes is not None
    assert whole.attributes["checkpoint_engine.version"] == "a"
    assert whole.attributes["checkpoint_engine.tensors"] == 2
    parts = [
        span for span in spans.get_finished_spans() if span.parent and span.parent.span_id == whole.context.span_id
    ]
    assert {"checkpoint_engine.introduce", "checkpoint_engine.plan"} <= {span.name for span in parts}
    assert all(whole.start_time <= span.start_time <= span.end_time <= whole.end_time for span in parts)
    loads = [span for span in parts if span.attributes and span.attributes["checkpoint_engine.lane"] == "load"]
    assert sum(int(span.attributes["checkpoint_engine.bytes"]) for span in loads if span.attributes) >= 4040
    report = cluster.servers[0].last_report
    assert report is not None
    assert report.trace is None  # nobody asked this caller's report for it


def test_a_failed_update_is_a_span_with_its_error(
    spans: InMemorySpanExporter, clusters: Callable[[int], Cluster]
) -> None:
    cluster = clusters(1)
    cluster.register("a", {"t": torch.ones(10)})

    def refuse(_: object) -> None:
        raise RuntimeError("the engine is busy")

    with pytest.raises(UpdateError):
        cluster.servers[0].update("a", refuse)
    (span,) = spans.get_finished_spans()
    assert (span.name, span.status.status_code) == ("checkpoint_engine.update", trace.StatusCode.ERROR)
    assert "the engine is busy" in str(span.status.description)
    assert [event.name for event in span.events] == ["exception"]


def test_nothing_is_traced_where_nobody_listens(
    clusters: Callable[[int], Cluster], monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.delitem(sys.modules, "opentelemetry.sdk.trace")
    _exporter.clear()
    cluster = clusters(1)
    cluster.register("a", {"t": torch.ones(10)})
    check(cluster.on_all(lambda server: server.update("a", cluster.asker(server.rank))))
    assert not _exporter.get_finished_spans()
