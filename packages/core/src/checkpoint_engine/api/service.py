"""What the HTTP routes do, without HTTP."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from prometheus_client import CollectorRegistry, generate_latest

from checkpoint_engine.api import bodies
from checkpoint_engine.api.access import EngineAccess, FileAccess, PeerAccess
from checkpoint_engine.api.answers import UnknownCheckpointError, UpdateAbortedError
from checkpoint_engine.catalog import Catalog
from checkpoint_engine.client.update_request import request_inference_to_update
from checkpoint_engine.contract.failure import Held
from checkpoint_engine.contract.phase import Phase
from checkpoint_engine.data_types import MemoryBufferMetaList
from checkpoint_engine.errors import (
    CheckpointEngineError,
    CheckpointStateError,
    DuplicateTensorError,
    SettingError,
    UpdateError,
    error_fields,
)
from checkpoint_engine.link.messages import PROTOCOL
from checkpoint_engine.metrics import UpdateMetrics
from checkpoint_engine.server.parameter_server import ParameterServer
from checkpoint_engine.source.names import DRAFT
from checkpoint_engine.source.safetensors_file import read_header
from checkpoint_engine.transfer.report import Progress, UpdateReport
from checkpoint_engine.version import __version__

__all__ = ["Service"]


@dataclass(frozen=True)
class _Running:
    name: str
    version: str
    start: float
    before: str = ""
    """What is done before the update itself."""


@dataclass(frozen=True)
class _Admitted:
    """An update that may be carried out."""

    ranks: list[int]
    ask: Callable[[list[tuple[str, str]]], None]


class Service:
    """One rank's parameter server for callers on other threads. What all ranks do together runs one at a time."""

    def __init__(self, server: ParameterServer, files: FileAccess, engines: EngineAccess, peers: PeerAccess) -> None:
        self._server = server
        self._files = files
        self._engines = engines
        self._peers = peers
        self._together = threading.Lock()
        self._doing = ""
        self._running: _Running | None = None
        self._abort_reason = ""
        self._last_error: bodies.Error | None = None
        self._registry = CollectorRegistry()
        self._metrics = UpdateMetrics(self._registry)

    def register(self, name: str, body: bodies.FilesBody) -> bodies.Named:
        """Brings this rank's files into host memory."""
        files = self._allowed(body)
        self._server.register_checkpoint(
            name,
            files=files,
            use_shared_memory_pool=body.use_shared_memory_pool,
            use_inplace_pin_memory=body.use_inplace_pin_memory,
            opener=self._files.open,
        )
        return bodies.Named(name=name)

    def unregister(self, name: str, *, force: bool) -> bodies.Named:
        """Frees them."""
        with self._named(name):
            self._server.unregister_checkpoint(name, force=force)
        return bodies.Named(name=name)

    def gather(self, name: str, timeout: float) -> bodies.Gathered:
        """Tells all ranks what each of them holds."""
        with self._named(name), self._alone(f"gather-metas of {name!r}"):
            self._server.gather_metas(name, timeout=timedelta(seconds=timeout))
        return _gathered(self._server.catalog(name))

    def update(self, name: str, body: bodies.UpdateBody) -> UpdateReport:
        """Runs one update."""
        order = self._checked(body)
        with self._named(name), self._alone(f"an update to {name!r}"):
            return self._run(name, body, order)

    def publish(self, name: str, body: bodies.PublishBody) -> UpdateReport:
        """One step: these files in place of what had this name here, gathered, and brought to the engines."""
        order, files = self._checked(body), self._allowed(body)
        version = body.version or name
        with self._alone(f"a step of {name!r}"), ExitStack() as until_sent:
            with self._under_way(name, version, "register"):
                step = self._server.refreshed(name, files=files, opener=self._files.open)
                gather = until_sent.enter_context(step)
            with self._under_way(name, version, "gather"):
                gather(timedelta(seconds=body.timeout))
            return self._run(name, body, order)

    def _checked(self, body: bodies.UpdateBody) -> _Admitted:
        chosen = self._checked_ranks(body.inference_group_ranks, "inference_group_ranks")
        ranks = self._checked_ranks(body.ranks, "ranks")
        socket = None if body.uds is None else self._engines.check_socket(body.uds)
        # At a Unix socket the host of the URL is never looked up.
        url = None if body.update_url is None else self._checked_url(body.update_url, socket)

        def ask(addresses: list[tuple[str, str]]) -> None:
            if url is not None:
                ranks = chosen or range(len(addresses) // body.workers)
                numbers = [rank * body.workers + worker for rank in ranks for worker in range(body.workers)]
                handles = dict(addresses[number] for number in numbers)
                request_inference_to_update(url, handles, timeout=body.timeout, uds=socket)

        return _Admitted(ranks, ask)

    def _run(self, name: str, body: bodies.UpdateBody, order: _Admitted) -> UpdateReport:
        with self._under_way(name, body.version or name):
            self._server.update(
                name,
                order.ask,
                timeout=timedelta(seconds=body.timeout),
                ranks=order.ranks or None,
                version=body.version,
                trace=body.trace,
                reload=body.reload,
                method=body.method,
                workers=body.workers,
                only=body.only,
                rollback=body.rollback,
            )
        report = self._server.last_report
        if report is None:
            raise CheckpointStateError("the update left no report")
        self._metrics.succeeded(report.seconds, report.nbytes, report.version)
        return report

    @contextmanager
    def _under_way(self, name: str, version: str, before: str = "") -> Generator[None]:
        """Of an update, or of what is done before it: shown while it lasts, and how it ended after that."""
        self._running, self._abort_reason = _Running(name, version, time.monotonic(), before), ""
        try:
            yield
            self._last_error = None
        except CheckpointEngineError as error:
            self._last_error = _error_body(error)
            self._count_failure(error)
            if self._abort_reason and isinstance(error, UpdateError):
                raise UpdateAbortedError(str(error)) from None
            raise
        finally:
            self._running = None

    def updates(self) -> bodies.Updates:
        """What runs, and what ran."""
        return bodies.Updates(running=self._progress(), last=self._server.last_report, last_error=self._last_error)

    def abort(self, reason: str) -> bodies.Named:
        """Gives the running update up."""
        running = self._running
        self._abort_reason = reason
        if running is None or not self._server.abort(reason):
            raise CheckpointStateError("no update is running on this rank")
        return bodies.Named(name=running.name)

    def release_staging(self) -> bodies.Freed:
        """Frees staging memory that was kept."""
        return bodies.Freed(nbytes=self._server.release_staging())

    def checkpoints(self) -> bodies.Checkpoints:
        """All that this rank holds."""
        names = self._server.checkpoints
        return bodies.Checkpoints(
            checkpoints=[
                bodies.Checkpoint(name=name, registered=True, gathered=self._gathered_or_none(name)) for name in names
            ]
        )

    def metas(self) -> dict[int, MemoryBufferMetaList]:
        """What all ranks hold of the checkpoint gathered last."""
        return self._server.get_metas()

    def catalog_json(self) -> bytes:
        """The same as a catalog."""
        return self._server.catalog().to_json()

    def load_metas(self, metas: Mapping[int, MemoryBufferMetaList]) -> None:
        """Makes known what ranks elsewhere hold."""
        for held in metas.values():
            self._peers.check(held.p2p_store_addr)
        self._server.load_metas(metas)

    def metrics(self) -> bytes:
        """Figures of this rank's updates, as Prometheus reads them."""
        return generate_latest(self._registry)

    def version(self) -> bodies.Version:
        """Who we are."""
        return bodies.Version(
            version=__version__,
            torch=torch.__version__,
            link_protocol=PROTOCOL,
            rank=self._server.rank,
            world_size=self._server.world_size,
            device=self._server.device.identity,
        )

    def _count_failure(self, error: CheckpointEngineError) -> None:
        of_update = isinstance(error, UpdateError)
        kind, phase = (error.kind, error.phase) if of_update else ("", Phase.START.value)
        dirty = None if error.held == Held.UNKNOWN.value else error.held == Held.MIXTURE.value
        self._metrics.failed(kind or type(error).__name__, phase, dirty=dirty)

    def _allowed(self, body: bodies.FilesBody | bodies.PublishBody) -> dict[Path, Collection[str] | None]:
        """What is taken from each file, by its real path; all of a draft model's, for that alone."""
        real: dict[str, Path] = {}
        for path in (*body.files, *body.draft):
            found = self._files.check(path)
            if found in real.values():
                raise DuplicateTensorError(f"the file {found} is given twice")
            real[path] = found
        named = body.files if isinstance(body.files, dict) else dict.fromkeys(body.files)
        own = {path: read_header(real[path], self._files.open).tensors for path in body.draft}
        drafts = {path: {tensor.name: DRAFT + tensor.name for tensor in tensors} for path, tensors in own.items()}
        return {real[path]: names for path, names in {**named, **drafts}.items()}

    def _checked_url(self, url: str, socket: str | None) -> str:
        if socket is None:
            return self._engines.check_url(url)
        path = "/" + url.split("://", 1)[-1].partition("/")[2]
        return f"http://localhost{path}"

    def _checked_ranks(self, ranks: Sequence[int], what: str) -> list[int]:
        wrong = [rank for rank in ranks if not 0 <= rank < self._server.world_size]
        if wrong or len(set(ranks)) != len(ranks):
            raise SettingError(f"{what} is {list(ranks)}; ranks are 0 to {self._server.world_size - 1}, each once")
        return list(ranks)

    @contextmanager
    def _alone(self, what: str) -> Generator[None]:
        if not self._together.acquire(blocking=False):
            raise CheckpointStateError(f"{self._doing} is under way on this rank; wait for it, or abort it")
        self._doing = what
        try:
            yield
        finally:
            self._together.release()

    @contextmanager
    def _named(self, name: str) -> Generator[None]:
        """Tells a checkpoint that nobody knows from one that is in the wrong state."""
        try:
            yield
        except UpdateAbortedError:
            raise
        except CheckpointStateError as error:
            if name in self._server.checkpoints or self._gathered_or_none(name) or self._together.locked():
                raise
            raise UnknownCheckpointError(str(error)) from error

    def _gathered_or_none(self, name: str) -> bodies.Gathered | None:
        try:
            return _gathered(self._server.catalog(name))
        except CheckpointStateError:
            return None

    def _progress(self) -> bodies.RunningUpdate | None:
        running, progress = self._running, self._server.progress
        if running is None:
            return None
        if running.before:
            progress = Progress()
        return bodies.RunningUpdate(
            name=running.name,
            version=running.version,
            phase=running.before or progress.phase,
            buckets_done=progress.buckets_done,
            buckets=progress.buckets,
            bytes_done=progress.bytes_done,
            nbytes=progress.nbytes,
            seconds=time.monotonic() - running.start,
        )


def _gathered(catalog: Catalog) -> bodies.Gathered:
    return bodies.Gathered(
        name=catalog.name,
        tensors=sum(1 for _ in catalog.wholes()),
        nbytes=catalog.nbytes,
        fingerprint=catalog.fingerprint(),
    )


def _error_body(error: CheckpointEngineError) -> bodies.Error:
    return bodies.Error.model_validate(error_fields(error))
