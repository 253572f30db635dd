"""`checkpoint-engine status`: what do serving engines hold, and how did it get there?"""

import time
from functools import partial
from typing import Annotated

import msgspec
import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from checkpoint_engine.background import in_background
from checkpoint_engine.cli.common import Json, Verbose, output, print_json
from checkpoint_engine.client.auto import load_client
from checkpoint_engine.client.plugins import telling_client
from checkpoint_engine.contract.reports import WorkerStatus
from checkpoint_engine.deadline import Deadline
from checkpoint_engine.errors import CheckpointEngineError

__all__ = ["EndpointStatus", "status"]


class EndpointStatus(msgspec.Struct, frozen=True):
    """What is found at one endpoint."""

    endpoint: str
    workers: list[WorkerStatus] = []
    paused: bool = False
    """Whether it runs no requests until somebody, or a complete update, resumes it."""
    error: str = ""
    """Why nothing was."""

    @property
    def ok(self) -> bool:
        """Whether all workers hold the same whole weights."""
        whole = not any(worker.dirty for worker in self.workers)
        return bool(self.workers) and whole and len({worker.version for worker in self.workers}) == 1


def status(
    endpoint: Annotated[
        list[str],
        typer.Option(help="HOST:PORT, a URL or unix:/path/to.sock. Repeat it for several.", show_default=False),
    ],
    engine: Annotated[str, typer.Option(help="vllm, sglang or any other with a plugin; auto asks.")] = "auto",
    watch: Annotated[
        bool, typer.Option("--watch", help="Ask again every two seconds, until Ctrl-C; with --json a line each time.")
    ] = False,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for an engine to answer.")] = 10.0,
    json: Json = False,
    verbose_: Verbose = False,
) -> None:
    """Tell what serving engines hold: version, whole or mixed weights, whether they are paused, and the last update.

    Exit code 0: all workers of each engine hold the same whole weights. 1: they do not, or an engine does not tell.
    130: Ctrl-C.

    \b
    checkpoint-engine status --endpoint localhost:8000 --endpoint localhost:8001
    """
    del verbose_
    while True:
        asked = [in_background(partial(_ask, each, engine, timeout), "checkpoint-engine-ask") for each in endpoint]
        found = [each.result() for each in asked]
        if json:
            print_json({"ok": all(each.ok for each in found), "endpoints": found})
        else:
            output.print(_table(found))
        if not watch:
            raise typer.Exit(0 if all(each.ok for each in found) else 1)
        time.sleep(2)


def _ask(endpoint: str, engine: str, timeout: float) -> EndpointStatus:
    try:
        client, deadline = telling_client(load_client(engine)(endpoint, timeout=timeout)), Deadline(timeout)
        return EndpointStatus(endpoint, client.status(deadline), client.is_paused(deadline))
    except CheckpointEngineError as error:
        return EndpointStatus(endpoint, error=f"{type(error).__name__}: {error}")


def _table(found: list[EndpointStatus]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("endpoint", "worker", "version", "weights", "last update"):
        table.add_column(column, overflow="fold")
    for each in found:
        if not each.workers:
            table.add_row(each.endpoint, "", "", Text("unknown", style="bold red"), each.error)
        for number, worker in enumerate(each.workers):
            table.add_row(
                "" if number else _where(each), str(number), _version(worker), _weights(worker), _last(worker)
            )
    return table


def _where(each: EndpointStatus) -> Text:
    return Text(each.endpoint).append("\npaused" if each.paused else "", style="yellow")


def _version(worker: WorkerStatus) -> str:
    over = f"\na part, over {worker.whole_version or 'what it started with'}" if worker.partial else ""
    return f"{worker.version or ''}{over}"


def _weights(worker: WorkerStatus) -> Text:
    if worker.updating:
        return Text("updating", style="yellow")
    return Text("mixed: update again", style="bold red") if worker.dirty else Text("whole", style="green")


def _last(worker: WorkerStatus) -> Text:
    """By which way it came and was taken over, how long and how fast; and what failed since."""
    figures = worker.last_update
    seconds = sum(float(figures.get(f"{step}_seconds", 0)) for step in ("check", "load", "finish"))
    nbytes = sum(int(figures.get(f"{way}_bytes", 0)) for way in ("plan", "loader"))
    parts = [worker.door, str(figures.get("reload", ""))]
    if nbytes and seconds:
        parts.append(f"{100 * int(figures.get('plan_bytes', 0)) // nbytes}% of {nbytes / 1e9:.3g} GB by plan")
        parts.append(f"{seconds:.3g} s in the worker ({nbytes / seconds / 1e9:.3g} GB/s)")
    text = Text(", ".join(part for part in parts if part))
    for reason in (str(figures.get("loader_reason", "")),):
        text.append(f"\n{reason}" if reason else "")
    text.append(f"\nfailed since: {worker.error}" if worker.error else "", style="red")
    return text
