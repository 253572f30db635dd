"""What `doctor` looks at for transfers between hosts: the preflight of P2P, by named causes."""

from __future__ import annotations

import socket
from collections.abc import Iterator

from checkpoint_engine.cli.finding import Finding

__all__ = ["check_p2p"]

_ADVICE_GPU = "modprobe nvidia_peermem; until then bytes land in host memory first, as this version does anyway"


def check_p2p() -> Iterator[Finding]:
    """Whether Mooncake is there, which way it would go, and what stands in that way."""
    from checkpoint_engine.errors import CheckpointEngineError  # noqa: PLC0415 - what is imported late is slow
    from checkpoint_engine.p2p.mooncake import CHECKS_ADDRESSES, import_engine, installed_version  # noqa: PLC0415
    from checkpoint_engine.p2p.open import (  # noqa: PLC0415
        advice_on_old_version,
        can_reach_gpus,
        transport_of_this_process,
    )
    from checkpoint_engine.settings import P2PSettings  # noqa: PLC0415

    try:
        import_engine()
    except CheckpointEngineError as error:
        yield Finding("P2P", "mooncake", "note", "cannot be used: no P2P updates", str(error))
        return
    version = installed_version()
    said = ".".join(map(str, version)) if version else "of unknown version"
    if version and version < CHECKS_ADDRESSES:
        yield Finding("P2P", "mooncake", "note", said, advice_on_old_version(version))
    else:
        yield Finding("P2P", "mooncake", "ok", said)
    try:
        settings = P2PSettings.from_environment()
        way = transport_of_this_process(settings, 0, _gpus_seen())
    except CheckpointEngineError as error:
        yield Finding("P2P", "transport", "problem", "none can be used", str(error))
        return
    cards = ", ".join(card.device for card in way.cards)
    yield Finding("P2P", "transport", "ok", f"{way.transport}: {way.reason}{f' ({cards})' if cards else ''}")
    if way.transport == "rdma" and _gpus_seen() and not can_reach_gpus():
        yield Finding("P2P", "GPU memory", "note", "RDMA devices cannot write into it", _ADVICE_GPU)
    yield _check_address(settings.host)
    shared = "shares what it gathers with whoever reaches it" if settings.share else "shares nothing unless asked to"
    yield Finding("P2P", "sharing", "ok", shared)


def _check_address(host: str | None) -> Finding:
    from checkpoint_engine.device_utils import get_ip  # noqa: PLC0415

    address = host or get_ip()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.bind((address, 0))
    except OSError as error:
        advice = "set CHECKPOINT_ENGINE_P2P_HOST to an address of this host under which others reach it"
        return Finding("P2P", "address", "problem", f"{address}: {error.strerror}", advice)
    if address.startswith("127.") or address == "::1":
        advice = "other hosts cannot reach it; set CHECKPOINT_ENGINE_P2P_HOST if there are any"
        return Finding("P2P", "address", "note", address, advice)
    return Finding("P2P", "address", "ok", address)


def _gpus_seen() -> int:
    from checkpoint_engine.device import accelerator_count  # noqa: PLC0415 - imports torch: seconds

    return accelerator_count()
