"""Which tests of P2P can run here."""

from __future__ import annotations

import pytest

from checkpoint_engine.errors import MissingDependencyError
from checkpoint_engine.p2p.mooncake import import_engine


def _missing() -> str:
    try:
        import_engine()
    except MissingDependencyError as error:
        return str(error)
    return ""


needs_mooncake = pytest.mark.skipif(bool(_missing()), reason=_missing())
