"""Says what wheels lack to be published: authors, addresses, a section of the changelog, links that work on an index.

uv run python scripts/check_release.py dist
"""

from __future__ import annotations

import re
import sys
import zipfile
from collections.abc import Iterable
from email.message import Message
from email.parser import Parser
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).parents[1]
PACKAGES = ("checkpoint-engine-core", "checkpoint-engine-sglang", "checkpoint-engine-vllm")
URLS = ("Source", "Documentation", "Changelog", "Issues")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_NOWHERE = re.compile(r"^(localhost|.*\.(example|invalid|test|local|localhost)|(.*\.)?example\.(com|net|org))$")


def main() -> None:
    """Ends with 1, and a line for each thing that is missing."""
    if len(sys.argv) != 2:  # noqa: PLR2004
        raise SystemExit("usage: check_release.py DIST")
    metadata = [metadata_of(wheel) for wheel in sorted(Path(sys.argv[1]).glob("*.whl"))]
    lacking = [
        *of_set(metadata, (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")),
        *(f"{each['Name']}: {what}" for each in metadata for what in (*of_project(each), *of_publisher(each))),
    ]
    for what in lacking:
        print(f"missing: {what}", file=sys.stderr)
    if lacking:
        raise SystemExit("not to be published like this; RELEASING.md says what goes where")
    print(f"{len(metadata)} wheels of {metadata[0]['Version']} have all that an index shows")


def metadata_of(wheel: Path) -> Message:
    """What an index reads."""
    with zipfile.ZipFile(wheel) as files:
        (name,) = (name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(files.read(name).decode())


def of_set(metadata: list[Message], changelog: str) -> Iterable[str]:
    """What the wheels lack together."""
    if (names := sorted(str(each["Name"]) for each in metadata)) != sorted(PACKAGES):
        yield f"one wheel of each of {', '.join(PACKAGES)}: there are {', '.join(names) or 'none'}"
    versions = sorted({str(each["Version"]) for each in metadata})
    if len(versions) > 1:
        yield f"one version for all: they have {', '.join(versions)}"
    for version in versions:
        if not re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", changelog, re.MULTILINE):
            yield f"a section '## [{version}] - YYYY-MM-DD' in CHANGELOG.md"


def of_project(metadata: Message) -> Iterable[str]:
    """What the repository has to see to."""
    for target in _LINK.findall(str(metadata.get_payload())):
        if urlsplit(target).scheme != "https":
            yield f"a link that works on an index in place of {target} in its README.md"
    minor = ".".join(str(metadata["Version"]).split(".")[:2])
    needs = [need for need in metadata.get_all("Requires-Dist", []) if need.startswith("checkpoint-engine-core")]
    if metadata["Name"] != "checkpoint-engine-core" and needs != [f"checkpoint-engine-core~={minor}.0"]:
        yield f"checkpoint-engine-core~={minor}.0 as what it depends on: there is {needs}"


def of_publisher(metadata: Message) -> Iterable[str]:
    """What only whoever publishes can know."""
    if not (metadata["Author"] or metadata["Author-email"]):
        yield 'its authors (`authors = [{ name = "…" }]` in its pyproject.toml)'
    urls = dict(value.split(", ", 1) for value in metadata.get_all("Project-URL", []))
    for label in URLS:
        address = urlsplit(urls.get(label, ""))
        if address.scheme != "https" or not address.hostname or _NOWHERE.match(address.hostname):
            yield f"a public https address as {label} in [project.urls] of its pyproject.toml"


if __name__ == "__main__":
    main()
