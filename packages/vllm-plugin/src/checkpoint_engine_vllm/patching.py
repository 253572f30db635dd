"""Our patches of vLLM 0.10.2 to 0.15: whether one fits, putting it in, taking it out."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import cast

from checkpoint_engine.sdk import MissingDependencyError, SettingError

__all__ = ["Change", "Hunk", "Installation", "apply", "changes", "find", "parse", "write"]

_PATCHES = Path(__file__).parent / "patches"
_NEEDS_NONE = (0, 16)
"""From this version of vLLM on, weights are reloaded layer by layer, and no patch is needed."""

_VERSION = re.compile(r"""^__version__[^'"\n]*['"]([^'"]+)""", re.MULTILINE)
_HUNK = re.compile(r"@@ -(\d+)(?:,\d+)? \+(\d+)(?:,\d+)? @@")
_WAY_OUT = "or use vLLM 0.16 or newer, which needs no patch: pip install --upgrade 'vllm>=0.16'"


@dataclass(frozen=True)
class Installation:
    """A vLLM: the directory that holds `vllm/`, and its version without local parts."""

    root: Path
    version: str

    @property
    def needs_none(self) -> bool:
        """Whether this vLLM reloads weights without our help."""
        return tuple(int(part) for part in re.findall(r"\d+", self.version)[:2]) >= _NEEDS_NONE


@dataclass(frozen=True)
class Change:
    """One file, relative to the root; None where it does not exist."""

    file: str
    before: str | None
    after: str | None

    @property
    def lines(self) -> str:
        """How many lines come and go, as `+2 -0`."""
        before, after = (self.before or "").count("\n"), (self.after or "").count("\n")
        return f"+{max(after - before, 0)} -{max(before - after, 0)}"


def find(root: Path | None = None) -> Installation:
    """The vLLM in `root`, or the one that Python would import; it is not imported.

    Raises:
        MissingDependencyError: there is none.
        SettingError: its version cannot be told.
    """
    if root is None:
        spec = importlib.util.find_spec("vllm")
        if spec is None or spec.origin is None:
            raise MissingDependencyError(
                "there is no vLLM in this Python environment; run this command in vLLM's own, or name the directory "
                "that holds vllm/"
            )
        root = Path(spec.origin).parent.parent
    if not (root / "vllm" / "__init__.py").is_file():
        raise MissingDependencyError(f"{root} holds no vllm/; name the directory above it, as site-packages is")
    return Installation(root, _version_of(root).partition("+")[0])


def changes(vllm: Installation, *, revert: bool = False) -> list[Change]:
    """What is to be done to patch a vLLM, or to undo that; empty if nothing is.

    Raises:
        SettingError: there is no patch for its version, or files are not as that version has them.
    """
    table = _versions()
    if vllm.version not in table:
        raise SettingError(
            f"there is no patch for vLLM {vllm.version}; use one of {', '.join(table)}, {_WAY_OUT} ({vllm.root})"
        )
    hashes = table[vllm.version]
    now = {file: _read(vllm.root / file) for file in hashes}
    wanted, found = (1, 0) if revert else (0, 1)
    if all(_hash(now[file]) == pair[found] for file, pair in hashes.items()):
        return []
    strange = [file for file, pair in hashes.items() if _hash(now[file]) != pair[wanted]]
    if strange:
        raise SettingError(
            f"{', '.join(strange)} in {vllm.root}: not as in vLLM {vllm.version}{', patched' if revert else ''}; "
            f"nothing was changed. Install it anew (pip install --force-reinstall --no-deps vllm=={vllm.version}), "
            f"{_WAY_OUT}"
        )
    patch = (_PATCHES / f"{vllm.version}.patch").read_text()
    planned = [Change(f, now[f], apply(hunks, now[f], revert=revert)) for f, hunks in parse(patch).items()]
    if any(_hash(change.after) != hashes[change.file][found] for change in planned):
        raise SettingError(f"the patch for vLLM {vllm.version} is damaged: install checkpoint-engine-vllm anew")
    return planned


def write(vllm: Installation, planned: Sequence[Change]) -> None:
    """Makes the changes: all of them or none. Files are replaced, not written over: they may be links into a cache.

    Raises:
        SettingError: a file cannot be written.
    """
    done: list[Change] = []
    try:
        for change in planned:
            _replace(vllm.root / change.file, change.after)
            done.append(change)
    except OSError as error:
        for change in done:
            _replace(vllm.root / change.file, change.before)
        raise SettingError(f"cannot change {error.filename}: {error.strerror}; nothing was changed") from error


# -- patches --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hunk:
    """Lines of a unified diff with their marks (` `, `-`, `+`), and where they begin before and after."""

    old_start: int
    new_start: int
    lines: tuple[str, ...]


def parse(patch: str) -> dict[str, list[Hunk]]:
    """The hunks of each file of a unified diff."""
    files: dict[str, list[Hunk]] = {}
    for part in re.split(r"^(?=--- )", patch, flags=re.MULTILINE)[1:]:
        header, *hunks = re.split(r"^(?=@@ )", part, flags=re.MULTILINE)
        files[header.splitlines()[1].removeprefix("+++ b/")] = list(map(_hunk, hunks))
    return files


def apply(hunks: Sequence[Hunk], text: str | None, *, revert: bool = False) -> str | None:
    """The text after the hunks were applied or undone; a file that would be empty is none.

    Raises:
        SettingError: they do not fit.
    """
    old, result, at = (text or "").splitlines(keepends=True), list[str](), 0
    removed, added = ("+", "-") if revert else ("-", "+")
    for hunk in hunks:
        start = max((hunk.new_start if revert else hunk.old_start) - 1, 0)
        there = [line[1:] for line in hunk.lines if line[0] in (" ", removed)]
        if start < at or old[start : start + len(there)] != there:
            raise SettingError(f"a patch does not fit at line {start + 1}")
        result += old[at:start] + [line[1:] for line in hunk.lines if line[0] in (" ", added)]
        at = start + len(there)
    return "".join(result + old[at:]) or None


def _hunk(text: str) -> Hunk:
    header, *lines = text.splitlines(keepends=True)
    match = _HUNK.match(header)
    if match is None:
        raise SettingError(f"not a hunk of a patch: {header.strip()}")
    return Hunk(int(match[1]), int(match[2]), tuple(lines))


# -- files ----------------------------------------------------------------------------------------------------------


@cache
def _versions() -> Mapping[str, Mapping[str, Sequence[str | None]]]:
    """For each version and file of it: SHA-256 as vLLM has it, and patched."""
    return cast("dict[str, dict[str, list[str | None]]]", json.loads((_PATCHES / "versions.json").read_text()))


def _version_of(root: Path) -> str:
    for info in root.glob("vllm-*.dist-info"):
        return info.name.removeprefix("vllm-").removesuffix(".dist-info")
    match = _VERSION.search(_read(root / "vllm" / "_version.py") or "")
    if match is None:
        raise SettingError(f"cannot tell the version of the vLLM in {root}: it has no dist-info and no _version.py")
    return match[1]


def _read(path: Path) -> str | None:
    with contextlib.suppress(FileNotFoundError):
        return path.read_bytes().decode()
    return None


def _hash(text: str | None) -> str | None:
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()


def _replace(path: Path, text: str | None) -> None:
    if text is None:
        path.unlink()
        return
    with _beside(path) as new:
        new.write_bytes(text.encode())
        if path.exists():
            shutil.copymode(path, new)
        new.replace(path)


@contextlib.contextmanager
def _beside(path: Path) -> Generator[Path]:
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield new
    finally:
        new.unlink(missing_ok=True)
