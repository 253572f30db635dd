"""What is left of a link after an update: a connection whose end tells the worker to unmap the staging memory.

The kernel ends it too when the other process dies, so neither side needs to hear of that in any other way.
"""

from __future__ import annotations

import contextlib
import select
import socket

from checkpoint_engine.deadline import Deadline


class Lease:
    """One end. `end` may be called by any thread; all other calls from one only."""

    def __init__(self, connection: socket.socket) -> None:
        """Takes the connection over."""
        self._socket = connection

    def wait(self) -> None:
        """Blocks until the other side has ended it, has died, or this side has called `say_end`."""
        self._poll(None)

    def say_end(self) -> None:
        """Ends it; works also if a child of this process has inherited the connection."""
        with contextlib.suppress(OSError):  # the other side was first
            self._socket.shutdown(socket.SHUT_WR)

    def end(self, deadline: Deadline | None = None) -> bool:
        """Ends it, waits for the other side to do so too if a deadline is given, and returns whether it has."""
        self.say_end()
        ended = deadline is None or self._poll(deadline)
        self.close()
        return ended

    def close(self) -> None:
        """Ends it without a wait."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _poll(self, deadline: Deadline | None) -> bool:
        poller = select.poll()
        poller.register(self._socket, select.POLLIN | select.POLLHUP)
        return bool(poller.poll(None if deadline is None else deadline.milliseconds()))
