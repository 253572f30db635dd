"""Writes one version into the workspace and its packages, and the plugins' pin of the core.

uv run python scripts/set_version.py 0.2.0
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
_VERSION = re.compile(r'^version = "[^"]*"$', re.MULTILINE)
_PIN = re.compile(r'"checkpoint-engine-core(\[[^\]]*\])?~=[^"]*"')


def files() -> list[Path]:
    """All that say a version."""
    return [ROOT / "pyproject.toml", *sorted((ROOT / "packages").glob("*/pyproject.toml"))]


def main() -> None:
    """Writes."""
    if len(sys.argv) != 2 or not re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", sys.argv[1]):  # noqa: PLR2004
        raise SystemExit("usage: set_version.py X.Y.Z")
    version = sys.argv[1]
    minor = ".".join(version.split(".")[:2])
    for path in files():
        text, count = _VERSION.subn(f'version = "{version}"', path.read_text(encoding="utf-8"), count=1)
        if not count:
            raise SystemExit(f"{path} says no version")
        path.write_text(
            _PIN.sub(lambda pin: f'"checkpoint-engine-core{pin[1] or ""}~={minor}.0"', text), encoding="utf-8"
        )
    print("written; now: uv lock")


if __name__ == "__main__":
    main()
