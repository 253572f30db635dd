"""Everything that `doctor` looks at. No check raises: a broken place is what it is there for."""

from __future__ import annotations

from checkpoint_engine.cli.checks_machine import check_devices, check_host, check_network
from checkpoint_engine.cli.checks_p2p import check_p2p
from checkpoint_engine.cli.checks_software import check_plugins, check_proofs, check_software
from checkpoint_engine.cli.finding import Finding

__all__ = ["look_everywhere"]

_CHECKS = (check_software, check_proofs, check_devices, check_host, check_network, check_plugins, check_p2p)


def look_everywhere() -> list[Finding]:
    """All findings, in the order in which they are shown."""
    return [finding for check in _CHECKS for finding in check()]
