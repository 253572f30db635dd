"""What a rank or an engine's worker is doing."""

from __future__ import annotations

from enum import Enum

__all__ = ["Phase"]


class Phase(str, Enum):
    """In the order of an update; the words are those of reports, of the terminal and of every wire."""

    IDLE = "idle"
    START = "start"
    """The command line brings its ranks up."""
    ENGINE = "engine"
    """An engine that is still starting is waited for."""
    READ = "read"
    """A rank reads its files."""
    GATHER = "gather"
    """Ranks tell each other what they hold, or something else that all of them bring."""
    INTRODUCE = "introduce"
    CONNECT = "connect"
    PREPARE = "prepare"
    """Workers find out whether they could begin, before they connect to anybody."""
    WAIT = "wait for requests"
    """Requests still hold an engine's cache: nothing has begun, it is asked again."""
    BEGIN = "begin"
    LOAD = "load"
    FINISH = "finish"
    UPDATE = "update"
    """Any of a worker's phases, where it does not say which; what another version says and this one does not know."""

    def __str__(self) -> str:
        """The word itself: enums of strings differ in this from one Python to the next."""
        return self.value

    @classmethod
    def _missing_(cls, value: object) -> Phase | None:
        return cls.UPDATE if isinstance(value, str) else None
