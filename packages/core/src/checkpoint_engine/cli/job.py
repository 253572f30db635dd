"""What one rank does in an update: read its share, meet the others, ask the engine, send."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import cast

from checkpoint_engine.background import in_background
from checkpoint_engine.catalog import Catalog
from checkpoint_engine.cli.messages import Done, Job, Progressed
from checkpoint_engine.deadline import Deadline
from checkpoint_engine.engine.auto import load_client
from checkpoint_engine.engine.client import EngineClient, PauseMode
from checkpoint_engine.engine.plugins import verifying_client
from checkpoint_engine.errors import CheckpointEngineError, CheckpointStateError, SettingError
from checkpoint_engine.host.loader import find_files, split_among_ranks
from checkpoint_engine.server import ParameterServer
from checkpoint_engine.transfer.report import UpdateReport
from checkpoint_engine.transfer.trace import save_trace

_QUICK_ANSWER_SECONDS = 1.0
"""An engine that is up already says within this time whether it can be updated, before any file is read."""
_SETTLE_SECONDS = 40.0
"""After a failed update the client finds out what its engine holds, and resumes it where it can."""
_TICK_SECONDS = 0.1


class EngineLead:
    """The engine instance that a rank leads: asks it on behalf of all ranks that feed it."""

    def __init__(self, job: Job, instance: int) -> None:
        self._job = job
        self._endpoint = job.endpoints[instance]
        self._first = instance * job.workers
        self._client: EngineClient = load_client(job.engine)(self._endpoint)
        self._idle = threading.Event()
        self._idle.set()
        self._failure = ""

    def wait_ready(self) -> None:
        """Waits until the engine serves, and checks that it has the number of workers that it should have.

        Raises:
            DeadlineError: it did not come up in time.
            EngineRequestError: what answers there is no such engine.
            SettingError: it has another number of workers.
        """
        self._client.wait_ready(Deadline(self._job.wait))
        found = self._client.world_size()
        if found is not None and found != self._job.workers:
            raise SettingError(
                f"the engine at {self._endpoint} has {found} workers, not {self._job.workers}: "
                f"pass --tensor-parallel-size {found}"
            )

    def ask(self, addresses: list[tuple[str, str]]) -> None:
        """Asks the engine to update from the ranks that feed it; returns when it serves the new weights."""
        self._idle.clear()
        try:
            mine = addresses[self._first : self._first + self._job.workers]
            if len(dict(mine)) != len(mine):
                raise SettingError(
                    f"ranks {self._first} to {self._first + len(mine) - 1} share a device: each rank needs the GPU of "
                    f"one worker of the engine, but the ranks see only {', '.join(sorted(dict(mine)))}"
                )
            if self._job.reload == "verify":
                verifying_client(self._client).verify_weights(
                    dict(mine), version=self._job.version, timeout=self._job.timeout
                )
                return
            self._client.update_weights(
                dict(mine),
                version=self._job.version,
                pause=cast("PauseMode", self._job.pause),
                reset_caches=self._job.reset_caches,
                timeout=self._job.timeout,
            )
        except CheckpointEngineError as error:
            self._failure = str(error)
            raise
        finally:
            self._idle.set()

    def outcome(self) -> str:
        """After a failed update: waits for the engine's own words, and returns them."""
        if self._idle.wait(_SETTLE_SECONDS):
            return self._failure
        return f"{self._endpoint} has not answered yet; whether it serves is unknown"


class EngineLeads:
    """The engine instances that a rank leads: mostly one, or none."""

    def __init__(self, job: Job, instances: Sequence[int]) -> None:
        self._leads = [EngineLead(job, instance) for instance in instances]

    def wait_ready(self) -> None:
        """See `EngineLead`."""
        for lead in self._leads:
            lead.wait_ready()

    def ask(self, addresses: list[tuple[str, str]]) -> None:
        """Asks all of them at the same time."""
        if len(self._leads) <= 1:
            for lead in self._leads:
                lead.ask(addresses)
            return
        with ThreadPoolExecutor(len(self._leads)) as pool:
            for asked in as_completed([pool.submit(lead.ask, addresses) for lead in self._leads]):
                asked.result()

    def outcome(self) -> str:
        """See `EngineLead`."""
        return "\n".join(filter(None, (lead.outcome() for lead in self._leads)))


