"""`checkpoint-engine verify`: do serving engines hold exactly the weights of a checkpoint?"""

from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from checkpoint_engine.cli.common import DeviceKind, Json, Verbose, output, print_json
from checkpoint_engine.cli.messages import Done, Job
from checkpoint_engine.cli.running import run_job
from checkpoint_engine.cli.summary import size, slowest
from checkpoint_engine.engine.auto import load_client
from checkpoint_engine.errors import CheckpointFormatError

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

    The exit code is 0 if all is equal, and 1 if anything differs: the first names are printed.

    \b
    [dim]# after an update[/]
    checkpoint-engine verify ./step-100 --engine vllm --endpoint http://localhost:8000
    """
    del verbose_
    if not directory.is_dir():
        raise CheckpointFormatError(f"{directory} is not a directory")
    client = load_client(engine)
    for address in endpoint:
        client(address)  # a wrong address is told here, before any process starts
    job = Job(
        directory=str(directory),
        version=directory.resolve().name,
        engine=engine,
        endpoints=tuple(endpoint),
        workers=tensor_parallel_size,
        timeout=timeout,
        wait=wait,
        reload="verify",
    )
    reports = run_job(job, device.value, 0.0, share=False, as_json=json, show=_show)
    if not all(map(_equal, reports)):
        raise typer.Exit(1)


def _equal(report: Done) -> bool:
    found = report.update.engine
    return found.get("different_tensors") == 0 and bool(found.get("compared_tensors"))


def _show(job: Job, reports: list[Done], *, as_json: bool) -> None:
    ok = all(map(_equal, reports))
    seconds = slowest(reports)["total"]
    if as_json:
        workers = [
            {"rank": report.rank, "endpoint": job.endpoints[report.rank // job.workers], **report.update.engine}
            for report in reports
        ]
        print_json({"ok": ok, "version": job.version, "seconds": seconds, "workers": workers})
        return
    partly = any(report.update.engine.get("not_compared") for report in reports)
    equal = "as far as they could be compared, equal to" if partly else "equal to"
    mark, says = ("[bold green]✓[/]", equal) if ok else ("[bold red]✗[/]", "not equal to")
    output.print(f"{mark} the weights are {says} [bold]{job.version}[/] ({seconds:.2f} s)")
    output.print(_table(job, reports))
    for report in reports:
        for key, says in (("different", "different"), ("not_compared", "could not be compared")):
            names = report.update.engine.get(key)
            if names:
                output.print(Text(f"rank {report.rank}, {says}: {names}"), soft_wrap=True)


def _table(job: Job, reports: list[Done]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("worker of")
    for heading in ("rank", "compared", "bytes", "different"):
        table.add_column(heading, justify="right")
    for report in reports:
        found = report.update.engine
        table.add_row(
            job.endpoints[report.rank // job.workers],
            str(report.rank),
            f"{found.get('compared_tensors', 0)} tensors",
            size(int(found.get("compared_bytes", 0))),
            str(found.get("different_tensors", "?")),
        )
    return table
