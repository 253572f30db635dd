"""Skips what this machine cannot run, and tells which tests are fast."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
from collections.abc import Iterator
from multiprocessing.process import BaseProcess

import pytest
import torch

FAST_SECONDS = 1.0


def pytest_configure() -> None:
    # A shell without job control starts what runs in the background with SIGINT ignored, and children inherit that:
    # the commands under test could not be interrupted.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Dozens of processes import torch: it shall be compiled once, not by each of them.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    # Whether an update proves a plan shall not hang on what ran before.
    os.environ["CHECKPOINT_ENGINE_PROOFS"] = "off"


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two processes for all that is not long: much of it waits. A few files are done before a second one is up."""
    everything = config.args == config.getini("testpaths") and "not long" in config.option.markexpr
    return 2 if everything and not torch.cuda.is_available() else 0


def pytest_collection_finish() -> None:
    gc.freeze()  # what is imported stays: tests that look for leaks need not go through all of it each time


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("pure") and not item.get_closest_marker("thorough"):
            item.add_marker(pytest.mark.fast)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))


@pytest.fixture(autouse=True)
def _no_process(request: pytest.FixtureRequest) -> Iterator[None]:
    """Holds fast tests to what they are."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a fast test starts no process: mark it as thorough")

    with pytest.MonkeyPatch.context() as patch:
        if request.node.get_closest_marker("fast"):
            patch.setattr(subprocess.Popen, "__init__", refuse)
            patch.setattr(BaseProcess, "start", refuse)
        yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for report in terminalreporter.getreports("passed"):
        if report.when == "call" and report.duration > FAST_SECONDS and "fast" in report.keywords:
            terminalreporter.write_line(f"SLOW {report.nodeid}: {report.duration:.1f} s, is it thorough?", yellow=True)
