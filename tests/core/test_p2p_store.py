"""Two stores in one process read each other over Mooncake's TCP transport; seeds that die are processes."""

from __future__ import annotations

import resource
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from msgspec import structs

from checkpoint_engine.catalog import Catalog, Holding, SegmentEntry, TensorEntry
from checkpoint_engine.errors import (
    CheckpointEngineError,
    HostMemoryError,
    MissingDependencyError,
    PeerError,
    PeerMovedError,
    SettingError,
)
from checkpoint_engine.host.network_cards import Card
from checkpoint_engine.p2p import mooncake
from checkpoint_engine.p2p.mooncake import MooncakeEngine
from checkpoint_engine.p2p.open import choose_transport
from checkpoint_engine.p2p.store import MOST_RANGES, ByteRange, P2PStore, Peer
from checkpoint_engine.settings import P2PSettings
from checkpoint_engine.source.content import content_of
from checkpoint_engine.source.segment import Segment
from tests.core.p2p_help import needs_mooncake
from tests.core.seed_process import SeedProcess

NBYTES = 3 << 20
checks_addresses = pytest.mark.skipif(
    (mooncake.installed_version() or mooncake.CHECKS_ADDRESSES) < mooncake.CHECKS_ADDRESSES,
    reason="this Mooncake serves any address over TCP, as its users are told",
)
PATIENCE = 3.0


@pytest.fixture(scope="module")
def engines() -> list[MooncakeEngine]:
    return [MooncakeEngine("127.0.0.1", "tcp", [], PATIENCE) for _ in range(2)]


@pytest.fixture
def here(engines: list[MooncakeEngine]) -> Iterator[P2PStore]:
    store = P2PStore(engines[0], [], PATIENCE)
    yield store
    store.close()


@pytest.fixture
def there(engines: list[MooncakeEngine]) -> Iterator[P2PStore]:
    store = P2PStore(engines[1], [], PATIENCE)
    yield store
    store.close()


@pytest.fixture
def source() -> Iterator[Segment]:
    segment = Segment.create(NBYTES)
    segment.tensor.random_(generator=torch.Generator().manual_seed(1))
    yield segment
    segment.close()


@pytest.fixture
def target() -> Iterator[Segment]:
    segment = Segment.create(NBYTES)
    yield segment
    segment.close()


def peer_of(store: P2PStore, name: str, segment: Segment) -> Peer:
    lease = store.share(name, [segment])
    return Peer("rank 0 there", store.address, store.transport, lease.control_address, lease.generation)


def address_of(source: Segment) -> int:
    """Where others read it."""
    assert source.shared is not None
    return source.shared.address  # type: ignore[attr-defined]


def whole(source: Segment, target: Segment) -> list[ByteRange]:
    return [ByteRange(address_of(source), target.address, NBYTES)]


def no_check() -> None:
    pass


@needs_mooncake
def test_bytes_come_over_whatever_their_ranges(
    here: P2PStore, there: P2PStore, source: Segment, target: Segment
) -> None:
    peer = peer_of(there, "a", source)
    here.register(target)
    here.read(peer, whole(source, target), no_check)
    assert torch.equal(source.tensor, target.tensor)
    target.tensor.zero_()
    step = NBYTES // (3 * MOST_RANGES)
    odd = range(1, NBYTES - step, 2 * step)
    here.read(peer, [ByteRange(address_of(source) + o, target.address + o, step) for o in odd], no_check)
    for start in odd:
        assert torch.equal(source.tensor[start : start + step], target.tensor[start : start + step])
    assert target.tensor[0] == 0
    here.verify(peer)


