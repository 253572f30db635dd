"""What goes to the terminal: consoles, JSON for programs, errors."""

from __future__ import annotations

import io
import json
import logging
import sys
import traceback
from collections.abc import Mapping
from typing import Annotated

import msgspec
import typer
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderableType, RenderHook, RenderResult
from rich.segment import Segment
from rich.text import Text

from checkpoint_engine.errors import CheckpointEngineError, error_fields

__all__ = ["Json", "Verbose", "notes", "output", "print_error", "print_json", "say_whatever_comes", "verbose"]

_ESCAPES: Mapping[int, str] = {
    code: repr(chr(code))[1:-1]
    for code in [
        *range(0x20),
        *range(0x7F, 0xA0),
        *range(0x200B, 0x2010),
        *range(0x2028, 0x202F),
        *range(0x2060, 0x2070),
    ]
    if chr(code) not in "\n\t"
}
"""Characters that terminals take as orders, or that make text look like other text -> how Python writes them."""


class _Plain:
    """Something to print, of which a terminal takes orders from nobody but rich."""

    def __init__(self, content: RenderableType) -> None:
        self._content = content

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self._content, options):
            yield segment if segment.control else Segment(segment.text.translate(_ESCAPES), segment.style)


class _Hook(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Plain(content) for content in renderables]


def _console(*, stderr: bool = False) -> Console:
    console = Console(stderr=stderr, highlight=False)
    console.push_render_hook(_Hook())  # names of tensors and files, and errors, may be a stranger's
    return console


output = _console()
"""Results."""
notes = _console(stderr=True)
"""Everything else, so that results can be piped."""


def say_whatever_comes() -> None:
    """Characters that standard output or error cannot show (ASCII, Latin-1) are escaped, not fatal."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class _Verbosity:
    on = False


def verbose() -> bool:
    """Whether the user asked for logs and tracebacks."""
    return _Verbosity.on


def _set_verbose(value: bool) -> bool:  # noqa: FBT001 - as typer calls it
    if value and not _Verbosity.on:
        _Verbosity.on = True
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    return value


Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", callback=_set_verbose, help="Show logs, and tracebacks of errors."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else there.")]


def print_json(content: object) -> None:
    """Prints one JSON object."""
    try:
        text = msgspec.json.encode(content).decode()
    except UnicodeEncodeError:  # names of files need not be text; as `json` writes them, others can read them
        text = json.dumps(msgspec.to_builtins(content))
    print(text, flush=True)  # noqa: T201 - plain; whoever reads a pipe may be waiting


def print_error(error: CheckpointEngineError, *, as_json: bool = False) -> None:
    """Says what went wrong: the kind of error and its message, and with --verbose the traceback."""
    if verbose():
        notes.print(Text("".join(traceback.format_exception(error)), style="dim"), soft_wrap=True)
    notes.print(Text.assemble((type(error).__name__, "bold red"), (": ", "bold red"), str(error)), soft_wrap=True)
    if as_json:
        print_json({"ok": False, **error_fields(error)})
