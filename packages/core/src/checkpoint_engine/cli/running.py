"""Runs a job and shows its report: what `update` and `join` have in common."""

from __future__ import annotations

import os
import time
from typing import Protocol

from checkpoint_engine.cli.common import notes, output, print_json, verbose
from checkpoint_engine.cli.messages import Done, Job, Logged, Progressed
from checkpoint_engine.cli.ranks import Ranks
from checkpoint_engine.cli.summary import UpdateView, print_stages, size, slowest
from checkpoint_engine.errors import UpdateError


class Show(Protocol):
    """Prints what came of a job."""

    def __call__(self, job: Job, reports: list[Done], *, as_json: bool) -> None:
        """Prints it."""


def run_job(
    job: Job, device: str, keep_serving: float, *, share: bool, as_json: bool, show: Show | None = None
) -> list[Done]:
    """Runs a job on ranks of its own, or as the one rank that torchrun has started; returns their reports.

    Args:
        job: What to do.
        device: Where the engines' workers run.
        keep_serving: Seconds for which the ranks keep their memory afterwards.
        share: Whether others can read that memory.
        as_json: Whether the report is printed as JSON.
        show: Prints the reports; as those of an update if None.

    Raises:
        CheckpointEngineError: it could not be done.
    """
    if share:
        os.environ["CHECKPOINT_ENGINE_P2P"] = "1"  # ranks are children of this process, or this process itself
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return _run_as_rank(job, device, keep_serving, show or _show, as_json=as_json)
    return _run_with_own_ranks(job, device, keep_serving, show or _show, as_json=as_json)


def _run_with_own_ranks(job: Job, device: str, keep_serving: float, show: Show, *, as_json: bool) -> list[Done]:
    count = job.ranks or job.workers * len(job.endpoints)
    with Ranks(count, device=_device_of(job, device), verbose=verbose()) as ranks:
        with UpdateView(notes) as view:
            reports = ranks.run(job, view)
        show(job, reports, as_json=as_json)
        if keep_serving:
            _say_serving(keep_serving)
            ranks.wait(keep_serving)
    return reports


def _device_of(job: Job, device: str) -> str:
    """What the ranks need of it: in a direct update nothing, so that they take no memory of a GPU."""
    return "cpu" if job.method == "direct" else device


def _run_as_rank(job: Job, device: str, keep_serving: float, show: Show, *, as_json: bool) -> list[Done]:
    from checkpoint_engine.cli.job import Rank  # noqa: PLC0415 - brings torch, which --help does not need
    from checkpoint_engine.server import ParameterServer  # noqa: PLC0415

    with ParameterServer(device=_device_of(job, device)) as server:
        first = server.rank == 0
        with UpdateView(notes) as view:
            rank = Rank(server, view if first else _ignore)
            try:
                report = rank.run(job)
            except UpdateError as error:
                message = "\n".join(filter(None, [str(error), rank.engine_outcome()]))
                raise UpdateError(message, rank=error.rank, phase=error.phase) from error
        if first or job.reload == "verify":  # what is found differs from worker to worker
            show(job, [report], as_json=as_json)
        if keep_serving:
            if first:
                _say_serving(keep_serving)
            time.sleep(keep_serving)
        return [report]


def _show(job: Job, reports: list[Done], *, as_json: bool) -> None:
    first = reports[0].update
    seconds = slowest(reports)
    if as_json:
        print_json(
            {
                "ok": True,
                "version": job.version,
                "method": first.method,
                "bytes": first.nbytes,
                "tensors": first.tensors,
                "buckets": first.buckets,
                "endpoints": list(job.endpoints),
                "seconds": seconds["total"],
                "stages": seconds,
                "engine": [report.update.engine for report in reports],
            }
        )
        return
    instances = "1 engine serves" if len(job.endpoints) == 1 else f"{len(job.endpoints)} engines serve"
    output.print(
        f"[bold green]✓[/] {instances} version [bold]{job.version}[/]: {size(first.nbytes)} in {seconds['total']:.2f} s"
    )
    print_stages(output, reports)


def _say_serving(seconds: float) -> None:
    notes.print(f"the ranks keep the checkpoint in host memory for {seconds:g} s; Ctrl-C ends them", style="dim")


def _ignore(event: Progressed | Logged) -> None:
    """Ranks other than the first show nothing."""