@needs_mooncake
def test_a_holder_that_moved_on_is_refused_even_if_it_moves_during_the_read(
    here: P2PStore, there: P2PStore, source: Segment, target: Segment
) -> None:
    old = peer_of(there, "a", source)
    assert peer_of(there, "a", source) == old
    here.register(target)
    there.withdraw("a")
    with pytest.raises(PeerMovedError, match=r"rank 0 there at 127.0.0.1:\d+ no longer holds"):
        here.read(old, whole(source, target), no_check)
    new = peer_of(there, "a", source)
    assert new.generation != old.generation
    with pytest.raises(PeerMovedError):
        here.verify(old)
    calls = 0

    def move_in_the_middle() -> None:
        nonlocal calls
        calls += 1
        if calls == 2:  # the bytes are there, the number has not been asked for
            there.withdraw("a")
            source.tensor.zero_()

    with pytest.raises(PeerMovedError):
        here.read(new, whole(source, target), move_in_the_middle)
    assert calls == 2


@needs_mooncake
@checks_addresses
def test_memory_that_is_not_shared_cannot_be_read(
    here: P2PStore, there: P2PStore, source: Segment, target: Segment
) -> None:
    peer = peer_of(there, "a", source)
    here.register(target)
    beyond = ByteRange(address_of(source) + NBYTES - 4096, target.address, 8192)
    with pytest.raises(PeerError, match=r"8192 bytes.*does not hand these bytes over"):
        here.read(peer, [beyond], no_check)
    source.close()
    with pytest.raises(PeerError, match="does not hand"):
        here.read(peer, [ByteRange(beyond.source, target.address, 4096)], no_check)


@needs_mooncake
@checks_addresses
def test_nobody_can_write_to_what_is_shared(here: P2PStore, there: P2PStore, source: Segment, target: Segment) -> None:
    """Mooncake itself would let anybody who reaches the port."""
    peer = peer_of(there, "a", source)
    before = source.tensor.clone()
    here.register(target)
    for victim in (address_of(source), peer.control_address):
        assert here._engine._engine.batch_transfer_sync_write(peer.address, [target.address], [victim], [8]) != 0
    here.read(peer, whole(source, target), no_check)
    assert torch.equal(source.tensor, before)


@needs_mooncake
def test_wrong_addresses_are_named_with_their_cause(here: P2PStore, target: Segment) -> None:
    here.register(target)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    for peer, match in (
        (Peer("rank 3 of x", f"127.0.0.1:{port}", "tcp", 4096, 1), "rank 3 of x at .*nobody listens there"),
        (Peer("r", "127.0.0.1:1", "rdma", 4096, 1), "over rdma, this process uses tcp"),
        (Peer("r", "no.such.host.invalid:99", "tcp", 4096, 1), "at no.such.host.invalid:99"),
    ):
        started = time.monotonic()
        with pytest.raises(PeerError, match=match):
            here.read(peer, [ByteRange(4096, target.address, 64)], no_check)
        assert time.monotonic() - started < 20


@needs_mooncake
def test_a_check_that_raises_ends_the_read(here: P2PStore, there: P2PStore, source: Segment, target: Segment) -> None:
    def stop() -> None:
        raise CheckpointEngineError("enough")

    with pytest.raises(CheckpointEngineError, match="enough"):
        here.read(peer_of(there, "a", source), whole(source, target), stop)


@needs_mooncake
@pytest.mark.parametrize("signal", ["SIGKILL", "SIGSTOP"])
def test_a_holder_that_dies_or_hangs_while_being_read(here: P2PStore, signal: str) -> None:
    with SeedProcess(64 << 20) as seed:
        target = Segment.create(seed.nbytes)
        here.register(target)
        ranges = [ByteRange(seed.data, target.address, seed.nbytes)] * 40
        threading.Timer(0.3, seed.signal, [signal]).start()
        started = time.monotonic()
        with pytest.raises(PeerError, match="rank 0 of seed"):
            here.read(seed.peer, ranges, no_check)
        assert time.monotonic() - started < 20
        here.retire(target)


