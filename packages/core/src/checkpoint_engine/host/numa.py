"""Where a rank's host memory lies on hosts with several memory nodes: near its GPU, or spread evenly without one.

The kernel takes a page from the node of whoever first touches it. So it is enough that the threads that fill host
memory run on the processors of the right node; memory policies, which containers often forbid, are not needed.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Protocol

__all__ = ["OnBus", "memory_nodes", "node_of", "on_node_of", "parse_list", "taking_turns"]

logger = logging.getLogger(__name__)

_SYS = Path("/sys")


class OnBus(Protocol):
    """A device that may sit on the PCI bus."""

    def pci_address(self) -> str | None:
        """Where it sits, such as `0000:1b:00.0`; None if it is no PCI device."""
        ...


@contextlib.contextmanager
def on_node_of(device: OnBus, sys: Path | None = None) -> Generator[None]:
    """Within it, this thread and those that it starts run on the processors of the device's node.

    Does nothing where there is one node, or nobody knows the device's, or this process may not use its processors.
    """
    allowed = frozenset(os.sched_getaffinity(0))
    wanted = _processors_of(device, sys or _SYS) & allowed
    if not wanted or wanted == allowed:
        yield
        return
    _set_affinity(wanted)
    try:
        yield
    finally:
        _set_affinity(allowed)


def taking_turns(sys: Path | None = None) -> Callable[[], None]:
    """What each thread of a pool calls first: it then runs on the next of the nodes that this thread may use.

    What the pool fills is then spread evenly over the nodes, piece by piece. Every GPU reads out of all of a direct
    update's memory, so that no node is near all readers. Does nothing where there is one node, and within `on_node_of`.
    """
    allowed = os.sched_getaffinity(0)
    nodes = [mine for processors in memory_nodes(sys or _SYS).values() if (mine := processors & allowed)]
    turns = itertools.cycle(nodes)

    def take_turn() -> None:
        if len(nodes) > 1:
            _set_affinity(next(turns))

    return take_turn


def memory_nodes(sys: Path = _SYS) -> dict[int, frozenset[int]]:
    """Nodes that have memory, and their processors."""
    nodes = sys / "devices/system/node"
    with_memory = parse_list(_read(nodes / "has_memory"))
    return {node: parse_list(_read(nodes / f"node{node}/cpulist")) for node in sorted(with_memory)}


def node_of(pci_address: str, sys: Path = _SYS) -> int | None:
    """The node next to a PCI device, such as `0000:1b:00.0`; None if the host does not say."""
    text = _read(sys / "bus/pci/devices" / pci_address.lower() / "numa_node")
    try:
        node = int(text)
    except ValueError:
        return None
    return node if node >= 0 else None


def parse_list(text: str) -> frozenset[int]:
    """Numbers as the kernel writes them, such as `0-3,8,10-11`; empty for anything else."""
    numbers: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        try:
            numbers.update(range(int(first), int(last or first) + 1))
        except ValueError:
            return frozenset()
    return frozenset(numbers)


def _processors_of(device: OnBus, sys: Path) -> frozenset[int]:
    nodes = memory_nodes(sys)
    address = device.pci_address() if len(nodes) > 1 else None
    node = node_of(address, sys) if address is not None else None
    return nodes.get(node, frozenset()) if node is not None else frozenset()


def _set_affinity(processors: frozenset[int]) -> None:
    try:
        os.sched_setaffinity(0, processors)
    except OSError as error:  # the processors were taken from us meanwhile; slower, not wrong
        logger.warning("cannot run on the processors of a memory node: %s", error.strerror)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
