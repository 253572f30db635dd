"""Where devices sit on this host's PCI buses, and how far they are from each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from checkpoint_engine.host.network_cards import Card, cards_for_gpu

__all__ = ["PciPath", "distance", "gpu_addresses", "pair_cards", "path_of", "path_of_card"]

_SYS = Path("/sys")
_DRIVER = Path("/proc/driver/nvidia/gpus")
_FRONT_END = 0.5
"""A card with less than this share of the fastest one's rate connects the host, not its GPUs."""

PciPath = tuple[str, ...]
"""Memory node, root complex, and every bridge and switch from there to the device; empty if the host does not say."""


def path_of(address: str, sys: Path = _SYS) -> PciPath:
    """Of a PCI device, such as `0000:1b:00.0`."""
    return _path_at(sys / "bus/pci/devices" / address.lower())


def path_of_card(card: Card, sys: Path = _SYS) -> PciPath:
    """Of an RDMA device."""
    return _path_at(sys / "class/infiniband" / card.device / "device")


def gpu_addresses(driver: Path = _DRIVER) -> list[str]:
    """Of all GPUs of this host, in the order of the bus, as `find_gpus` has them."""
    return sorted(entry.name for entry in driver.iterdir()) if driver.is_dir() else []


def distance(one: PciPath, other: PciPath) -> int:
    """Bridges and switches to pass from one to the other, and the way between memory nodes."""
    common = 0
    while common < min(len(one), len(other)) and one[common] == other[common]:
        common += 1
    return len(one) + len(other) - 2 * common


def pair_cards(cards: Sequence[Card], paths: Mapping[Card, PciPath], gpus: Sequence[PciPath], gpu: int) -> list[Card]:
    """The cards of GPU number `gpu`: the nearest of those that are not much slower than the fastest.

    GPUs that have the same ones near share them in order. Where nobody knows what is near, all cards are dealt out.
    """
    fastest = max((card.rate for card in cards), default=0.0)
    fast = [card for card in cards if card.rate >= _FRONT_END * fastest]
    if not all(gpus) or not all(paths.get(card) for card in fast) or not 0 <= gpu < len(gpus):
        return cards_for_gpu(fast, gpu, max(len(gpus), gpu + 1))
    near = [_nearest(fast, paths, path) for path in gpus]
    sharing = [number for number, found in enumerate(near) if found == near[gpu]]
    return cards_for_gpu(near[gpu], sharing.index(gpu), len(sharing))


def _nearest(cards: Sequence[Card], paths: Mapping[Card, PciPath], gpu: PciPath) -> list[Card]:
    away = [distance(paths[card], gpu) for card in cards]
    return [card for card, far in zip(cards, away, strict=True) if far == min(away)]


def _path_at(link: Path) -> PciPath:
    try:
        place = link.resolve(strict=True)
        node = (place / "numa_node").read_text().strip()
    except OSError:
        return ()
    parts = place.parts
    roots = [number for number, part in enumerate(parts) if part.startswith("pci")]
    return (f"node {node}", *parts[roots[-1] :]) if roots else ()