@needs_mooncake
def test_a_segment_that_closes_is_registered_no_longer(here: P2PStore, there: P2PStore) -> None:
    for _ in range(3):
        segment = Segment.create(1 << 20)
        peer = peer_of(there, "a", segment)
        shared = segment.shared
        there.share("a", [segment])
        there.register(segment)
        assert segment.shared is shared
        there.withdraw("a")
        segment.close()
        assert segment.shared is None
        with pytest.raises(PeerMovedError):
            here.verify(peer)


@needs_mooncake
def test_memory_where_the_engine_knows_other_memory_is_refused_for_that_reason(here: P2PStore, target: Segment) -> None:
    here.register(target)
    with pytest.raises(HostMemoryError, match=f"at {target.address:#x} it knows other memory") as refusal:
        here._engine.register(target.address, target.nbytes)
    assert "memlock" not in str(refusal.value)


def test_missing_mooncake_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mooncake", None)
    monkeypatch.delitem(sys.modules, "mooncake.engine", raising=False)
    with pytest.raises(MissingDependencyError, match=r"checkpoint-engine-core\[p2p\]") as missing:
        mooncake.import_engine()
    for build in ("non-cuda", "cuda13", "efa"):
        assert build in str(missing.value)


def test_mooncake_without_its_libraries_says_which(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "mooncake"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "engine.py").write_text("raise ImportError('libibverbs.so.1: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("mooncake", "mooncake.engine"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(MissingDependencyError, match=r"libibverbs.*apt-get install"):
        mooncake.import_engine()


def test_the_way_depends_on_the_cards() -> None:
    rdma, efa = Card("mlx5_0", 1, True, 50e9), Card("rdmap0", 1, True, 12.5e9, efa=True)
    unlimited = resource.RLIM_INFINITY
    assert choose_transport("auto", [], unlimited).transport == "tcp"
    assert choose_transport("auto", [rdma], unlimited).cards == (rdma,)
    assert choose_transport("auto", [rdma, efa], unlimited).transport == "efa"
    assert choose_transport("rdma", [rdma, efa], unlimited).cards == (rdma,)
    assert choose_transport("tcp", [rdma], 0).cards == ()
    with pytest.raises(SettingError, match="rdma is asked for"):
        choose_transport("rdma", [efa], unlimited)
    with pytest.raises(HostMemoryError, match="memlock"):
        choose_transport("auto", [rdma], 64 << 10)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("CHECKPOINT_ENGINE_P2P", "yes"),
        ("CHECKPOINT_ENGINE_P2P_TRANSPORT", "udp"),
        ("CHECKPOINT_ENGINE_P2P_PATIENCE", "0"),
    ],
)
def test_settings_that_cannot_work(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingError, match=variable):
        P2PSettings.from_environment()


def test_content_does_not_depend_on_layout() -> None:
    one, two = Segment.create(8192), Segment.create(8192)
    one.tensor.random_(generator=torch.Generator().manual_seed(2))
    two.tensor[4000:6000] = one.tensor[0:2000]
    two.tensor[:3] = one.tensor[2000:2003]
    a, b = TensorEntry("a", "uint8", (2000,), 0), TensorEntry("b", "uint8", (3,), 2000)
    before = content_of([one], [SegmentEntry(8192, (a, b))])
    parts = [TensorEntry("b", "uint8", (3,), 0), TensorEntry("a", "uint8", (2000,), 4000)]
    assert content_of([two], [SegmentEntry(8192, tuple(parts))]) == before
    split = [content_of([one], [SegmentEntry(8192, (tensor,))]) for tensor in (a, b)]
    holdings = [
        Holding(rank, "h", "d", (SegmentEntry(8192, (tensor,)),), content=part)
        for rank, (tensor, part) in enumerate(zip((a, b), split, strict=True))
    ]
    assert Catalog("x", tuple(holdings)).content == before
    assert Catalog("x", (*holdings, Holding(2, "h", "d", ()))).content == before
    assert Catalog("x", (holdings[0], structs.replace(holdings[1], content=""))).content == ""
    two.tensor[1] += 1
    assert content_of([two], [SegmentEntry(8192, tuple(parts))]) != before
    one.close()
    two.close()
