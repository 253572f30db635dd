"""Which processors are near a GPU, read from a made-up /sys; and that threads really go there and come back."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoint_engine.device import CpuDevice
from checkpoint_engine.host import numa
from checkpoint_engine.host.numa import memory_nodes, node_of, on_node_of, parse_list, taking_turns
from checkpoint_engine.source import copying, filling
from checkpoint_engine.source.segment import Segment
from checkpoint_engine.source.store import CheckpointStore

pytestmark = pytest.mark.pure

ADDRESS = "0000:1b:00.0"


class PciDevice(CpuDevice):
    """The CPU, which claims to sit on a bus."""

    def __init__(self, address: str | None) -> None:
        super().__init__(rank=0)
        self._address = address

    def pci_address(self) -> str | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._address


def make_sys(root: Path, nodes: Mapping[int, str], device_node: str | None, has_memory: str | None = None) -> Path:
    """A tree like the kernel's: `nodes` maps a node to its processors."""
    directory = root / "devices/system/node"
    directory.mkdir(parents=True)
    (directory / "has_memory").write_text((has_memory or ",".join(map(str, nodes))) + "\n")
    for node, processors in nodes.items():
        (directory / f"node{node}").mkdir()
        (directory / f"node{node}/cpulist").write_text(processors + "\n")
    if device_node is not None:
        device = root / "bus/pci/devices" / ADDRESS
        device.mkdir(parents=True)
        (device / "numa_node").write_text(device_node + "\n")
    return root


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("0-3,8,10-11\n", {0, 1, 2, 3, 8, 10, 11}),
        ("5", {5}),
        ("", set()),
        ("\n", set()),
        ("(null)", set()),
        ("3-", {3}),
        ("x-3", set()),
    ],
)
def test_lists_of_the_kernel(text: str, numbers: set[int]) -> None:
    assert parse_list(text) == numbers


@given(st.sets(st.integers(0, 2000)))
def test_lists_of_single_numbers_are_read_back(numbers: set[int]) -> None:
    assert parse_list(",".join(map(str, sorted(numbers)))) == numbers


def test_nodes_without_memory_do_not_count(tmp_path: Path) -> None:
    sys = make_sys(tmp_path, {0: "0-1,4-5", 1: "2-3,6-7", 2: ""}, "1", has_memory="0-1")
    assert memory_nodes(sys) == {0: {0, 1, 4, 5}, 1: {2, 3, 6, 7}}
    assert node_of(ADDRESS.upper(), sys) == 1


@pytest.mark.parametrize("device_node", ["-1", "", "rubbish", None])
def test_a_device_whose_node_nobody_knows(tmp_path: Path, device_node: str | None) -> None:
    assert node_of(ADDRESS, make_sys(tmp_path, {0: "0", 1: "1"}, device_node)) is None


def test_this_host_is_read_without_error() -> None:
    nodes = memory_nodes()
    assert all(isinstance(node, int) for node in nodes)
    assert node_of(ADDRESS) is None or isinstance(node_of(ADDRESS), int)


@pytest.fixture
def two() -> tuple[int, int]:
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        pytest.skip("this process may use one processor only")
    return allowed[0], allowed[1]


def affinity_of_a_thread() -> set[int]:
    found: list[set[int]] = []
    thread = threading.Thread(target=lambda: found.append(os.sched_getaffinity(0)))
    thread.start()
    thread.join()
    return found[0]


def test_threads_run_near_the_device_and_come_back(tmp_path: Path, two: tuple[int, int]) -> None:
    before = os.sched_getaffinity(0)
    sys = make_sys(tmp_path, {0: str(two[0]), 1: f"{two[1]},100000"}, "1")
    with on_node_of(PciDevice(ADDRESS), sys):
        assert os.sched_getaffinity(0) == {two[1]}
        assert affinity_of_a_thread() == {two[1]}
    assert os.sched_getaffinity(0) == before
    with pytest.raises(ValueError, match="told to"), on_node_of(PciDevice(ADDRESS), sys):
        raise ValueError("told to")
    assert os.sched_getaffinity(0) == before


@pytest.mark.parametrize("why", ["one node", "unknown node", "no such node", "no PCI device", "no processor of ours"])
def test_it_does_nothing_where_it_cannot_help(tmp_path: Path, two: tuple[int, int], why: str) -> None:
    before = os.sched_getaffinity(0)
    nodes = {0: str(two[0]), 1: str(two[1])}
    device_node = "1"
    if why == "one node":
        del nodes[0]
    elif why == "unknown node":
        device_node = "-1"
    elif why == "no such node":
        device_node = "7"
    elif why == "no processor of ours":
        nodes[1] = "100000-100003"
    sys = make_sys(tmp_path, nodes, device_node)
    with on_node_of(PciDevice(None if why == "no PCI device" else ADDRESS), sys):
        assert os.sched_getaffinity(0) == before


class Touches:
    """Notes on which processors segments are touched."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[frozenset[int]] = []
        for module in (copying, filling):
            monkeypatch.setattr(module, "_CHUNK", 4096)
        touch = Segment.touch

        def spy(segment: Segment, start: int, end: int) -> None:
            self.seen.append(frozenset(os.sched_getaffinity(0)))
            time.sleep(0.01)  # so that every thread gets a piece
            touch(segment, start, end)

        monkeypatch.setattr(Segment, "touch", spy)

    def of(self, device: CpuDevice) -> list[frozenset[int]]:
        store = CheckpointStore(device)
        store.register("a", named_tensors={"x": torch.ones(40 * 4096, dtype=torch.uint8)})
        store.close()
        return self.seen


def test_segments_are_filled_near_the_device(
    tmp_path: Path, two: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numa, "_SYS", make_sys(tmp_path, {0: str(two[0]), 1: str(two[1])}, "1"))
    assert set(Touches(monkeypatch).of(PciDevice(ADDRESS))) == {frozenset({two[1]})}


def test_segments_of_a_rank_without_a_gpu_are_spread_over_the_nodes(
    tmp_path: Path, two: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.sched_getaffinity(0)
    nodes = {0: str(two[0]), 1: f"{two[1]},100000", 2: "100001"}
    monkeypatch.setattr(numa, "_SYS", make_sys(tmp_path, nodes, None))
    seen = Touches(monkeypatch).of(CpuDevice(0))
    assert set(seen) == {frozenset({two[0]}), frozenset({two[1]})}
    assert min(seen.count(node) for node in set(seen)) >= len(seen) / 4
    assert os.sched_getaffinity(0) == before


def test_with_one_node_threads_stay_where_they_are(tmp_path: Path, two: tuple[int, int]) -> None:
    before = os.sched_getaffinity(0)
    for nodes in ({0: str(two[0])}, {0: str(two[0]), 1: "100000"}, {}):
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        take_turn = taking_turns(make_sys(root, nodes, None))
        take_turn()
        assert os.sched_getaffinity(0) == before
