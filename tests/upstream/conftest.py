"""Fixtures shared with the tests of the core."""

from __future__ import annotations

from tests.core.conftest import p2p_environment

__all__ = ["p2p_environment"]
