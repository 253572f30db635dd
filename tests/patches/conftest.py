"""vLLM's own files, from the wheels of its releases."""

from __future__ import annotations

import shutil
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.patches.vllm_sources import VERSIONS, extract, wheel_urls

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(scope="session")
def index() -> None:
    """Skips where there is no network at all; anything else that goes wrong is an error."""
    try:
        wheel_urls()
    except httpx.TransportError as error:
        pytest.skip(f"no network: {error}")


@pytest.fixture
def vllm(index: None, tmp_path: Path, downloads: Path) -> Callable[[str], Path]:
    """Makes a directory as `site-packages` is, with those files of a vLLM that its patch changes."""

    def make(version: str) -> Path:
        kept = downloads / version
        if not kept.exists():
            beside = {str(PurePosixPath(file).parent / "__init__.py") for file in VERSIONS[version]}
            files = {*VERSIONS[version], *beside, "vllm/__init__.py", "vllm/_version.py"}
            extract(version, kept, lambda name: name in files or name.endswith(".dist-info/METADATA"))
        return Path(shutil.copytree(kept, tmp_path / "site-packages"))

    return make


@pytest.fixture(scope="session")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")
