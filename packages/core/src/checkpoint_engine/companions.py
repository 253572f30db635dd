"""Packages that came along with upstream's distribution, which scripts written for it import beside ours."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import inspect
import linecache
import logging
from types import FrameType

__all__ = ["tell_importer_what_it_lacks"]

logger = logging.getLogger(__name__)

_COMPANIONS = frozenset({"loguru", "pydantic"})
_OURS_AND_PYTHONS = ("checkpoint_engine", "importlib", "_frozen_importlib")


def tell_importer_what_it_lacks() -> None:
    """Called while a module is imported: warns if whoever imports it imports a companion too that is not there.

    Scripts tend to take such an `ImportError` for ours (SGLang's: "checkpoint_engine package not available"). Who has
    no use for a companion hears nothing.
    """
    lacking = {name for name in _COMPANIONS if importlib.util.find_spec(name) is None}
    frame = _importer(inspect.currentframe()) if lacking else None
    if frame is None:
        return
    file = frame.f_code.co_filename
    needed = sorted(lacking & _imports_of("".join(linecache.getlines(file, frame.f_globals))))
    if needed:
        logger.warning(
            "%s imports %s, which came with upstream's distribution and is not installed: "
            "pip install 'checkpoint-engine-core[compat]'",
            file,
            " and ".join(needed),
        )


def _importer(frame: FrameType | None) -> FrameType | None:
    """The first that is neither ours nor of Python's import system."""
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _OURS_AND_PYTHONS:
        frame = frame.f_back
    return frame


def _imports_of(source: str) -> set[str]:
    """Top-level packages that a source imports, wherever in it."""
    modules: set[str] = set()
    with contextlib.suppress(SyntaxError, ValueError):  # it has been changed since it was started
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                modules.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules.add(node.module)
    return {module.partition(".")[0] for module in modules}
