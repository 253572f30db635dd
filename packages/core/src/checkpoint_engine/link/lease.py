"""What is left of a link after an update: a connection whose end tells the worker to unmap the staging memory.

The kernel ends it too when the other process dies, so neither side needs to hear of that in any other way.
"""

from __future__ import annotations

import contextlib
import select
import socket

from checkpoint_engine.deadline import Deadline

__all__ = ["MappingLease"]


class MappingLease:
    """One end. `end` may be called by any thread; all other calls from one only."""

    def __init__(self, connection: socket.socket) -> None:
        """Takes the connection over."""
        self._socket = connection

    def wait(self) -> None:
        """Blocks until the other side has ended it or died, or this side has called `cancel`."""
        self._poll(None)

    def cancel(self) -> None:
        """Ends it on both sides; whoever waits goes on."""
        self._shut(socket.SHUT_RDWR)

    def end(self, deadline: Deadline) -> bool:
        """Asks the other side to end it, and returns whether it has done so in time."""
        self._shut(socket.SHUT_WR)
        ended = self._poll(deadline)
        self.close()
        return ended

    def close(self) -> None:
        """Ends it and frees the connection."""
        self.cancel()
        self._socket.close()

    def _shut(self, direction: int) -> None:
        # Unlike closing, this also works if a child of this process has inherited the connection.
        with contextlib.suppress(OSError):  # the other side was first
            self._socket.shutdown(direction)

    def _poll(self, deadline: Deadline | None) -> bool:
        poller = select.poll()
        poller.register(self._socket, select.POLLIN | select.POLLHUP)
        return bool(poller.poll(None if deadline is None else deadline.milliseconds()))
