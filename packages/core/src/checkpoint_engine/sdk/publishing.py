"""Bringing a trainer's tensors to engines, for the trainer's side of an engine's own interface."""

from __future__ import annotations

from checkpoint_engine.server.parameter_server import ParameterServer

__all__ = ["ParameterServer"]