class Rank:
    """One rank, for one job after the other."""

    def __init__(self, server: ParameterServer, report: Callable[[Progressed], None]) -> None:
        self._server = server
        self._report = report
        self._seconds: dict[str, float] = {}
        self._leads: EngineLeads | None = None
        self.updating = False
        """Whether the job has come to the update itself; it ends with its own report then, whatever happens."""

    def run(self, job: Job) -> Done:
        """Does the job.

        Raises:
            CheckpointEngineError: it could not be done.
        """
        self._seconds = {}
        self.updating = False
        rank, each = self._server.rank, workers_of_each(self._server.world_size, job)
        first = [instance * job.workers for instance in range(len(job.endpoints))]
        led = [instance for instance, worker in enumerate(first) if worker // each == rank]
        self._leads = EngineLeads(job, led)
        ready = in_background(self._leads.wait_ready, "waits for the engine") if led else None
        self._wait_for(ready, _QUICK_ANSWER_SECONDS)
        name = self._load_metas(job) if job.metas else self._read(job)
        self._wait_for(ready, None)
        if not job.metas:
            self._gather(job, name)
        self.updating = True
        with self._watched():
            self._server.update(
                name,
                self._leads.ask,
                timeout=timedelta(seconds=job.timeout),
                version=job.version,
                trace=job.trace is not None,
                reload=job.reload,
                method=job.method,
                keep=job.keep,
                workers=each,
            )
        done = self._done(job)
        if job.keep:
            self._gather(job, name)
        return done

    def engine_outcome(self) -> str:
        """After a failed update: what became of the engine that this rank leads, if it leads one."""
        return self._leads.outcome() if self._leads else ""

    def _load_metas(self, job: Job) -> str:
        self._drop_old()
        catalogs = [Catalog.load(Path(file)) for file in job.metas]
        self._server.load_catalogs(catalogs)
        return catalogs[0].name

    def _gather(self, job: Job, name: str) -> None:
        with self._timed("gather"):
            self._server.gather_metas(name, timeout=timedelta(seconds=job.wait))
        if job.save_metas and self._server.rank == 0:
            _save(self._server, name, Path(job.save_metas))

    def _drop_old(self) -> None:
        for old in self._server.checkpoints:
            self._server.unregister_checkpoint(old)

    def _read(self, job: Job) -> str:
        directory = Path(job.directory)
        name = directory.resolve().name
        self._drop_old()
        with self._timed("read"):
            files = split_among_ranks(find_files(directory), self._server.world_size)[self._server.rank]
            # What workers read by themselves must not be a file, which anybody could truncate.
            self._server.register_checkpoint(
                name, files=files, use_shared_memory_pool=True, use_inplace_pin_memory=job.method != "direct"
            )
        return name

    def _wait_for(self, ready: Future[None] | None, seconds: float | None) -> None:
        if ready is None:
            return
        if not ready.done():
            with self._timed("engine"):
                wait([ready], seconds)
        if ready.done():
            ready.result()

    def _done(self, job: Job) -> Done:
        report = self._server.last_report
        if report is None:
            raise CheckpointStateError("the update left no report")
        if job.trace is not None:
            self._save_trace(Path(job.trace), report)
        report = replace(report, trace=None)  # it is in the file, and may be long
        return Done(job.number, self._server.rank, {**self._seconds, **report.seconds}, report)

    def _save_trace(self, path: Path, report: UpdateReport) -> None:
        traces = self._server.gather_traces()
        if self._server.rank == 0:
            about = {"version": report.version, "method": report.method, "bytes": report.nbytes}
            save_trace(path, traces, **about, seconds=report.seconds["total"], staging=report.staging)

    @contextmanager
    def _timed(self, phase: str) -> Generator[None]:
        self._report(Progressed(phase))
        start = time.perf_counter()
        yield
        self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start

    @contextmanager
    def _watched(self) -> Generator[None]:
        """Reports the progress of the update while it runs."""
        over = threading.Event()
        progress = self._server.progress

        def watch() -> None:
            while not over.wait(_TICK_SECONDS):
                self._report(Progressed(progress.phase, progress.bytes_done, progress.nbytes))

        thread = threading.Thread(target=watch, name="reports progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def workers_of_each(ranks: int, job: Job) -> int:
    """How many workers each rank feeds.

    Raises:
        SettingError: there are too few or too many ranks.
    """
    workers = job.workers * len(job.endpoints)
    expected = job.ranks or workers
    if ranks != expected or workers % ranks:
        raise SettingError(
            f"{len(job.endpoints)} engine instance(s) of {job.workers} worker(s) are fed by {expected} ranks, not "
            f"{ranks}: each rank feeds the worker on its own device (several workers only with --method direct)"
        )
    return workers // ranks


def _save(server: ParameterServer, name: str, path: Path) -> None:
    try:
        server.catalog(name).save(path)
    except OSError as error:
        raise SettingError(f"cannot write {path}: {error.strerror}") from error
