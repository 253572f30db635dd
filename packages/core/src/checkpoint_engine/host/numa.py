"""Keeps a rank's threads near its GPU on hosts with several memory nodes.

The kernel takes a page from the node of whoever first touches it. So it is enough that the threads that fill host
memory run on the processors of the GPU's node; memory policies, which containers often forbid, are not needed.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Generator
from pathlib import Path

from checkpoint_engine.device.base import Device

logger = logging.getLogger(__name__)

_SYS = Path("/sys")


@contextlib.contextmanager
def near(device: Device, sys: Path | None = None) -> Generator[None]:
    """Within it, this thread and those that it starts run on the processors of the device's node.

    Does nothing where there is one node, or nobody knows the device's, or this process may not use its processors.
    """
    allowed = frozenset(os.sched_getaffinity(0))
    wanted = _processors_near(device, sys or _SYS) & allowed
    if not wanted or wanted == allowed:
        yield
        return
    _set_affinity(wanted)
    try:
        yield
    finally:
        _set_affinity(allowed)


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


def _processors_near(device: Device, sys: Path) -> frozenset[int]:
    nodes = memory_nodes(sys)
    address = device.pci_address() if len(nodes) > 1 else None
    node = node_of(address, sys) if address is not None else None
    return nodes.get(node, frozenset()) if node is not None else frozenset()


def _set_affinity(processors: frozenset[int]) -> None:
    try:
        os.sched_setaffinity(0, processors)
    except OSError as error:  # the processors were taken from us meanwhile; slower, not wrong
        logger.warning("cannot run near the GPU: %s", error.strerror)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
