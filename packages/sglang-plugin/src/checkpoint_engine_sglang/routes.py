"""Paths that the plugin adds to SGLang's HTTP server, and the names of modes that both sides must know."""

from __future__ import annotations

__all__ = ["ABORT", "ADAPTER", "STATUS", "UPDATE", "VERIFY"]

STATUS = "/checkpoint_engine/status"
"""`GET`: what every worker holds, the gate, and which hooks found their place."""

UPDATE = "/checkpoint_engine/update"
"""`POST`: take an update."""

VERIFY = "/checkpoint_engine/verify"
"""`POST`: compare the weights with what a parameter server offers."""

ABORT = "/checkpoint_engine/abort"
"""`POST`: give up the update, or comparison, under way."""

ADAPTER = "/checkpoint_engine/adapter"
"""`POST`: take a LoRA adapter, in place of what has its name."""
