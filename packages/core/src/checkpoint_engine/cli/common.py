"""What the commands share: consoles, options, errors on the terminal."""

from __future__ import annotations

import logging
import os
import traceback
from enum import Enum
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.text import Text

from checkpoint_engine.errors import CheckpointEngineError, SettingError

output = Console(highlight=False)
"""Results."""
notes = Console(stderr=True, highlight=False)
"""Everything else, so that results can be piped."""


class _Verbosity:
    on = False


def verbose() -> bool:
    """Whether the user asked for logs and tracebacks."""
    return _Verbosity.on


def _set_verbose(value: bool) -> bool:
    if value and not _Verbosity.on:
        _Verbosity.on = True
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    return value


Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", callback=_set_verbose, help="Show logs, and tracebacks of errors."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else there.")]


class Method(str, Enum):
    """How the bytes travel."""

    BROADCAST = "broadcast"
    DIRECT = "direct"
    AUTO = "auto"
    P2P = "p2p"


class Pause(str, Enum):
    """What becomes of requests that run in the engine."""

    KEEP = "keep"
    ABORT = "abort"
    WAIT = "wait"
    NONE = "none"


class Reload(str, Enum):
    """How tensors get into the engine."""

    AUTO = "auto"
    PLAN = "plan"
    LOADER = "loader"


class DeviceKind(str, Enum):
    """Where ranks bring the weights to."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


def check_can_write(path: Path) -> None:
    """Raises unless a file can be written there, so that this is known before the work and not after it.

    Raises:
        SettingError: its directory is missing or closed to us, or it is a directory itself.
    """
    folder = path.parent
    if path.is_dir() or not folder.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise SettingError(f"cannot write {path}: it must be a file in a directory that you may write to")


def print_json(content: object) -> None:
    """Prints one JSON object."""
    print(msgspec.json.encode(content).decode(), flush=True)  # noqa: T201 - plain; whoever reads a pipe may be waiting


def print_error(error: CheckpointEngineError, *, as_json: bool = False) -> None:
    """Says what went wrong: the kind of error and its message, and with --verbose the traceback."""
    if verbose():
        notes.print(Text("".join(traceback.format_exception(error)), style="dim"), soft_wrap=True)
    notes.print(Text.assemble((type(error).__name__, "bold red"), (": ", "bold red"), str(error)), soft_wrap=True)
    if as_json:
        print_json({"ok": False, "error": type(error).__name__, "message": str(error)})
