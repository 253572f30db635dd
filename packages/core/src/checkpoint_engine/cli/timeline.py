"""`checkpoint-engine timeline`: draws what the ranks did when in an update."""

from pathlib import Path
from typing import Annotated

import typer

from checkpoint_engine.cli.common import Json, Verbose, check_can_write, output, print_json
from checkpoint_engine.cli.summary import size
from checkpoint_engine.cli.timeline_data import Limit, Timeline, load_timeline
from checkpoint_engine.errors import SettingError

__all__ = ["timeline"]

_FORMATS = (".png", ".svg", ".pdf")
_GB = 1e9


def timeline(
    file: Annotated[Path, typer.Argument(help="What update --trace has written.", show_default=False)],
    output_file: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="PNG, SVG or PDF; FILE with .png if left out.", show_default=False),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="GB/s from host memory into one rank's device, if known; what the trace shows if left out.",
            show_default=False,
        ),
    ] = None,
    title: Annotated[str | None, typer.Option(help="Stands above the picture.", show_default=False)] = None,
    json: Json = False,
    verbose_: Verbose = False,
) -> None:
    """Draw what each rank did when in an update: one lane for each rank and stage.

    Needs matplotlib: pip install 'checkpoint-engine-core\\[plot]'.

    \b
    checkpoint-engine update ./step-100 --engine vllm --endpoint http://localhost:8000 --trace trace.json
    checkpoint-engine timeline trace.json -o timeline.png --rate 55

    The same file opens in ui.perfetto.dev.
    """
    del verbose_
    target = output_file or file.with_suffix(".png")
    if target.suffix.lower() not in _FORMATS:
        raise SettingError(f"cannot draw {target}: its name must end in {', '.join(_FORMATS)}")
    check_can_write(target)
    loaded = load_timeline(file)
    from checkpoint_engine.cli.timeline_plot import draw  # noqa: PLC0415 - brings matplotlib

    limit = loaded.limit(rate * _GB if rate else None)
    draw(loaded, limit, target, title)
    if json:
        print_json(_as_json(loaded, limit, target))
        return
    output.print(f"[bold green]✓[/] {target}", soft_wrap=True)
    if limit is not None:
        output.print(_say_limit(loaded, limit), style="dim", soft_wrap=True)


def _say_limit(loaded: Timeline, limit: Limit) -> str:
    """How near the update came to what the slowest link allows."""
    source = "measured" if limit.measured else "given"
    rate, share = limit.rate / _GB, limit.seconds / loaded.seconds
    return (
        f"the limit is {limit.seconds * 1000:.4g} ms: {size(limit.nbytes)} to a rank at {rate:.3g} GB/s ({source}); "
        f"the update took {loaded.seconds * 1000:.4g} ms and reaches {share:.0%}"
    )


def _as_json(loaded: Timeline, limit: Limit | None, target: Path) -> dict[str, object]:
    return {
        "ok": True,
        "output": str(target),
        "seconds": loaded.seconds,
        "limit_seconds": None if limit is None else limit.seconds,
        "share_of_limit": None if limit is None else limit.seconds / loaded.seconds,
        "lanes": [
            {"rank": lane.rank, "stage": lane.stage, "bytes": lane.nbytes, "busy_seconds": lane.busy}
            for lane in loaded.lanes
        ],
    }
