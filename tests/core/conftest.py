"""What tests of the core start again and again."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from checkpoint_engine.cli.main import main
from tests.core.cluster import Cluster, assert_no_threads_left
from tests.core.p2p_processes import ENVIRONMENT


@pytest.fixture
def set_bucket_size(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Updates of this test come in buckets of so many bytes at the most."""
    return lambda nbytes: monkeypatch.setenv("PS_MAX_BUCKET_SIZE_GB", str(nbytes / (1 << 30)))


@pytest.fixture
def p2p_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of the processes in `p2p_processes`."""
    for variable, value in ENVIRONMENT.items():
        monkeypatch.setenv(variable, value)


@pytest.fixture
def unshared(p2p_environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As everybody's environment is who only updates some of their own ranks."""
    monkeypatch.delenv("CHECKPOINT_ENGINE_P2P")


@pytest.fixture
def clusters() -> Iterator[Callable[[int], Cluster]]:
    """Makes clusters of so many ranks; they end with the test, and all their threads with them."""
    made: list[Cluster] = []

    def make(size: int) -> Cluster:
        made.append(Cluster(size))
        return made[-1]

    yield make
    for cluster in made:
        cluster.close()
    assert_no_threads_left()


@pytest.fixture
def pair(clusters: Callable[[int], Cluster]) -> Cluster:
    return clusters(2)


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory for Unix sockets, whose paths have 107 bytes at most; those of `tmp_path` can be longer."""
    with tempfile.TemporaryDirectory(prefix="ce-") as directory:
        yield Path(directory)


@pytest.fixture
def on_tmpfs() -> Iterator[Path]:
    """A directory whose files are memory."""
    if not os.path.ismount("/dev/shm"):
        pytest.skip("no tmpfs on /dev/shm")
    directory = Path(tempfile.mkdtemp(prefix="checkpoint-engine-test-", dir="/dev/shm"))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def run_main(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """`checkpoint-engine` within this process: exit code, and what it said to standard output and error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["checkpoint-engine", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return run
