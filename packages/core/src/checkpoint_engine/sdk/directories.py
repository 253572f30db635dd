"""Directories for a plugin's own files."""

from __future__ import annotations

from checkpoint_engine.owned_directory import OwnedDirectory

__all__ = ["OwnedDirectory"]
