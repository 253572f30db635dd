"""Ranks find each other, know each other, and notice within seconds who is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import msgspec
import pytest
import torch
import torch.distributed as dist

from checkpoint_engine import limits
from checkpoint_engine.collective import ControlPlane, connect_ranks
from checkpoint_engine.collective.ledger import Ledger
from checkpoint_engine.collective.parts import pack_parts, unpack_parts
from checkpoint_engine.collective.rank_messages import Call, FromHub, Lost, RankRequest
from checkpoint_engine.contract.failure import Failure
from checkpoint_engine.contract.phase import Phase
from checkpoint_engine.deadline import Cancel, Deadline
from checkpoint_engine.errors import (
    AccessRefusedError,
    CheckpointStateError,
    DeadlineError,
    RankError,
    SettingError,
    UpdateError,
)
from checkpoint_engine.link.channel import Listener
from checkpoint_engine.server.parameter_server import ParameterServer
from checkpoint_engine.transfer import update
from tests.core.rank_processes import RankProcess, all_of
from tests.ports import free_port
from tests.waiting import within

SECRET = "CHECKPOINT_ENGINE_RANKS_SECRET"


@contextlib.contextmanager
def ranks(world_size: int) -> Iterator[list[RankProcess]]:
    port = free_port()
    started = [RankProcess(rank, world_size, port) for rank in range(world_size)]
    try:
        yield started
    finally:
        for rank in started:
            rank.end()


def test_a_rank_that_is_stopped_or_killed_is_told_apart_within_seconds_and_named_by_all() -> None:
    with ranks(3) as (zero, one, two):
        assert [said for _, said in all_of([zero, one, two], "gather", 90)] == ["done"] * 3

        two.send(signal.SIGSTOP)
        for seconds, said in all_of([zero, one], "update", 60):
            assert "UpdateError of rank 2" in said
            assert "gave no sign of life" in said
            assert seconds < limits.SILENCE + limits.BEAT + limits.EXPLANATION + 2
        two.send(signal.SIGCONT)  # what was cut off heals
        time.sleep(2 * limits.BEAT)
        assert [said for _, said in all_of([zero, one, two], "barrier", 30)] == ["done"] * 3

        two.send(signal.SIGKILL)
        answers = all_of([zero, one], "barrier", 60)
        assert any("is gone: its connection has closed" in said for _, said in answers), answers
        for seconds, said in answers:
            assert "RankError of rank" in said
            assert seconds < limits.BEAT + 2

        zero.send(signal.SIGSTOP)
        ((seconds, said),) = all_of([one], "update", 10)
        assert "UpdateError of rank 0" in said
        assert seconds < 10


def test_a_rank_that_lives_and_does_nothing_is_told_apart_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HUNG", 3.0)
    port = free_port()
    hung = RankProcess(1, 2, port)
    try:
        with ParameterServer(rank=0, world_size=2, master_addr="127.0.0.1", master_port=port, device="cpu") as server:
            server.register_checkpoint("a", named_tensors={"x": torch.ones(2)})
            hung.order("gather", 60)
            server.gather_metas("a", timeout=timedelta(seconds=60))
            assert hung.answer()[1] == "done"
            hung.order("hang", 8)
            start = time.monotonic()
            with pytest.raises(RankError, match=r"rank 1 .*is hung: it does nothing since \d s, but lives"):
                server.store_based_barrier(timedelta(seconds=30))
            assert time.monotonic() - start < 7
    finally:
        hung.end()


def test_a_rank_0_that_is_not_there_is_waited_for_no_longer_than_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for address, message in (
        ("127.0.0.1", "no rank 0 of this user waits on this host"),
        ("nobody.invalid", "cannot be resolved"),
        ("[::1]", "no rank 0 of this user"),
    ):
        server = ParameterServer(rank=1, world_size=2, master_addr=address, master_port=free_port(), device="cpu")
        with server:
            server.register_checkpoint("a", named_tensors={"x": torch.ones(2)})
            start = time.monotonic()
            with pytest.raises(DeadlineError, match=message) as absent:
                server.gather_metas("a", timeout=timedelta(seconds=1))
            assert "RANK, WORLD_SIZE" in str(absent.value)
            assert time.monotonic() - start < 8


def test_ranks_of_several_hosts_need_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        ParameterServer(rank=1, world_size=2, master_addr="192.0.2.7", master_port=free_port(), device="cpu") as server,
        pytest.raises(SettingError, match=f"several hosts know each other by a secret: set {SECRET}"),
    ):
        server.gather_metas("a", timeout=timedelta(seconds=30))
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(SettingError, match=SECRET):
        connect_ranks(0, 16, "127.0.0.1", free_port())


def test_a_secret_that_others_can_read_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("0123456789abcdef")
    file.chmod(0o644)
    monkeypatch.setenv(f"{SECRET}_FILE", str(file))
    with pytest.raises(AccessRefusedError, match="chmod 600"):
        connect_ranks(0, 2, "127.0.0.1", free_port())
    file.chmod(0o600)
    file.write_text("short")
    with pytest.raises(SettingError, match="16"):
        connect_ranks(0, 2, "127.0.0.1", free_port())


def test_rank_0_listens_on_the_address_that_was_given_and_on_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()

    def listens(address: str) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((address, port)) == 0

    zero = connect_ranks(0, 2, "127.0.0.2", port)  # ranks of one host need none
    assert not any(map(listens, ("127.0.0.1", "127.0.0.2")))
    zero.close()
    for variable, value in {
        SECRET: "of several hosts, as it seems",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "1",
    }.items():
        monkeypatch.setenv(variable, value)
    zero = connect_ranks(0, 2, "127.0.0.2", port)
    assert list(map(listens, ("127.0.0.1", "127.0.0.2"))) == [False, True]
    zero.close()


def test_ranks_with_different_secrets_never_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setenv(SECRET, "of one run, and of no other")
    zero = connect_ranks(0, 2, "127.0.0.1", port)
    monkeypatch.setenv(SECRET, "of another run altogether")
    one = connect_ranks(1, 2, "127.0.0.1", port)
    with pytest.raises(DeadlineError, match="did not reach rank 0"):
        one.wait_until_connected(Deadline(1.0))
    one.close()
    zero.close()


def test_a_rank_that_was_started_again_by_itself_is_refused() -> None:
    port = free_port()
    zero, one = (connect_ranks(rank, 2, "127.0.0.1", port) for rank in range(2))
    one.wait_until_connected(Deadline(5.0))
    again = connect_ranks(1, 2, "127.0.0.1", port)
    with pytest.raises(DeadlineError, match=r"knows rank 1 .* already, and this is another"):
        again.wait_until_connected(Deadline(1.0))
    for plane in (again, zero, one):
        plane.close()


@pytest.mark.long
def test_nothing_is_left_behind_and_what_a_dead_rank_left_is_removed(tmp_path: Path) -> None:
    code = (
        "import os, sys; from checkpoint_engine.collective import connect_ranks;"
        "connect_ranks(0, 2, '127.0.0.1', int(sys.argv[1])); os._exit(0)"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    left: list[set[str]] = []
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code, str(free_port())], check=True, env=environment, timeout=60)
        left.append({path.name for path in next(tmp_path.iterdir()).iterdir()})
    assert [len(names) for names in left] == [2, 2]
    assert not left[0] & left[1]


@pytest.fixture
def planes() -> Iterator[list[ControlPlane]]:
    port = free_port()
    made = [connect_ranks(rank, 2, "127.0.0.1", port) for rank in range(2)]
    for plane in made:
        plane.wait_until_connected(Deadline(10.0))
    yield made
    for plane in made:
        plane.close()


def test_a_gathering_that_another_rank_has_given_up_is_given_up_at_once(planes: list[ControlPlane]) -> None:
    zero, one = (plane.board() for plane in planes)
    failure = msgspec.json.encode(Failure(0, Phase.GATHER, "DeadlineError", "it lost patience"))
    assert zero.post("call-1/failure", failure) == failure
    assert one.post("call-1/failure", b"too late") == failure
    with pytest.raises(RankError, match="rank 0 gave up: it lost patience"):
        one.gather("call-1/x", b"", Deadline(30.0), Cancel(), "all", unless="call-1/failure")
    cancel = Cancel()
    cancel.set(CheckpointStateError("somebody threw the switch"))
    with pytest.raises(CheckpointStateError, match="switch"):
        one.gather("call-2/x", b"", Deadline(30.0), cancel, "all")


def test_torchs_libraries_connect_their_groups_over_it(planes: list[ControlPlane]) -> None:
    """It is one of torch's stores."""
    store = dist.PrefixStore("part", planes[1].store)
    other = dist.PrefixStore("part", planes[0].store)
    assert not store.check(["bytes"])
    other.set("bytes", b"\0\xff")
    assert store.get("bytes") == b"\0\xff"
    assert [store.add("n", 2), other.add("n", 3)] == [2, 5]
    assert other.compare_set("new", "", "first") == b"first"
    assert store.compare_set("new", "", "second") == b"first"
    assert store.delete_key("new")
    assert not store.delete_key("new")
    planes[1].store.set_timeout(timedelta(seconds=0.3))
    with pytest.raises(dist.DistStoreError, match=r"within 0\.3 s"):
        planes[1].store.get("never set")


