"""Skips what this machine cannot run."""

from __future__ import annotations

import gc
import os
import signal

import pytest
import torch


def pytest_configure() -> None:
    # A shell without job control starts what runs in the background with SIGINT ignored, and children inherit that:
    # the commands under test could not be interrupted.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Dozens of processes import torch: it shall be compiled once, not by each of them.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def pytest_collection_finish() -> None:
    gc.freeze()  # what is imported stays: tests that look for leaks need not go through all of it each time


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))
