"""The `checkpoint-engine-vllm` command."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from checkpoint_engine.sdk import CheckpointEngineError, print_error, print_json
from checkpoint_engine_vllm import __version__, patching

__all__ = ["app", "main", "output", "patch"]

output = Console(highlight=False)
app = typer.Typer(
    name="checkpoint-engine-vllm",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)


@app.command()
def patch(
    directory: Annotated[
        Path | None, typer.Argument(help="The directory that holds vllm/; left out: that of this Python's vLLM.")
    ] = None,
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and change nothing.")] = False,
    revert: Annotated[bool, typer.Option("--revert", help="Undo the patch.")] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else there.")
    ] = False,
) -> None:
    """Patch vLLM 0.10.2 to 0.15.1, so that FP8 weights can be replaced while it serves.

    Version and content of every file are checked first. vLLM 0.16 and newer need no patch.
    """
    vllm = patching.find(directory)
    planned = [] if vllm.needs_none else patching.changes(vllm, revert=revert)
    if not dry_run:
        patching.write(vllm, planned)
    if vllm.needs_none:
        outcome = "needs no patch: it reloads weights layer by layer"
    elif planned:
        outcome = f"{'would be ' if dry_run else ''}{'reverted' if revert else 'patched'}"
    else:
        outcome = "is not patched" if revert else "is patched already"
    if json:
        files = [change.file for change in planned]
        print_json({"ok": True, "vllm": vllm.version, "directory": str(vllm.root), "outcome": outcome, "files": files})
        return
    if planned:
        output.print(_table(planned))
    output.print(f"vLLM {vllm.version} in {escape(str(vllm.root))} [bold]{outcome}[/]", soft_wrap=True)
    if planned and not dry_run:
        output.print("Restart vLLM." if not revert else "Restart vLLM; its FP8 weights can no longer be updated.")


def _table(planned: list[patching.Change]) -> Table:
    table = Table("file", "lines", box=None, pad_edge=False)
    for change in planned:
        table.add_row(escape(change.file), change.lines)
    return table


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"checkpoint-engine-vllm {__version__}")
        raise typer.Exit


@app.callback()
def _about(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """The vLLM plugin of checkpoint-engine. Updates are sent with [bold]checkpoint-engine update[/]."""


def main() -> None:
    """Entry point: errors of ours become a short message and exit code 1."""
    try:
        app()
    except CheckpointEngineError as error:
        print_error(error, as_json="--json" in sys.argv)
        sys.exit(1)


if __name__ == "__main__":
    main()
