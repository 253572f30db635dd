"""What pages name as shown by a test, an attack or a script is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.pure

REPOSITORY = Path(__file__).parents[2]
PAGES = ("SECURITY.md", "CONTRIBUTING.md", "attacks/README.md", "docs/faults.md")
_OURS = re.compile(r"`((?:tests|attacks|scripts|benchmarks)/[^`\s:]*)(?:::(\w+))?[^`]*`")


def named_in(page: str) -> list[tuple[str, str]]:
    """Paths, each with the function that is named of it, if one is."""
    return _OURS.findall((REPOSITORY / page).read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_is_there(page: str) -> None:
    found = named_in(page)
    assert found, "then this test shows nothing"
    gone = [path for path, _ in found if not list(REPOSITORY.glob(path.rstrip("/")))]
    assert gone == []
    functions = [(path, name) for path, name in found if name]
    assert [pair for pair in functions if f"def {pair[1]}(" not in (REPOSITORY / pair[0]).read_text("utf-8")] == []


def test_every_door_says_what_shows_that_it_is_shut() -> None:
    lines = (REPOSITORY / "SECURITY.md").read_text(encoding="utf-8").splitlines()
    doors = [line for line in lines if line.startswith("| ")][1:]
    assert len(doors) > 10
    assert [door for door in doors if not _OURS.search(door) and "the engine's documentation" not in door] == []


def test_every_kind_of_attack_is_named() -> None:
    kinds = {path.parent.name for path in (REPOSITORY / "attacks").glob("*/*.py")}
    for page in ("SECURITY.md", "attacks/README.md"):
        text = (REPOSITORY / page).read_text(encoding="utf-8")
        assert {kind for kind in kinds if f"{kind}/" not in text} == set()
