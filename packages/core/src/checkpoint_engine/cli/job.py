"""What one rank does in an update: read its share, meet the others, ask the engine, send."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from checkpoint_engine import limits
from checkpoint_engine.background import in_background
from checkpoint_engine.catalog import Catalog
from checkpoint_engine.cli.messages import UNASKED, Done, Job, Progressed
from checkpoint_engine.client.auto import load_client
from checkpoint_engine.client.engine_client import EngineClient
from checkpoint_engine.client.plugins import verifying_client
from checkpoint_engine.contract.phase import Phase
from checkpoint_engine.deadline import Deadline
from checkpoint_engine.errors import (
    CheckpointEngineError,
    CheckpointStateError,
    RankError,
    SettingError,
    UpdateError,
    WorkerSilentError,
)
from checkpoint_engine.server.parameter_server import ParameterServer
from checkpoint_engine.source.assembly import Assembly, assemble
from checkpoint_engine.source.names import NameRules, common_wrapper
from checkpoint_engine.transfer.methods import Method
from checkpoint_engine.transfer.report import UpdateReport
from checkpoint_engine.transfer.trace import save_trace

__all__ = ["EngineLeads", "Rank", "workers_of_each"]

logger = logging.getLogger(__name__)

_TICK_SECONDS = 0.1


class _EngineLead:
    """The engine instance that a rank leads: asks it on behalf of all ranks that feed it."""

    def __init__(self, job: Job, instance: int) -> None:
        self._job = job
        self._endpoint = job.engines.endpoints[instance]
        self._first = instance * job.engines.workers
        self._client: EngineClient = load_client(job.engines.kind)(self._endpoint)
        self._idle = threading.Event()
        self._idle.set()
        self._failure = f"{self._endpoint} {UNASKED}"

    def wait_ready(self) -> None:
        """Waits until the engine serves, and checks that it has the number of workers that it should have.

        Raises:
            DeadlineError: it did not come up in time.
            EngineRequestError: what answers there is no such engine.
            SettingError: it has another number of workers.
        """
        self._client.wait_ready(Deadline(self._job.patience.wait))
        self._job.engines.check_workers(self._endpoint, self._client.world_size())

    def ask(self, addresses: list[tuple[str, str]]) -> None:
        """Asks the engine to update from the ranks that feed it; returns when it serves the new weights."""
        self._idle.clear()
        self._failure = ""
        try:
            mine = addresses[self._first : self._first + self._job.engines.workers]
            if len(dict(mine)) != len(mine):
                raise SettingError(
                    f"ranks {self._first} to {self._first + len(mine) - 1} share a device: each rank needs the GPU of "
                    f"one worker of the engine, but the ranks see only {', '.join(sorted(dict(mine)))}"
                )
            if self._job.transfer.compares:
                verifying_client(self._client).verify_weights(
                    dict(mine), version=self._job.version, timeout=self._job.patience.timeout
                )
                return
            self._client.update_weights(
                dict(mine),
                version=self._job.version,
                pause=self._job.requests.pause.value,
                reset_caches=self._job.requests.reset_caches,
                timeout=self._job.patience.timeout,
            )
        except CheckpointEngineError as error:
            self._failure = str(error)
            raise
        finally:
            self._idle.set()

    def outcome(self, patience: float) -> str:
        """After a failed update: waits for the engine's own words, and returns them."""
        if self._idle.wait(patience):
            return self._failure
        return (
            f"{self._endpoint} has not answered yet: what it holds and whether it serves is unknown "
            "(checkpoint-engine status asks it); update again"
        )


class EngineLeads:
    """The engine instances that a rank leads: mostly one, or none."""

    def __init__(self, job: Job, instances: Sequence[int]) -> None:
        self._leads = [_EngineLead(job, instance) for instance in instances]

    def wait_ready(self) -> None:
        """See `_EngineLead`."""
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

    def outcome(self, patience: float) -> str:
        """See `_EngineLead`."""
        return "\n".join(filter(None, (lead.outcome(patience) for lead in self._leads)))


