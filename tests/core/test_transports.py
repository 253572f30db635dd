"""Which transport carries out which order, and what is refused before anything begins."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch

from checkpoint_engine.catalog import Catalog, Holding
from checkpoint_engine.collective import register_communicator
from checkpoint_engine.collective.base import _FACTORIES
from checkpoint_engine.collective.torch_group import TorchGroup, open_gloo, open_nccl
from checkpoint_engine.device import CpuDevice
from checkpoint_engine.errors import SettingError, UpdateError
from checkpoint_engine.server.parameter_server import ParameterServer
from checkpoint_engine.transfer.automatic import Automatic
from checkpoint_engine.transfer.broadcast import Broadcast
from checkpoint_engine.transfer.direct import Direct
from checkpoint_engine.transfer.methods import Method
from checkpoint_engine.transfer.order import UpdateOrder
from checkpoint_engine.transfer.p2p import P2P
from checkpoint_engine.transfer.transport import Transport
from checkpoint_engine.transfer.transports import TRANSPORTS, choose_transport
from tests.core.cluster import TIMEOUT, Cluster, check


def order(**options: Any) -> UpdateOrder:
    catalog = Catalog("a", (Holding(0, "host", "cpu:0", ()),))
    known = {"replicas": (catalog,), "digest": "", "remote": False, "ranks": 2, "receivers": (0, 1), "version": "v"}
    return UpdateOrder(
        **{**known, "name": "a", "ask_engine": lambda _: None, "timeout": timedelta(seconds=1), **options}
    )


@pytest.mark.pure
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, Broadcast),
        ({"method": Method.DIRECT}, Direct),
        ({"method": Method.DIRECT, "workers": 4}, Direct),
        ({"method": Method.AUTO}, Automatic),
        ({"receivers": (1,)}, P2P),
        ({"receivers": (1,), "method": Method.AUTO}, P2P),
        ({"receivers": (1,), "method": Method.P2P}, P2P),
        ({"remote": True, "method": Method.AUTO}, P2P),
        ({"remote": True, "keep": True}, P2P),
    ],
)
def test_a_method_has_one_transport_and_p2p_reads_what_others_hold(
    options: dict[str, Any], expected: type[Transport]
) -> None:
    assert choose_transport(order(**options)) is expected


@pytest.mark.pure
def test_every_method_has_a_transport() -> None:
    assert TRANSPORTS.keys() == set(Method)


@pytest.mark.pure
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": Method.DIRECT, "receivers": (0,)}, "a direct update goes to all ranks"),
        ({"method": Method.DIRECT, "remote": True}, "a direct update goes to all ranks"),
        ({"method": Method.P2P}, "nobody reads from others"),
        ({"keep": True}, "these ranks hold it already"),
        ({"keep": True, "receivers": (0,)}, "these ranks hold it already"),
        ({"workers": 2}, "only in a direct update"),
        ({"workers": 2, "method": Method.AUTO}, "only in a direct update"),
        ({"workers": 2, "remote": True}, "only in a direct update"),
        ({"reload": "magic"}, "reload='magic': there are auto, plan, loader, and verify"),
        ({"workers": 0, "method": Method.DIRECT}, "at least one"),
        ({"receivers": (1, 2)}, "ranks 0 to 1"),
        ({"receivers": ()}, "ranks 0 to 1"),
    ],
)
def test_what_no_transport_can_do_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        choose_transport(order(**options))


def test_an_unknown_method_is_refused_by_name(pair: Cluster) -> None:
    pair.register("a", {"x": torch.ones(3)})
    with pytest.raises(SettingError, match="no method 'pigeon'; choose broadcast, direct, auto, p2p"):
        pair.servers[0].update("a", lambda _: None, method="pigeon")


@pytest.mark.long
def test_ranks_that_are_told_different_methods_say_so(pair: Cluster) -> None:
    pair.register("a", {"x": torch.ones(3), "y": torch.ones(3)})
    methods = ["direct", "broadcast"]
    errors = pair.on_all(
        lambda server: server.update(
            "a", pair.asker(server.rank), timeout=timedelta(seconds=TIMEOUT), method=methods[server.rank]
        )
    )
    for error in errors:
        assert isinstance(error, UpdateError)
        assert "rank 1 exports nothing, since it was asked for another method" in str(error)
    check(pair.update("a"))


def test_a_collective_backend_can_be_chosen(
    clusters: Callable[[int], Cluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[int] = []

    def open_mine(store: Any, rank: int, world_size: int, timeout: timedelta, device: torch.device) -> TorchGroup:
        opened.append(rank)
        return open_gloo(store, rank, world_size, timeout, device)

    monkeypatch.setitem(_FACTORIES, "mine", open_mine)
    register_communicator("mine", open_mine)
    monkeypatch.setenv("CHECKPOINT_ENGINE_COLLECTIVE", "mine")
    cluster = clusters(2)
    cluster.register("a", {"x": torch.arange(5.0), "y": torch.arange(7.0)})
    check(cluster.update("a"))
    assert sorted(opened) == [0, 1]
    assert all(recorder.loaded["y"].tolist() == list(range(7)) for recorder in cluster.recorders)


def test_a_collective_library_finds_the_ranks_device_current(
    clusters: Callable[[int], Cluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = threading.local()
    found: list[bool] = []

    @contextmanager
    def active(_: CpuDevice) -> Generator[None]:
        here.current = True
        yield
        here.current = False

    def open_mine(*known: Any) -> TorchGroup:
        found.append(getattr(here, "current", False))
        return open_gloo(*known)

    monkeypatch.setattr(CpuDevice, "active", active)
    monkeypatch.setitem(_FACTORIES, "gloo", open_mine)
    cluster = clusters(2)
    cluster.register("a", {"x": torch.arange(5.0)})
    check(cluster.update("a"))
    assert found == [True, True]


def test_an_unknown_collective_backend_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHECKPOINT_ENGINE_COLLECTIVE", "carrier")
    with pytest.raises(SettingError, match="CHECKPOINT_ENGINE_COLLECTIVE is 'carrier'; there are auto, gloo, nccl"):
        ParameterServer(rank=0, world_size=1, device="cpu")


def test_nccl_is_refused_for_what_is_no_gpu() -> None:
    unused: Any = None
    with pytest.raises(SettingError, match="set CHECKPOINT_ENGINE_COLLECTIVE to gloo"):
        open_nccl(unused, 0, 2, timedelta(seconds=1), torch.device("cpu"))
