"""The parameter server, and what its ranks know of each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from checkpoint_engine.server.parameter_server import ParameterServer

__all__ = ["ParameterServer"]


def __getattr__(name: str) -> object:
    """The command line reads metas without torch, which takes seconds to import; the server cannot."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from checkpoint_engine.server import parameter_server  # noqa: PLC0415

    return parameter_server.ParameterServer
