"""Pages of the documentation that are made: the README as its start, texts of the root, and the command line's help.

A hook of MkDocs (`uv run --group docs mkdocs build --strict`).
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
FROM_ROOT = {"README.md": "index.md", "SECURITY.md": "security.md", "CONTRIBUTING.md": "contributing.md"}
FROM_ROOT["CHANGELOG.md"] = "changelog.md"
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are made."""
    for source, page in FROM_ROOT.items():
        files.append(File.generated(config, page, content=_moved((ROOT / source).read_text(encoding="utf-8"), "docs/")))
    files.append(File.generated(config, "reference/command-line.md", content=_command_line()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """What lies outside the documentation is named, and not linked: the site does not have it."""
    del config, files
    return _moved(markdown, "../") if page.file.src_uri.count("/") == 0 else markdown


def _moved(text: str, prefix: str) -> str:
    """Links that begin with `prefix` lead to the site's pages, or nowhere if it has none."""

    def moved(found: re.Match[str]) -> str:
        image, label, target = found.groups()
        path, _, anchor = target.partition("#")
        if "://" in target or not path:
            return found[0]
        inside = path.removeprefix(prefix)
        page = FROM_ROOT.get(inside, inside)
        known = (ROOT / "docs" / page).exists() or inside in FROM_ROOT
        if not known:
            return found[0] if image else f"{label} (`{inside}` in the repository)"
        return f"{image}[{label}]({page}{'#' + anchor if anchor else ''})"

    return _LINK.sub(moved, text)


def _command_line() -> str:
    """As the program itself says it."""
    command = [
        sys.executable,
        "-m",
        "typer",
        "checkpoint_engine.cli.main",
        "utils",
        "docs",
        "--name",
        "checkpoint-engine",
    ]
    made = subprocess.run(command, capture_output=True, text=True, check=True, env={"COLUMNS": "100", "PATH": ""})
    return made.stdout.replace("# `checkpoint-engine`", "# Command line", 1)
