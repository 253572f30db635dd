"""What must be filled in before anything is published is missed by name."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from scripts import check_release

pytestmark = pytest.mark.pure

ROOT = Path(__file__).parents[2]
WHOLE = """Metadata-Version: 2.4
Name: {name}
Version: 0.3.1
Author: Somebody
Project-URL: Source, https://forge.somewhere.io/source
Project-URL: Documentation, https://forge.somewhere.io/docs
Project-URL: Changelog, https://forge.somewhere.io/changes
Project-URL: Issues, https://forge.somewhere.io/issues
{needs}
# Title

[The guide](https://forge.somewhere.io/docs)
"""


def lacking(directory: Path, changelog: str = "## [0.3.1] - 2027-01-02\n", **wrong: str) -> list[str]:
    """What is said of three wheels in which the vLLM plugin has `wrong[old]` in place of what a whole one has."""
    for name in check_release.PACKAGES:
        needs = "" if name.endswith("core") else "Requires-Dist: checkpoint-engine-core~=0.3.0\n"
        text = WHOLE.format(name=name, needs=needs)
        if name.endswith("vllm") and wrong:
            assert wrong["old"] in text
            text = text.replace(wrong["old"], wrong["new"])
        with zipfile.ZipFile(directory / f"{name}.whl", "w") as wheel:
            wheel.writestr(f"{name}.dist-info/METADATA", text)
    metadata = [check_release.metadata_of(path) for path in sorted(directory.glob("*.whl"))]
    said = [*check_release.of_set(metadata, changelog)]
    for each in metadata:
        said += [*check_release.of_project(each), *check_release.of_publisher(each)]
    return said


def test_whole_wheels_lack_nothing(tmp_path: Path) -> None:
    assert lacking(tmp_path) == []


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("Author: Somebody\n", "", "its authors"),
        ("Source, https://forge.somewhere.io/source", "Source, https://example.com/source", "address as Source"),
        ("Project-URL: Issues, https://forge.somewhere.io/issues\n", "", "address as Issues"),
        ("(https://forge.somewhere.io/docs)", "(docs/vllm.md)", "in place of docs/vllm.md"),
        ("core~=0.3.0", "core~=0.2.0", "checkpoint-engine-core~=0.3.0"),
        ("Version: 0.3.1", "Version: 0.3.2", "one version for all"),
        ("checkpoint-engine-vllm", "checkpoint-engine-other", "one wheel of each"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert any(said in line for line in lacking(tmp_path, old=old, new=new))


def test_a_version_without_a_dated_section_is_not_published(tmp_path: Path) -> None:
    (said,) = lacking(tmp_path, changelog="## [Unreleased]\n")
    assert "CHANGELOG.md" in said


@pytest.mark.thorough
def test_the_command_fails_where_something_is_missing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "check_release.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert "one wheel of each" in done.stderr


def test_the_workflow_publishes_what_was_checked() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "publish.yml").read_text())
    build, publish = workflow["jobs"]["build"], workflow["jobs"]["publish"]
    commands = [step.get("run", "") for step in build["steps"]]
    named = [path for command in commands for path in re.findall(r"scripts/\S+\.py", command)]
    assert named == ["scripts/check_release.py"]
    assert publish["needs"] == "build"
    assert publish["permissions"] == {"id-token": "write"}