class Rank:
    """One rank, for one job after the other."""

    def __init__(self, server: ParameterServer, report: Callable[[Progressed], None]) -> None:
        self._server = server
        self._report = report
        self._seconds: dict[str, float] = {}
        self._leads: EngineLeads | None = None
        self.phase = Phase.START
        """What the job does, until it comes to the update itself."""
        self.updating = False
        """Whether the job has come to the update itself; it ends with its own report then, whatever happens."""
        self._given_up = False
        self._turning = threading.Lock()

    def run(self, job: Job) -> Done:
        """Does the job.

        Raises:
            CheckpointEngineError: it could not be done.
        """
        self._seconds = {}
        self.updating = self._given_up = False
        rank, each = self._server.rank, workers_of_each(self._server.world_size, job)
        led = job.engines.led_by(rank, self._server.world_size)
        self._leads = EngineLeads(job, led)
        ready = in_background(self._leads.wait_ready, "waits for the engine") if led else None
        self._wait_for(ready, limits.QUICK_ANSWER)
        name = self._load_metas(job) if job.metas else self._read(job)
        self._wait_for(ready, None)
        if not job.metas:
            self._gather(job, name)
        self._begin_update()
        with self._watched():
            self._server.update(
                name,
                self._leads.ask,
                timeout=timedelta(seconds=job.patience.timeout),
                version=job.version,
                trace=job.afterwards.trace is not None,
                reload=job.transfer.reload,
                method=job.transfer.method,
                keep=job.keep,
                workers=each,
                only=("*",) if job.tensors.only else (),
                rollback=False,  # these ranks have brought nothing before
            )
        done = self._done(job)
        if job.keep:
            self._gather(job, name)
        return done

    def give_up(self) -> bool:
        """Keeps the job from asking an engine for anything; False if it has come to the update itself."""
        with self._turning:
            self._given_up = not self.updating
            return self._given_up

    def _begin_update(self) -> None:
        with self._turning:
            if self._given_up:
                raise RankError("another rank has failed meanwhile")
            self.updating = True

    def engine_outcome(self, error: UpdateError) -> str:
        """After a failed update: what became of the engine that this rank leads, if it leads one."""
        # An engine whose worker is stopped answers once that is continued.
        patience = limits.KNOCK if error.kind == WorkerSilentError.__name__ else limits.RANK_SETTLE
        return self._leads.outcome(patience) if self._leads else ""

    def _load_metas(self, job: Job) -> str:
        self._drop_old()
        catalogs = [Catalog.load(Path(file)) for file in job.metas]
        self._server.load_catalogs(catalogs)
        return catalogs[0].name

    def _gather(self, job: Job, name: str) -> None:
        with self._timed(Phase.GATHER):
            # Another rank may wait for its engine, and is to say itself that that did not come.
            self._server.gather_metas(name, timeout=timedelta(seconds=job.patience.wait + limits.ANSWER))
        if job.afterwards.save_metas and self._server.rank == 0:
            _save(self._server, name, Path(job.afterwards.save_metas))

    def _drop_old(self) -> None:
        for old in self._server.checkpoints:
            self._server.unregister_checkpoint(old)

    def _read(self, job: Job) -> str:
        directory = Path(job.directory)
        name = directory.resolve().name
        self._drop_old()
        with self._timed(Phase.READ):
            rules = NameRules(job.tensors.ignore, job.tensors.strip, job.tensors.only)
            found = assemble(directory, Path(job.draft) if job.draft else None, rules)
            self._warn_of_names(rules, found)
            # What workers read by themselves must not be a file, which anybody could truncate.
            self._server.register_checkpoint(
                name,
                files=found.of_rank(self._server.rank, self._server.world_size),
                use_shared_memory_pool=True,
                use_inplace_pin_memory=job.transfer.method is not Method.DIRECT,
            )
            if job.tensors.reject_nan:
                self._server.refuse_nan(name)
        return name

    def _warn_of_names(self, rules: NameRules, found: Assembly) -> None:
        """Says what is left out, and what is odd about the tensors' names; one rank does."""
        if self._server.rank:
            return
        if found.left_out:
            logger.warning("left out: %s", ", ".join(found.left_out))
        for rule in rules.unused(found.found):
            logger.warning("%s fits no tensor of the checkpoint", rule)
        if wrapper := common_wrapper(list(found.sent.values())):
            logger.warning(
                "all tensors' names begin with %r; if the engine does not know them: --strip-prefix %s",
                wrapper,
                wrapper,
            )

    def _wait_for(self, ready: Future[None] | None, seconds: float | None) -> None:
        if ready is None:
            return
        if not ready.done():
            with self._timed(Phase.ENGINE):
                wait([ready], seconds)
        if ready.done():
            ready.result()

    def _done(self, job: Job) -> Done:
        report = self._server.last_report
        if report is None:
            raise CheckpointStateError("the update left no report")
        if job.afterwards.trace is not None:
            self._save_trace(Path(job.afterwards.trace), report)
        report = replace(report, trace=None)  # it is in the file, and may be long
        return Done(job.number, self._server.rank, {**self._seconds, **report.seconds}, report)

    def _save_trace(self, path: Path, report: UpdateReport) -> None:
        traces = self._server.gather_traces()
        if self._server.rank == 0:
            about = {"version": report.version, "method": report.method, "bytes": report.nbytes}
            save_trace(path, traces, **about, seconds=report.seconds["total"], staging=report.staging)

    @contextmanager
    def _timed(self, phase: Phase) -> Generator[None]:
        self.phase = phase
        self._report(Progressed(phase))
        start = time.perf_counter()
        yield
        self._seconds[phase.value] = self._seconds.get(phase.value, 0.0) + time.perf_counter() - start

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
    engines = job.engines
    workers = engines.all_workers
    expected = job.transfer.ranks or workers
    if ranks != expected or workers % ranks:
        raise SettingError(
            f"{len(engines.endpoints)} engine instance(s) of {engines.workers} worker(s) are fed by {expected} ranks, "
            f"not {ranks} (--ranks, or WORLD_SIZE in the environment): each rank feeds the worker on its own device "
            "(several workers only with --method direct)"
        )
    return workers // ranks


def _save(server: ParameterServer, name: str, path: Path) -> None:
    try:
        server.catalog(name).save(path)
    except OSError as error:
        raise SettingError(f"cannot write {path}: {error.strerror}") from error
