"""RDMA devices of this host, which of them may be used, and which of those serve which GPU."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import msgspec

from checkpoint_engine.errors import SettingError

__all__ = [
    "DEVICES_VARIABLE",
    "NCCL_VARIABLE",
    "Card",
    "cards_for_gpu",
    "find_cards",
    "find_gpus",
    "gpu_of_host",
    "select_cards",
]

DEVICES_VARIABLE = "PS_P2P_STORE_RDMA_DEVICES"
NCCL_VARIABLE = "NCCL_IB_HCA"
_SYSTEM = Path("/sys/class/infiniband")
_DRIVER = Path("/proc/driver/nvidia/gpus")
_AMAZON = "0x1d0f"
_GIGABIT = 1e9 / 8

_log = logging.getLogger(__name__)


class Card(msgspec.Struct, frozen=True):
    """One port of an RDMA device. `rate` is in bytes per second, 0 if the kernel does not say."""

    device: str
    port: int
    active: bool
    rate: float
    efa: bool = False


def find_cards(system: Path = _SYSTEM) -> list[Card]:
    """Every port of every RDMA device, in natural order."""
    cards = [
        Card(device.name, int(port.name), _text(port / "state").endswith("ACTIVE"), _rate(port), _is_efa(device))
        for device in _entries(system)
        for port in _entries(device / "ports")
        if port.name.isdecimal()
    ]
    return sorted(cards, key=lambda card: (_natural(card.device), card.port))


def select_cards(cards: Sequence[Card], devices: str | None = None, nccl_hca: str | None = None) -> list[Card]:
    """Those that the user allows; at most one port of a device.

    Args:
        cards: What there is.
        devices: `PS_P2P_STORE_RDMA_DEVICES`: names, separated by commas, in the order in which GPUs get them.
        nccl_hca: `NCCL_IB_HCA` in NCCL's own syntax: prefixes separated by commas, each with an optional `:port`; a
            leading `=` asks for whole names, `^` for all others, `^=` for both. Ignored if `devices` is given.

    Raises:
        SettingError: a device of `PS_P2P_STORE_RDMA_DEVICES` does not exist, or the syntax is wrong.
    """
    if devices:
        chosen = _by_name(cards, devices)
    elif nccl_hca:
        chosen = _by_nccl(cards, nccl_hca)
    else:
        chosen = [card for card in cards if card.active]
    first: dict[str, Card] = {}
    for card in chosen:
        first.setdefault(card.device, card)
    return list(first.values())


def cards_for_gpu(cards: Sequence[Card], gpu: int, gpus: int) -> list[Card]:
    """The cards of GPU number `gpu` of `gpus`: neighbours share neighbours, and no card is left without a GPU.

    With more cards than GPUs each GPU has several, with fewer several GPUs share one; counts need not divide.

    Raises:
        SettingError: there is no such GPU.
    """
    if not 0 <= gpu < gpus:
        raise SettingError(f"GPU {gpu} is not one of {gpus}")
    if len(cards) <= gpus:
        return list(cards[gpu * len(cards) // gpus :][:1])
    return list(cards[gpu * len(cards) // gpus : (gpu + 1) * len(cards) // gpus])


def gpu_of_host(local: int, visible: str | None, gpus: Sequence[str], seen: int) -> tuple[int, int]:
    """Which GPU of the host a process uses, and how many there are.

    Processes that see different GPUs (`CUDA_VISIBLE_DEVICES`) must not all take the first card.

    Args:
        local: Place among the GPUs that this process sees.
        visible: `CUDA_VISIBLE_DEVICES`: numbers, or UUIDs, which may be cut short.
        gpus: UUIDs of all GPUs of the host in their order; none if unknown.
        seen: GPUs that this process sees.
    """
    seen = max(seen, local + 1)
    names = [part.strip() for part in (visible or "").split(",")]
    name = names[local] if local < len(names) else ""
    if name.isdecimal():
        return int(name), max(len(gpus), int(name) + 1, seen)
    matching = [number for number, uuid in enumerate(gpus) if name and uuid.lower().startswith(name.lower())]
    if len(matching) == 1:
        return matching[0], len(gpus)
    return local, seen


def find_gpus(driver: Path = _DRIVER) -> list[str]:
    """UUIDs of all GPUs of this host in the order of the bus, also of those that this process does not see."""
    uuids = (_line_of(gpu / "information", "GPU UUID") for gpu in sorted(_entries(driver)))
    return [uuid for uuid in uuids if uuid]


def _by_name(cards: Sequence[Card], devices: str) -> list[Card]:
    chosen: list[Card] = []
    for name in filter(None, (part.strip() for part in devices.split(","))):
        ports = [card for card in cards if card.device == name]
        if not ports:
            there = ", ".join(dict.fromkeys(card.device for card in cards)) or "none"
            raise SettingError(f"{DEVICES_VARIABLE} names {name!r}; RDMA devices of this host: {there}")
        chosen.append(next((card for card in ports if card.active), ports[0]))
    return chosen


def _by_nccl(cards: Sequence[Card], text: str) -> list[Card]:
    exclude, rest = text.startswith("^"), text.removeprefix("^")
    exact, rest = rest.startswith("="), rest.removeprefix("=")
    patterns = [_pattern(part.strip(), text) for part in rest.split(",") if part.strip()]
    matched = [card for card in cards if any(_matches(card, name, port, exact) for name, port in patterns)]
    if exclude:
        return [card for card in cards if card.active and card not in matched]
    if not matched and cards:
        there = ", ".join(f"{card.device}:{card.port}" for card in cards)
        _log.warning(
            "%s=%r matches no RDMA device of this host; as in NCCL, all are used: %s", NCCL_VARIABLE, text, there
        )
        return [card for card in cards if card.active]
    # In the user's order, which is how NCCL's users say which GPU has which card.
    order = {card: _first_match(card, patterns, exact) for card in matched}
    return sorted((card for card in matched if card.active or exact), key=lambda card: order[card])


def _first_match(card: Card, patterns: Sequence[tuple[str, int | None]], exact: bool) -> int:  # noqa: FBT001
    return next(i for i, (name, port) in enumerate(patterns) if _matches(card, name, port, exact))


def _matches(card: Card, name: str, port: int | None, exact: bool) -> bool:  # noqa: FBT001
    named = card.device == name if exact else card.device.startswith(name)
    return named and port in (None, card.port)


def _pattern(part: str, whole: str) -> tuple[str, int | None]:
    name, colon, port = part.partition(":")
    if not name or (colon and not port.isdecimal()):
        raise SettingError(f"{NCCL_VARIABLE}={whole!r}: {part!r} must look like mlx5_0 or mlx5_0:1")
    return name, int(port) if colon else None


def _is_efa(device: Path) -> bool:
    return _text(device / "device" / "vendor") == _AMAZON


def _rate(port: Path) -> float:
    number = _text(port / "rate").split(" ", 1)[0]
    try:
        return float(number) * _GIGABIT
    except ValueError:
        return 0.0


def _natural(name: str) -> tuple[str, int]:
    """`mlx5_10` comes after `mlx5_9`."""
    stem = name.rstrip("0123456789")
    return stem, int(name[len(stem) :] or 0)


def _line_of(file: Path, key: str) -> str:
    pairs = (line.partition(":") for line in _text(file).splitlines())
    return next((value.strip() for name, _, value in pairs if name.strip() == key), "")


def _entries(directory: Path) -> list[Path]:
    try:
        return list(directory.iterdir())
    except OSError:
        return []


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
