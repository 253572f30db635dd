"""Sources of vLLM's releases: members of their wheels, read in ranges from the index that pip is set up with."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import urllib.parse
import zipfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]
VERSIONS: dict[str, dict[str, list[str | None]]] = json.loads((ROOT / "patches" / "vllm" / "versions.json").read_text())
PYPI = "https://pypi.org/simple"
RANGE = 1 << 20


def extract(version: str, into: Path, wanted: Callable[[str], bool]) -> None:
    """Puts those files of a release's wheel into a directory."""
    with httpx.Client(timeout=60, follow_redirects=True) as http:
        wheel = zipfile.ZipFile(io.BufferedReader(_Remote(http, wheel_urls()[version]), RANGE))
        for name in wheel.namelist():
            if wanted(name):
                wheel.extract(name, into)


@cache
def wheel_urls() -> dict[str, str]:
    """Where the x86-64 wheel of each version lies."""
    found: dict[str, str] = {}
    for index in _indexes():
        page = f"{index.rstrip('/')}/vllm/"
        answer = httpx.get(
            page,
            headers={"Accept": "application/vnd.pypi.simple.v1+json, text/html;q=0.5"},
            timeout=60,
            follow_redirects=True,
        )
        if answer.status_code == 404:
            continue
        answer.raise_for_status()
        if "json" in answer.headers["content-type"]:
            links = [file["url"] for file in json.loads(answer.text)["files"]]
        else:
            links = re.findall(r"""href=["']([^"'#]+)""", answer.text)
        for link in links:
            name = urllib.parse.unquote(link.rsplit("/", 1)[-1])
            if name.endswith("x86_64.whl"):
                found.setdefault(name.split("-")[1], urllib.parse.urljoin(page, link))
    return found


def _indexes() -> list[str]:
    """As pip or uv would use them; local directories have no vLLM."""
    names = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL")
    said = [os.environ[name] for name in names if os.environ.get(name)]
    for key in ("global.index-url", "global.extra-index-url"):
        command = [sys.executable, "-m", "pip", "config", "get", key]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        said += [done.stdout] if done.returncode == 0 else []
    urls = [url for text in said for url in text.split() if url.startswith("http")]
    return list(dict.fromkeys([*urls, PYPI]))


class _Remote(io.RawIOBase):
    """A file on a server that answers ranges."""

    def __init__(self, http: httpx.Client, url: str) -> None:
        self._http, self._url, self._at = http, url, 0
        answer = http.head(url)
        answer.raise_for_status()
        self._size = int(answer.headers["content-length"])

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = min(len(buffer), self._size - self._at)
        if count <= 0:
            return 0
        answer = self._http.get(self._url, headers={"Range": f"bytes={self._at}-{self._at + count - 1}"})
        assert answer.status_code == 206, f"{self._url}: the index does not answer ranges ({answer.status_code})"
        buffer[:count] = answer.content
        self._at += count
        return count