def test_requests_that_come_again_are_done_once(planes: list[ControlPlane]) -> None:
    """As after a break of the connection."""
    ledger = Ledger(1)
    assert ledger.take(0, RankRequest(1, Call.ADD, "n", amount=1), [])[0].frames == [b"1"]
    spoke = planes[1]._spoke
    assert spoke is not None
    pending = spoke.ask(Call.ADD, "n", amount=1)
    for _ in range(3):
        spoke._outbox.put(pending)
    assert pending.wait(5.0) == [b"1"]
    assert spoke.ask(Call.ADD, "n", amount=1).wait(5.0) == [b"2"]


def test_what_thousands_of_ranks_gather_travels_as_one_frame_that_stays_small() -> None:
    parts = [b"", *(f"rank {rank} on host{rank // 8} has 39 tensors".encode() for rank in range(4096))]
    frame = pack_parts(parts)
    assert unpack_parts(frame) == parts
    assert len(frame) < sum(map(len, parts)) / 4
    assert unpack_parts(pack_parts([])) == []
    for damaged in (b"", frame[:-1], frame[:100] + b"\0" * 100 + frame[200:]):
        with pytest.raises(RankError, match="no gathering"):
            unpack_parts(damaged)


def test_some_ranks_gather_among_themselves(planes: list[ControlPlane]) -> None:
    both = planes[1].board(), planes[1].board([1])
    alone = both[1].gather("some", b"one", Deadline(5.0), Cancel(), "itself")
    assert alone == [b"one"]
    pending = planes[0]._spoke.ask(Call.GATHER, "all", b"zero")  # type: ignore[union-attr]
    assert both[0].gather("all", b"one", Deadline(5.0), Cancel(), "all") == [b"zero", b"one"]
    answer = pending.wait(5.0)
    assert answer is not None
    assert unpack_parts(answer[0]) == [b"zero", b"one"]


