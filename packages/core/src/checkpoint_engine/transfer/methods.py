"""How an update's bytes can travel, by the names that people use for it."""

from __future__ import annotations

from enum import Enum

from checkpoint_engine.errors import SettingError

__all__ = ["Method"]


class Method(str, Enum):
    """One name for each transport; `transports` says which class that is."""

    BROADCAST = "broadcast"
    """From the ranks to all engines' workers at once."""
    DIRECT = "direct"
    """Each worker copies its own slices out of the ranks' memory."""
    AUTO = "auto"
    """Direct where that is possible, else by broadcast."""
    P2P = "p2p"
    """Out of the memory of parameter servers that hold the checkpoint, which are not disturbed."""

    def __str__(self) -> str:
        """The word itself."""
        return self.value

    @classmethod
    def of(cls, name: str) -> Method:
        """By its name.

        Raises:
            SettingError: there is none of that name.
        """
        try:
            return cls(name)
        except ValueError:
            raise SettingError(f"there is no method {name!r}; choose {', '.join(cls)}") from None
