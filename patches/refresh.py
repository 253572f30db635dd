"""Puts `reloadable.py` as it is now into every patch: `python patches/refresh.py [--check]`."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
NEW_FILE = "vllm/model_executor/layers/quantization/utils/reloadable.py"
_ITS_DIFF = re.compile(rf"--- /dev/null\n\+\+\+ b/{re.escape(NEW_FILE)}\n@@ [^\n]*\n(?:\+[^\n]*\n)*")


def as_diff(source: str) -> str:
    """The diff that creates the file."""
    lines = source.splitlines()
    body = "".join(f"+{line}\n" for line in lines)
    return f"--- /dev/null\n+++ b/{NEW_FILE}\n@@ -0,0 +1,{len(lines)} @@\n{body}"


def refreshed() -> dict[Path, str]:
    """What the files beside this one should hold."""
    source = (HERE / "reloadable.py").read_text()
    files: dict[Path, str] = {}
    for path in sorted((HERE / "vllm").glob("*.patch")):
        before, _, after = _ITS_DIFF.sub("\0", path.read_text(), count=1).partition("\0")
        files[path] = before + as_diff(source) + after
    table = HERE / "vllm" / "versions.json"
    versions = json.loads(table.read_text())
    for hashes in versions.values():
        hashes[NEW_FILE] = [None, hashlib.sha256(source.encode()).hexdigest()]
    files[table] = json.dumps(versions, indent=1) + "\n"
    return files


def main() -> None:
    """Writes what is out of date, or with `--check` fails because of it."""
    for path, content in refreshed().items():
        if path.read_text() == content:
            continue
        if "--check" in sys.argv:
            sys.exit(f"{path.name} is out of date: run python patches/refresh.py")
        path.write_text(content)


if __name__ == "__main__":
    main()
