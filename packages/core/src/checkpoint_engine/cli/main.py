"""The `checkpoint-engine` command."""

import inspect
import signal
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from checkpoint_engine.cli.common import Verbose, print_error
from checkpoint_engine.cli.demo import demo
from checkpoint_engine.cli.doctor import doctor
from checkpoint_engine.cli.inspect import inspect_checkpoint
from checkpoint_engine.cli.interrupts import ended_by_signals
from checkpoint_engine.cli.join import join
from checkpoint_engine.cli.serve import serve
from checkpoint_engine.cli.status import status
from checkpoint_engine.cli.timeline import timeline
from checkpoint_engine.cli.update import update
from checkpoint_engine.cli.verify import verify
from checkpoint_engine.errors import CheckpointEngineError
from checkpoint_engine.terminal import say_whatever_comes
from checkpoint_engine.version import __version__

__all__ = ["app", "main"]

_INTERRUPTED = 128 + signal.SIGINT
"""As shells have it after Ctrl-C; SIGTERM and SIGHUP are treated as that is."""

app = typer.Typer(
    name="checkpoint-engine",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)


def _help_of(command: Callable[..., object]) -> str:
    """The docstring with its paragraphs unwrapped, for terminals of any width; those that begin with \\b stay."""
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    return "\n\n".join(text if text.startswith("\b") else text.replace("\n", " ") for text in paragraphs)


for name, command in {
    "demo": demo,
    "update": update,
    "verify": verify,
    "status": status,
    "join": join,
    "serve": serve,
    "doctor": doctor,
    "inspect": inspect_checkpoint,
    "timeline": timeline,
}.items():
    app.command(name, help=_help_of(command))(command)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"checkpoint-engine-core {__version__}")
        raise typer.Exit


@app.callback()
def _about(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    _verbose: Verbose = False,
) -> None:
    """New weights for serving language models, in place: no restart, no second copy on the GPU.

    Start with [bold]checkpoint-engine demo[/], which needs neither a GPU nor an engine. Then see
    [bold]checkpoint-engine update --help[/].
    """


def main() -> None:
    """Entry point: errors of ours become a short message and exit code 1, or 130 after Ctrl-C."""
    say_whatever_comes()
    try:
        with ended_by_signals():
            app()
    except CheckpointEngineError as error:
        print_error(error, as_json="--json" in sys.argv)
        sys.exit(_INTERRUPTED if _was_interrupted(error) else 1)


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether it only says what became of a command that somebody ended."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


if __name__ == "__main__":
    main()
