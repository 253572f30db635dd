"""What a client says of an engine after an update failed, by what the workers hold and not by what the sender heard."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from checkpoint_engine import limits
from checkpoint_engine.client.engine_client import PauseMode
from checkpoint_engine.client.engine_turn import EngineTurn
from checkpoint_engine.client.rpc_client import ReferenceClient
from checkpoint_engine.client.settlement import held_by
from checkpoint_engine.client.workers_client import WorkersClient, WorkersOrder
from checkpoint_engine.contract.failure import Held
from checkpoint_engine.contract.phase import Phase
from checkpoint_engine.contract.reports import WorkerReport, WorkerStatus, name_of_update
from checkpoint_engine.deadline import Deadline
from checkpoint_engine.errors import (
    CheckpointEngineError,
    DeadlineError,
    EngineSilentError,
    LinkClosedError,
    UpdateError,
)
from checkpoint_engine.link.messages import Finished
from checkpoint_engine.reference.engine import ModelSpec, make_checkpoint
from checkpoint_engine.reference.process import ReferenceProcess
from checkpoint_engine.server import ParameterServer
from checkpoint_engine.source.directory import find_files
from checkpoint_engine.transfer.worker_link import WorkerLink
from tests.core.engines import assert_holds
from tests.ports import free_port

SPEC = ModelSpec()
TP = 2
MINE, OTHERS = name_of_update("ce-link:///mine#t"), name_of_update("ce-link:///others#t")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints")
    for seed, name in enumerate("ab", start=1):
        make_checkpoint(directory / name, SPEC, seed, shards=1)
    return directory


@pytest.fixture(scope="module")
def engine() -> Iterator[ReferenceProcess]:
    with ReferenceProcess(SPEC.to_json(), TP) as process:
        ReferenceClient(process.endpoint).wait_ready(Deadline(60))
        yield process


@pytest.fixture
def server() -> Iterator[ParameterServer]:
    with ParameterServer(rank=0, world_size=1, device="cpu", master_addr="127.0.0.1", master_port=free_port()) as one:
        yield one


@pytest.mark.parametrize(
    ("workers", "held"),
    [
        ([], Held.UNKNOWN),
        ([WorkerStatus(dirty=False, version="old"), WorkerStatus(dirty=False, version="old")], Held.OLD),
        ([WorkerStatus(dirty=False), WorkerStatus(dirty=False)], Held.OLD),
        ([WorkerStatus(dirty=False, version="v"), WorkerStatus(dirty=False, version="v")], Held.NEW),
        ([WorkerStatus(dirty=False, version="v"), WorkerStatus(dirty=False, version="old")], Held.MIXTURE),
        ([WorkerStatus(dirty=False, version="old"), WorkerStatus(dirty=False, version="older")], Held.MIXTURE),
        ([WorkerStatus(dirty=False, version="v"), WorkerStatus(dirty=True, version="v")], Held.MIXTURE),
        ([WorkerStatus(dirty=False, version="v", updating=True)], Held.MIXTURE),
        # The same version was brought before, with other weights.
        ([WorkerStatus(dirty=False, version="v", update=OTHERS)] * 2, Held.OLD),
        ([WorkerStatus(dirty=False, version="v", update="")] * 2, Held.OLD),
        ([WorkerStatus(dirty=False, version="v", update=MINE)] * 2, Held.NEW),
        ([WorkerStatus(dirty=False, version="v", update=u) for u in (MINE, OTHERS)], Held.MIXTURE),
    ],
)
def test_what_workers_hold_together(workers: list[WorkerStatus], held: Held) -> None:
    assert held_by(workers, "v", {MINE}) is held


def push(
    server: ParameterServer, engine: ReferenceProcess, directory: Path, version: str, pause: PauseMode = "keep"
) -> CheckpointEngineError | None:
    """Updates the engine; returns what its client says, and raises what the rank says."""
    said: Future[CheckpointEngineError | None] = Future()

    def ask(addresses: list[tuple[str, str]]) -> None:
        client = ReferenceClient(engine.endpoint)
        try:
            client.update_weights(dict(addresses), version=version, pause=pause, reset_caches=True, timeout=30)
        except CheckpointEngineError as error:
            said.set_result(error)
            raise
        said.set_result(None)

    for name in server.checkpoints:
        server.unregister_checkpoint(name)
    server.register_checkpoint(directory.name, files=find_files(directory), use_inplace_pin_memory=False)
    server.gather_metas(directory.name)
    try:
        server.update(directory.name, ask, timeout=timedelta(seconds=30), version=version, method="direct", workers=TP)
    except UpdateError:
        return said.result(30)
    return said.result(30)


def is_paused(engine: ReferenceProcess) -> bool:
    return ReferenceClient(engine.endpoint).endpoint.call("GET", "/is_paused", Deadline(5))["is_paused"]


def ask_and_go_deaf(link: WorkerLink, sums: tuple[int, ...]) -> None:
    """Asks the worker to finish as a sender does whom its answer no longer reaches."""
    link.channel._socket.shutdown(socket.SHUT_RD)  # before, since the worker may be quick
    ask_to_finish(link, sums)


def hang_up(link: WorkerLink) -> Finished:
    """As the kernel does for a sender that dies between Finish and Finished."""
    link.channel._socket.shutdown(socket.SHUT_RDWR)
    raise LinkClosedError("this sender is dead")


ask_to_finish = WorkerLink.ask_to_finish


def test_a_version_that_is_brought_again_is_told_from_itself(
    server: ParameterServer, engine: ReferenceProcess, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert push(server, engine, checkpoints / "a", "latest") is None
    assert server.last_report is not None
    seconds = server.last_report.seconds
    assert 0 < seconds["paused"] < seconds["total"], "from the pause to the resumption, which an update is more than"
    client = ReferenceClient(engine.endpoint)
    client.endpoint.call("POST", "/fault", Deadline(10), query={"name": "refuse"})
    error = push(server, engine, checkpoints / "b", "latest")
    assert "it still holds its old weights" in str(error)
    assert_holds(engine, checkpoints / "a")
    monkeypatch.setattr(WorkerLink, "wait_until_finished", hang_up)
    error = push(server, engine, checkpoints / "b", "latest")
    assert "all its workers hold version 'latest' already" in str(error)
    assert_holds(engine, checkpoints / "b")


@pytest.mark.parametrize("pause", ["keep", "none"])
def test_a_sender_that_dies_before_it_hears_that_all_is_finished(
    pause: PauseMode,
    server: ParameterServer,
    engine: ReferenceProcess,
    checkpoints: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert push(server, engine, checkpoints / "a", "a") is None
    with monkeypatch.context() as patched:
        patched.setattr(WorkerLink, "ask_to_finish", ask_and_go_deaf)
        patched.setattr(WorkerLink, "wait_until_released", hang_up)
        error = push(server, engine, checkpoints / "b", "b", pause)
    assert error is not None
    assert "all its workers hold version 'b' already, and it serves them" in str(error)
    assert error.held == Held.NEW
    assert_holds(engine, checkpoints / "b")
    assert not is_paused(engine)


def paused_by_a_sender_that_died(engine: ReferenceProcess) -> None:
    code = (
        "import os, sys; from checkpoint_engine.client.rpc_client import ReferenceClient;"
        "from checkpoint_engine.client.engine_turn import EngineTurn; from checkpoint_engine.deadline import Deadline;"
        "EngineTurn(sys.argv[1]).take(Deadline(5)).note_pause();"
        "ReferenceClient(sys.argv[1]).pause('keep', reset_caches=False, deadline=Deadline(5)); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, engine.endpoint], check=False, timeout=60).returncode == 9
    assert is_paused(engine)


def test_engines_that_are_named_without_a_scheme_are_told_apart() -> None:
    """As people say it, `host:port`; and those in a process, which have no host."""
    with EngineTurn("localhost:39001").take(Deadline(5)), pytest.raises(DeadlineError, match="one updater at a time"):
        EngineTurn("http://127.0.0.1:39001").take(Deadline(0.1))
    names = ("localhost:39001", "localhost:39002", "an engine of process 1", "an engine of process 2")
    with contextlib.ExitStack() as turns:
        for name in names:
            turns.enter_context(EngineTurn(name).take(Deadline(0)))


def test_an_engine_has_one_updater_at_a_time(
    server: ParameterServer, engine: ReferenceProcess, checkpoints: Path
) -> None:
    """Else the one that is over first would let it serve while the other loads."""
    with EngineTurn(engine.endpoint).take(Deadline(5)) as turn:
        turn.note_pause()
        other = engine.endpoint.replace("127.0.0.1", "localhost")
        with pytest.raises(DeadlineError, match=rf"by process {os.getpid()}, which was not over within 0\.2 s"):
            EngineTurn(other).take(Deadline(0.2))
        with ThreadPoolExecutor(1) as pool:
            pushed = pool.submit(push, server, engine, checkpoints / "a", "a")
            time.sleep(1.0)
            assert not pushed.done()
            assert not is_paused(engine)  # it has not even begun
            turn.note_resume()
            turn.give_back()
            assert pushed.result(60) is None
    assert_holds(engine, checkpoints / "a")


def test_who_tries_again_at_once_after_a_deadline_has_it_serve_no_request_meanwhile(
    server: ParameterServer, engine: ReferenceProcess, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that asked for the first update lives on, and would end its own pause in the middle of the second."""
    assert push(server, engine, checkpoints / "a", "a") is None

    def update(client: ReferenceClient, seconds: float) -> None:
        def ask(addresses: list[tuple[str, str]]) -> None:
            client.update_weights(dict(addresses), version="b", pause="keep", reset_caches=True, timeout=seconds)

        limit = timedelta(seconds=seconds)
        server.update("b", ask, timeout=limit, version="b", method="direct", workers=TP, rollback=False)

    server.unregister_checkpoint("a")
    server.register_checkpoint("b", files=find_files(checkpoints / "b"), use_inplace_pin_memory=False)
    server.gather_metas("b")
    with pytest.raises(UpdateError, match="1 s"):
        update(LateClient(engine.endpoint), 1.0)
    seen, finishing, over = list[bool](), threading.Event(), threading.Event()

    def ask_later(link: WorkerLink, sums: tuple[int, ...]) -> None:
        time.sleep(0.8)  # by then the first request has ended, too
        finishing.set()  # and from now on this one's may
        ask_to_finish(link, sums)

    monkeypatch.setattr(WorkerLink, "ask_to_finish", ask_later)
    watch = threading.Thread(target=watch_while_it_loads, args=(server, engine, seen, finishing, over))
    watch.start()
    try:
        update(ReferenceClient(engine.endpoint), 30)
    finally:
        over.set()
        watch.join()
    assert seen
    assert all(seen), "it served while it loaded"
    assert not is_paused(engine)
    assert_holds(engine, checkpoints / "b")


