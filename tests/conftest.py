"""Skips what this machine cannot run."""

from __future__ import annotations

import signal

import pytest
import torch


def pytest_configure() -> None:
    # A shell without job control starts what runs in the background with SIGINT ignored, and children inherit that:
    # the commands under test could not be interrupted.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))