def test_ranks_that_leave_together_are_told_of_in_few_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not each of them to each."""
    port, size = free_port(), 12
    planes = [connect_ranks(rank, size, "127.0.0.1", port) for rank in range(size)]
    try:
        for plane in planes:
            plane.wait_until_connected(Deadline(10.0))
        hub, told = planes[0]._hub, list[int]()
        assert hub is not None
        write = hub._write

        def note(identity: bytes, message: FromHub, *frames: Sequence[bytes]) -> bool:
            if isinstance(message, Lost):
                told.append(len(message.ranks))
            return write(identity, message, *frames)

        monkeypatch.setattr(hub, "_write", note)
        monkeypatch.setattr(hub, "_tell_news", lambda: None)
        with ThreadPoolExecutor(size) as pool:
            list(pool.map(ControlPlane.close, planes[2:]))
        assert within(5.0, lambda: len(hub._news) == size - 2)
        monkeypatch.undo()
        monkeypatch.setattr(hub, "_write", note)
        spoke = planes[1]._spoke
        assert spoke is not None
        assert within(5.0, lambda: spoke.lost.keys() == set(range(2, size)))
        assert told == [size - 2] * 2
    finally:
        for plane in reversed(planes):
            plane.close()


def test_an_update_without_rank_0_is_an_update_error() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with ParameterServer(rank=1, world_size=2, master_addr="127.0.0.1", master_port=port, device="cpu") as server:
            server.register_checkpoint("a", named_tensors={"x": torch.ones(2)})
            server._gathered.note("a", [], [], remote=False)
            with pytest.raises(UpdateError, match=r"phase 'introduce'.*did not reach rank 0"):
                server.update("a", lambda _: None, timeout=timedelta(seconds=1))


def test_an_update_that_waits_for_rank_0_can_be_given_up() -> None:
    with ParameterServer(
        rank=1, world_size=2, master_addr="127.0.0.1", master_port=free_port(), device="cpu"
    ) as server:
        server.register_checkpoint("a", named_tensors={"x": torch.ones(2)})
        server._gathered.note("a", [], [], remote=False)
        with ThreadPoolExecutor(1) as pool:
            update = pool.submit(server.update, "a", lambda _: None, timeout=timedelta(seconds=60))
            assert within(5.0, lambda: server.abort("somebody lost patience"))
            with pytest.raises(UpdateError, match=r"phase 'introduce'.*somebody lost patience"):
                update.result(5.0)


def test_a_rank_feeds_no_more_workers_than_a_host_can_have() -> None:
    with ParameterServer(rank=0, world_size=1, device="cpu") as server:
        server.register_checkpoint("a", named_tensors={"x": torch.ones(2)})
        server.gather_metas("a")
        with pytest.raises(SettingError, match="at most 1024"):
            server.update("a", lambda _: None, workers=1 << 40)


def test_of_several_links_none_stays_where_one_cannot_be_opened(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("l")
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    opened: list[Listener] = []

    def open_two() -> Listener:
        if len(opened) == 2:
            raise SettingError("there are no descriptors left")
        opened.append(Listener())
        return opened[-1]

    monkeypatch.setattr(update, "Listener", open_two)
    with ParameterServer(rank=0, world_size=1, device="cpu") as server:
        server.register_checkpoint("a", named_tensors={"x": torch.ones(2)})
        server.gather_metas("a")
        with pytest.raises(UpdateError, match=r"phase .introduce.*no descriptors left"):
            server.update("a", lambda _: None, method="direct", workers=3)
        assert len(opened) == 2
        assert list(directory.glob("checkpoint-engine-link-*")) == []