_BETWEEN = (Phase.LOAD, Phase.FINISH)


class LateClient(ReferenceClient):
    """Of an engine that is slow to hear."""

    def ask_workers(self, order: WorkersOrder, deadline: Deadline) -> list[WorkerReport]:
        time.sleep(2)
        return super().ask_workers(order, deadline)


def watch_while_it_loads(
    server: ParameterServer,
    engine: ReferenceProcess,
    paused: list[bool],
    finishing: threading.Event,
    over: threading.Event,
) -> None:
    while not over.is_set():
        before = server.progress.phase
        now = is_paused(engine)
        if before in _BETWEEN and server.progress.phase in _BETWEEN and not finishing.is_set():
            paused.append(now)


def test_a_pause_that_somebody_else_made_is_left_as_it_was(
    server: ParameterServer, engine: ReferenceProcess, checkpoints: Path
) -> None:
    client = ReferenceClient(engine.endpoint)
    client.pause("keep", reset_caches=False, deadline=Deadline(5))
    assert push(server, engine, checkpoints / "a", "a") is None
    assert is_paused(engine)
    client.endpoint.call("POST", "/fault", Deadline(10), query={"name": "refuse"})
    assert "still holds its old weights" in str(push(server, engine, checkpoints / "b", "b"))
    assert is_paused(engine)
    client.resume(Deadline(5))
    assert push(server, engine, checkpoints / "b", "b") is None
    assert not is_paused(engine)


