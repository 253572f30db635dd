"""Whether a checkpoint fits a model: what is unknown, missing or too large, and how it is refused."""

from __future__ import annotations

from checkpoint_engine.contract.fit import (
    NOT_FILLED,
    TOO_LARGE,
    UNKNOWN,
    Coverage,
    fingerprint,
    missing,
    refuse,
    too_large,
    torn,
)

__all__ = [
    "NOT_FILLED",
    "TOO_LARGE",
    "UNKNOWN",
    "Coverage",
    "fingerprint",
    "missing",
    "refuse",
    "too_large",
    "torn",
]
