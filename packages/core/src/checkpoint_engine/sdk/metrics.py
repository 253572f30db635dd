"""Figures of updates in an engine's own `/metrics`."""

from __future__ import annotations

from checkpoint_engine.metrics import UpdateMetrics, engine_metrics

__all__ = ["UpdateMetrics", "engine_metrics"]
