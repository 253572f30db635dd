"""Runs a job and shows its report: what `update` and `join` have in common."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import msgspec

from checkpoint_engine import limits
from checkpoint_engine.cli.common import encoded, notes, output, print_json, verbose
from checkpoint_engine.cli.interrupts import aborted_by_signals
from checkpoint_engine.cli.messages import Done, Job, Logged, Progressed
from checkpoint_engine.cli.options import Afterwards, Engines, share_memory
from checkpoint_engine.cli.ranks import Ranks
from checkpoint_engine.cli.summary import UpdateView, print_stages, size, slowest
from checkpoint_engine.client.auto import load_client
from checkpoint_engine.client.plugins import telling_client
from checkpoint_engine.client.settlement import held_by
from checkpoint_engine.contract.failure import Failure, Held
from checkpoint_engine.contract.phase import Phase
from checkpoint_engine.deadline import Deadline
from checkpoint_engine.errors import CheckpointEngineError, SettingError, UpdateError

__all__ = ["Show", "run_job"]


class Show(Protocol):
    """Prints what came of a job."""

    def __call__(self, job: Job, reports: list[Done], *, as_json: bool) -> None:
        """Prints it."""


def run_job(job: Job, *, as_json: bool, show: Show | None = None) -> list[Done]:
    """Runs a job on ranks of its own, or as the one rank that torchrun has started; returns their reports.

    Args:
        job: What to do.
        as_json: Whether the report is printed as JSON.
        show: Prints the reports; as those of an update if None.

    Raises:
        CheckpointEngineError: it could not be done.
    """
    encoded(job)
    if job.afterwards.share:
        share_memory()
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return _run_as_rank(job, show or _show, as_json=as_json)
    return _run_with_own_ranks(job, show or _show, as_json=as_json)


def _roll_back(job: Job, directory: Path, error: CheckpointEngineError) -> UpdateError:
    """Brings the engines an earlier checkpoint; returns the error with what came of that."""
    said = Failure.of(error, Phase.UPDATE, 0).as_error(str(error))
    version = directory.resolve().name
    notes.print(f"the update failed; bringing {version} back …", style="yellow", markup=False)
    back = msgspec.structs.replace(
        job,
        directory=str(directory),
        version=version,
        tensors=replace(job.tensors, only=()),
        transfer=replace(job.transfer, reload="auto"),
        metas=(),
        afterwards=Afterwards(),
    )
    try:
        with (
            Ranks(_count(back), device=back.transfer.rank_device, verbose=verbose()) as ranks,
            UpdateView(notes) as view,
        ):
            ranks.run(back, view)
    except CheckpointEngineError as trouble:
        said.add(f"the rollback to {version!r} failed too ({trouble}): update again")
        return said
    said.rolled_back, said.held = version, Held.OLD.value
    said.add(f"rolled back: all engines hold version {version!r} and serve it")
    return said


def _count(job: Job) -> int:
    return job.transfer.ranks or job.engines.all_workers


def _run_with_own_ranks(job: Job, show: Show, *, as_json: bool) -> list[Done]:
    job.engines.knock(lambda text: notes.print(text, style="yellow", markup=False, soft_wrap=True))
    keep_serving, rollback_to = job.afterwards.keep_serving, job.afterwards.rollback_to
    with Ranks(_count(job), device=job.transfer.rank_device, verbose=verbose()) as ranks:
        try:
            with UpdateView(notes) as view:
                reports = ranks.run(job, view)
        except CheckpointEngineError as error:
            if rollback_to is None or _hold_one_version(job.engines):
                raise
            ranks.close()  # their memory is needed
            raise _roll_back(job, Path(rollback_to), error) from error
        show(job, reports, as_json=as_json)
        if keep_serving:
            _say_serving(keep_serving)
            ranks.wait(keep_serving)
    return reports


def _run_as_rank(job: Job, show: Show, *, as_json: bool) -> list[Done]:
    if job.afterwards.rollback_to is not None:
        raise SettingError("--rollback-to starts ranks of its own, which under torchrun it cannot")
    from checkpoint_engine.cli.job import Rank  # noqa: PLC0415 - brings torch, which --help does not need
    from checkpoint_engine.server.parameter_server import ParameterServer  # noqa: PLC0415

    keep_serving = job.afterwards.keep_serving
    with ParameterServer(device=job.transfer.rank_device) as server:
        first = server.rank == 0
        with UpdateView(notes) as view:
            rank = Rank(server, view if first else _ignore)
            try:
                with aborted_by_signals(server.abort):
                    report = rank.run(job)
            except UpdateError as error:
                message = "\n".join(filter(None, [str(error), rank.engine_outcome(error)]))
                raise Failure.of(error, Phase.UPDATE, server.rank).as_error(message) from error
        if first or job.transfer.compares:  # what is found differs from worker to worker
            show(job, [report], as_json=as_json)
        if keep_serving:
            if first:
                _say_serving(keep_serving)
            time.sleep(keep_serving)
        return [report]


def _hold_one_version(engines: Engines) -> bool:
    """Whether all engines hold the same whole version, whichever; False if one does not say."""
    versions: set[str | None] = set()
    try:
        for endpoint in engines.endpoints:
            workers = telling_client(load_client(engines.kind)(endpoint)).status(Deadline(limits.SETTLE))
            if held_by(workers, "", ()) is not Held.OLD:
                return False
            versions |= {worker.version for worker in workers}
    except CheckpointEngineError:
        return False
    return len(versions) == 1


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
                "partial": bool(job.tensors.only),
                "buckets": first.buckets,
                "endpoints": list(job.engines.endpoints),
                "seconds": seconds["total"],
                "stages": seconds,
                "engine": [report.update.engine for report in reports],
            }
        )
        return
    instances = "1 engine serves" if len(job.engines.endpoints) == 1 else f"{len(job.engines.endpoints)} engines serve"
    part = f", {first.tensors} tensors of it" if job.tensors.only else ""
    output.print(
        f"[bold green]✓[/] {instances} version [bold]{job.version}[/]{part}: {size(first.nbytes)} in "
        f"{seconds['total']:.2f} s"
    )
    print_stages(output, reports)


def _say_serving(seconds: float) -> None:
    notes.print(f"the ranks keep the checkpoint in host memory for {seconds:g} s; Ctrl-C ends them", style="dim")


def _ignore(event: Progressed | Logged) -> None:
    """Ranks other than the first show nothing."""