def test_an_engine_whose_sender_died_after_it_paused_is_opened_again(
    server: ParameterServer, engine: ReferenceProcess, checkpoints: Path
) -> None:
    assert push(server, engine, checkpoints / "a", "a") is None
    assert "are whole (version 'a'), and it serves them" in ReferenceClient(engine.endpoint).settle_orphan(Deadline(5))
    paused_by_a_sender_that_died(engine)
    assert "are whole (version 'a'), and it serves them" in ReferenceClient(engine.endpoint).settle_orphan(Deadline(5))
    assert not is_paused(engine)
    paused_by_a_sender_that_died(engine)
    assert push(server, engine, checkpoints / "b", "b") is None
    assert not is_paused(engine)


@pytest.fixture
def own_engine() -> Iterator[ReferenceProcess]:
    with ReferenceProcess(SPEC.to_json(), TP) as process:
        ReferenceClient(process.endpoint).wait_ready(Deadline(60))
        yield process


@pytest.mark.long
@pytest.mark.parametrize("stopped", [pytest.param("front", marks=pytest.mark.endurance), "worker"])
def test_an_engine_that_is_stopped_is_not_waited_for_until_the_deadline(
    stopped: str, server: ParameterServer, own_engine: ReferenceProcess, checkpoints: Path
) -> None:
    assert push(server, own_engine, checkpoints / "a", "a") is None
    client = ReferenceClient(own_engine.endpoint)
    pid = own_engine.pid if stopped == "front" else client.endpoint.call("GET", "/pids", Deadline(5))["pids"][1]
    os.kill(pid, signal.SIGSTOP)
    start = time.monotonic()
    try:
        error = push(server, own_engine, checkpoints / "b", "b")
    finally:
        os.kill(pid, signal.SIGCONT)
    assert time.monotonic() - start < 20
    assert "stopped" in str(error)
    assert "nothing was sent to it: it still holds its old weights" in str(error)
    assert push(server, own_engine, checkpoints / "b", "b") is None
    assert_holds(own_engine, checkpoints / "b")


