"""Opens a P2P store: which transport, which network cards, and what stands in the way, by name."""

from __future__ import annotations

import logging
import os
import resource
import threading
from collections.abc import Sequence
from pathlib import Path

import msgspec

from checkpoint_engine.errors import HostMemoryError, SettingError
from checkpoint_engine.host.network_cards import (
    DEVICES_VARIABLE,
    NCCL_VARIABLE,
    Card,
    cards_for_gpu,
    find_cards,
    find_gpus,
    gpu_of_host,
    select_cards,
)
from checkpoint_engine.host.pci import gpu_addresses, pair_cards, path_of, path_of_card
from checkpoint_engine.p2p.mooncake import CHECKS_ADDRESSES, MooncakeEngine, Transport, installed_version
from checkpoint_engine.p2p.store import P2PStore
from checkpoint_engine.settings import P2PSettings

__all__ = [
    "TransportChoice",
    "advice_on_old_version",
    "can_reach_gpus",
    "choose_transport",
    "open_p2p_engine",
    "open_p2p_store",
    "transport_of_this_process",
]

_LEAST_MEMLOCK = 1 << 30
_PEER_MEMORY = ("nvidia_peermem", "nv_peer_mem")
_MODULES = Path("/sys/module")

logger = logging.getLogger(__name__)

_opening = threading.Lock()
_engines: dict[tuple[str, Transport, tuple[str, ...]], MooncakeEngine] = {}
"""Engines live as long as the process: starting and ending one takes seconds, and reads may be under way."""


class TransportChoice(msgspec.Struct, frozen=True):
    """How this process will read and be read, and why so."""

    transport: Transport
    cards: tuple[Card, ...]
    reason: str


def choose_transport(wanted: str, cards: Sequence[Card], memlock: int) -> TransportChoice:
    """EFA or RDMA where there are cards, else TCP.

    Args:
        wanted: `auto` or a transport.
        cards: What this process may use.
        memlock: The limit on memory that can be registered, in bytes, or `RLIM_INFINITY`.

    Raises:
        SettingError: the transport that is wanted has no cards here.
        HostMemoryError: the memlock limit is too low for RDMA.
    """
    efa = tuple(card for card in cards if card.efa)
    rdma = tuple(card for card in cards if not card.efa)
    if wanted == "tcp":
        return TransportChoice("tcp", (), "asked for")
    if wanted == "efa" or (wanted == "auto" and efa):
        way = TransportChoice("efa", efa, "asked for" if wanted == "efa" else "there are EFA devices")
    elif wanted == "rdma" or rdma:
        way = TransportChoice("rdma", rdma, "asked for" if wanted == "rdma" else "there are RDMA devices")
    else:
        return TransportChoice("tcp", (), "no RDMA device may be used")
    if not way.cards:
        raise SettingError(
            f"{way.transport} is asked for, but this host shows no such device in /sys/class/infiniband that is up and "
            f"allowed by {DEVICES_VARIABLE} and {NCCL_VARIABLE}; CHECKPOINT_ENGINE_P2P_TRANSPORT=tcp works without"
        )
    if memlock != resource.RLIM_INFINITY and memlock < _LEAST_MEMLOCK:
        raise HostMemoryError(
            f"the memlock limit of {memlock} bytes is too low to register checkpoints for {way.transport}: ulimit -l "
            "unlimited (in containers --ulimit memlock=-1), or CHECKPOINT_ENGINE_P2P_TRANSPORT=tcp"
        )
    return way


def transport_of_this_process(settings: P2PSettings, local_gpu: int, gpus_seen: int) -> TransportChoice:
    """What `open_p2p_store` will use.

    Raises:
        SettingError: a variable names what is not there.
        HostMemoryError: the memlock limit is too low for RDMA.
    """
    allowed = select_cards(find_cards(), os.environ.get(DEVICES_VARIABLE), os.environ.get(NCCL_VARIABLE))
    gpu, gpus = gpu_of_host(local_gpu, os.environ.get("CUDA_VISIBLE_DEVICES"), find_gpus(), gpus_seen)
    memlock = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return choose_transport(settings.transport, _cards_of(allowed, gpu, gpus), memlock)


def _cards_of(allowed: Sequence[Card], gpu: int, gpus: int) -> list[Card]:
    """In the order in which somebody has named them, else what is near on the bus."""
    named = os.environ.get(DEVICES_VARIABLE) or os.environ.get(NCCL_VARIABLE, "^")
    addresses = gpu_addresses()
    if not named.startswith("^") or len(addresses) != gpus:
        return cards_for_gpu(allowed, gpu, gpus)
    paths = {card: path_of_card(card) for card in allowed}
    return pair_cards(allowed, paths, [path_of(address) for address in addresses], gpu)


def open_p2p_store(settings: P2PSettings, host: str, local_gpu: int, gpus_seen: int) -> P2PStore:
    """Starts to listen and to read; see `open_p2p_engine`."""
    engine, devices = open_p2p_engine(settings, host, local_gpu, gpus_seen)
    return P2PStore(engine, devices, settings.patience)


def open_p2p_engine(
    settings: P2PSettings, host: str, local_gpu: int, gpus_seen: int
) -> tuple[MooncakeEngine, tuple[str, ...]]:
    """The engine of this process, and the RDMA devices that it uses.

    Args:
        settings: From the environment.
        host: An address of this host, unless the settings hold one.
        local_gpu: Place of this process's GPU among those that it sees.
        gpus_seen: How many it sees.

    Raises:
        MissingDependencyError: Mooncake is not installed.
        SettingError: the transport cannot be used here.
        HostMemoryError: the memlock limit is too low for RDMA.
    """
    way = transport_of_this_process(settings, local_gpu, gpus_seen)
    ports = {card.port for card in way.cards}
    if ports and ports != {1}:
        os.environ.setdefault("MC_IB_PORT", str(min(ports)))
    devices = tuple(card.device for card in way.cards)
    key = settings.host or host, way.transport, devices
    with _opening:
        if key not in _engines:
            engine = MooncakeEngine(*key, settings.patience)
            logger.info("P2P over %s (%s) at %s %s", way.transport, way.reason, engine.address, ", ".join(devices))
            version = installed_version()
            if way.transport == "tcp" and version and version < CHECKS_ADDRESSES:
                logger.warning("%s", advice_on_old_version(version))
            _engines[key] = engine
        return _engines[key], devices


def advice_on_old_version(version: tuple[int, ...]) -> str:
    """What is wrong with TCP in old versions of Mooncake."""
    return (
        f"Mooncake {'.'.join(map(str, version))} lets whoever reaches its port read and write any memory of this "
        f"process over TCP; from {'.'.join(map(str, CHECKS_ADDRESSES))} on it does not: upgrade it"
    )


def can_reach_gpus() -> bool:
    """Whether the kernel lets RDMA devices write into GPU memory."""
    return any((_MODULES / name).exists() for name in _PEER_MEMORY)
