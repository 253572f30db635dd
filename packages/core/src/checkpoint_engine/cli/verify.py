"""`checkpoint-engine verify`: do serving engines hold exactly the weights of a checkpoint?"""

from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from checkpoint_engine.cli.common import DeviceKind, Json, Verbose, output, print_json
from checkpoint_engine.cli.messages import Done, Job
from checkpoint_engine.cli.options import Engines, Patience, TensorChoice, Transfer, path_text
from checkpoint_engine.cli.running import run_job
from checkpoint_engine.cli.summary import size, slowest
from checkpoint_engine.errors import CheckpointFormatError

__all__ = ["verify"]

_WORK = "What to compare"
_HOW = "How"


def verify(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Holds the checkpoint's *.safetensors.", show_default=False)
    ],
    engine: Annotated[
        str,
        typer.Option(
            help="vllm, sglang or any other engine with a plugin; auto asks the endpoint.",
            rich_help_panel=_WORK,
            show_default=False,
        ),
    ],
    endpoint: Annotated[
        list[str],
        typer.Option(
            help="http://HOST:PORT or unix:/path/to.sock. Repeat it for several instances.",
            rich_help_panel=_WORK,
            show_default=False,
        ),
    ],
    tensor_parallel_size: Annotated[
        int, typer.Option("--tensor-parallel-size", "-tp", min=1, help="Workers of each engine.", rich_help_panel=_WORK)
    ] = 1,
    draft: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Holds the draft model's own *.safetensors (speculative decoding), to compare too.",
            rich_help_panel=_WORK,
            show_default=False,
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Compare only tensors of such names. Repeatable.",
            rich_help_panel=_WORK,
            show_default=False,
        ),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Leave out tensors of such names, as '*.rotary_emb.inv_freq'. Repeatable.",
            rich_help_panel=_WORK,
            show_default=False,
        ),
    ] = None,
    strip_prefix: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PREFIX",
            help="Cut this off the tensors' names, as module. or _orig_mod. Repeatable.",
            rich_help_panel=_WORK,
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        DeviceKind, typer.Option(help="Where the engines' workers run.", rich_help_panel=_HOW)
    ] = DeviceKind.AUTO,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for the comparison.", rich_help_panel=_HOW)] = 600.0,
    wait: Annotated[
        float, typer.Option(min=1, help="Seconds for an engine that is still starting.", rich_help_panel=_HOW)
    ] = 600.0,
    json: Json = False,
    verbose_: Verbose = False,
) -> None:
    """Compare every parameter of serving engines with a checkpoint, bit by bit; nothing of the engine changes.

    The checkpoint takes the way of an update, but each worker compares what its engine's own loader and processing
    make of it, quantised layouts included, with what it holds, layer by layer. Requests wait meanwhile.

    The exit code is 0 if all is equal, and 1 if anything differs, or has a source in the checkpoint and could not be
    compared: the first names are printed.

    \b
    [dim]# after an update[/]
    checkpoint-engine verify ./step-100 --engine vllm --endpoint http://localhost:8000
    """
    del verbose_
    for each in (directory, draft):
        if each is not None and not each.is_dir():
            raise CheckpointFormatError(f"{each} is not a directory")
    engines = Engines(engine, tuple(endpoint), tensor_parallel_size)
    engines.check()
    job = Job(
        directory=str(directory),
        version=directory.resolve().name,
        engines=engines,
        tensors=TensorChoice(tuple(ignore or ()), tuple(strip_prefix or ()), only=tuple(only or ())),
        transfer=Transfer(device=device, reload="verify"),
        patience=Patience(timeout, wait),
        draft=path_text(draft),
    )
    reports = run_job(job, as_json=json, show=_show)
    if not all(report.update.comparison.equal for report in reports):
        raise typer.Exit(1)


def _show(job: Job, reports: list[Done], *, as_json: bool) -> None:
    ok = all(report.update.comparison.equal for report in reports)
    seconds = slowest(reports)["total"]
    if as_json:
        workers = [
            {
                "rank": report.rank,
                "endpoint": job.engines.endpoint_of(report.rank),
                **report.update.engine,
            }
            for report in reports
        ]
        print_json({"ok": ok, "version": job.version, "seconds": seconds, "workers": workers})
        return
    partly = any(report.update.comparison.not_compared for report in reports)
    equal = "as far as they could be compared, equal to" if partly else "equal to"
    differ = any(report.update.comparison.different_tensors for report in reports)
    unequal = "not equal to" if differ or not partly else "not wholly compared with"
    mark, says = ("[bold green]✓[/]", equal) if ok else ("[bold red]✗[/]", unequal)
    output.print(f"{mark} the weights are {says} [bold]{job.version}[/] ({seconds:.2f} s)")
    output.print(_table(job, reports))
    for report in reports:
        found = report.update.comparison
        for names, says in ((found.different, "different"), (found.not_compared, "could not be compared")):
            if names:
                output.print(Text(f"rank {report.rank}, {says}: {names}"), soft_wrap=True)


def _table(job: Job, reports: list[Done]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("worker of")
    for heading in ("rank", "compared", "bytes", "different"):
        table.add_column(heading, justify="right")
    for report in reports:
        found = report.update.comparison
        table.add_row(
            job.engines.endpoint_of(report.rank),
            str(report.rank),
            f"{found.compared_tensors} tensors",
            size(found.compared_bytes),
            str(found.different_tensors),
        )
    return table