@pytest.mark.endurance
def test_a_worker_that_is_stopped_while_it_loads_is_named(
    server: ParameterServer, own_engine: ReferenceProcess, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = ReferenceClient(own_engine.endpoint)
    pid = client.endpoint.call("GET", "/pids", Deadline(5))["pids"][1]
    told = WorkerLink.ask_to_finish

    def stop(link: WorkerLink) -> None:
        if link.channel.peer == pid:
            os.kill(pid, signal.SIGSTOP)
        told(link)

    monkeypatch.setattr(WorkerLink, "ask_to_finish", stop)
    start = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        pushed = pool.submit(push, server, own_engine, checkpoints / "b", "b", "none")
        with pytest.raises(FutureTimeoutError):  # it answers its engine when it runs again
            pushed.result(12)
        os.kill(pid, signal.SIGCONT)
        error = pushed.result(20)
    assert time.monotonic() - start < 25
    assert error is not None
    assert error.held == Held.NEW  # it had been told to finish, and does
    assert_holds(own_engine, checkpoints / "b")
    monkeypatch.undo()
    assert push(server, own_engine, checkpoints / "a", "a") is None
    assert_holds(own_engine, checkpoints / "a")


class _Front(BaseHTTPRequestHandler):
    """Of an engine that answers for its health only once it has generated a token: not during an update."""

    def do_GET(self) -> None:
        if self.path == "/health":
            time.sleep(3)
        self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_an_engine_that_is_busy_is_not_silent_and_one_that_is_stopped_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "KNOCK", 0.2)
    with ThreadingHTTPServer(("127.0.0.1", 0), _Front) as front:
        front.daemon_threads = True
        threading.Thread(target=front.serve_forever, daemon=True).start()
        busy = WorkersClient(f"http://127.0.0.1:{front.server_port}")
        assert busy._while_it_lives(lambda: time.sleep(1.0) or "done") == "done"
        front.shutdown()
    with socket.create_server(("127.0.0.1", 0)) as stopped:
        silent = WorkersClient(f"http://127.0.0.1:{stopped.getsockname()[1]}")
        with pytest.raises(EngineSilentError, match="answers nothing"):
            silent._while_it_lives(lambda: time.sleep(2.0))
