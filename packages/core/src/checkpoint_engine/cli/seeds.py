"""The seeds of a join: who holds the checkpoint now. Seeds may go, move on and come back while somebody joins."""

from __future__ import annotations

import time
from collections.abc import Sequence

from checkpoint_engine.catalog import Catalog
from checkpoint_engine.cli.common import notes
from checkpoint_engine.contract.failure import Failure
from checkpoint_engine.contract.phase import Phase
from checkpoint_engine.deadline import Deadline
from checkpoint_engine.errors import (
    CheckpointEngineError,
    CheckpointFormatError,
    CheckpointStateError,
    DeadlineError,
    PeerError,
    PeerMovedError,
    UpdateError,
)
from checkpoint_engine.planning.peers import check_same
from checkpoint_engine.server.metas import read_metas

__all__ = ["Seeds"]

_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 15.0
_PASSES = (PeerError, CheckpointStateError, CheckpointFormatError, DeadlineError)
"""What reading metas may end with while seeds restart or move on, one after the other."""


class Seeds:
    """Reads metas, and reads them again after a try that the seeds made fail."""

    def __init__(self, sources: Sequence[str], token: str | None, wait: float) -> None:
        """Reads them for the first time; what is wrong now is told at once.

        Raises:
            CheckpointEngineError: a source cannot be read, or they are not of the same checkpoint.
        """
        self._sources = sources
        self._token = token
        self._wait = wait
        self._pause = _FIRST_PAUSE
        self._deadline: Deadline | None = None
        self.catalogs = [read_metas(source, token=token, timeout=wait) for source in sources]
        check_same(self.catalogs)

    def wait_after(self, error: UpdateError) -> None:
        """Returns when another try makes sense, with new `catalogs`.

        Raises:
            UpdateError: it does not: other than the seeds failed, or they have not come back in time.
        """
        if error.kind not in (PeerError.__name__, PeerMovedError.__name__):
            raise error
        self._deadline = self._deadline or Deadline(self._wait)
        notes.print(f"the seeds failed: {error}", style="yellow", soft_wrap=True, markup=False)
        seen = "their metas are as they were"
        while self._deadline.remaining > self._pause:
            notes.print(
                f"trying again in {self._pause:g} s (--wait: {self._deadline.remaining:.0f} s left)", style="dim"
            )
            time.sleep(self._pause)
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            try:
                found = self._read_again(self._deadline)
            except _PASSES as gone:
                seen = str(gone)
                continue
            # Who has moved on does not move back; who did not answer may answer now.
            if found != self.catalogs or error.kind != PeerMovedError.__name__:
                self.catalogs = found
                return
        raise Failure.of(error, Phase.UPDATE, error.rank).as_error(
            f"{error}; no other seed came, and none came back, within {self._wait:g} s (--wait): {seen}"
        ) from error

    def _read_again(self, deadline: Deadline) -> list[Catalog]:
        """From the sources that answer; the others are not needed, if only one does."""
        answers = [self._ask(source, deadline) for source in self._sources]
        found = [answer for answer in answers if isinstance(answer, Catalog)]
        if not found and isinstance(answers[-1], CheckpointEngineError):
            raise answers[-1]
        check_same(found)
        return found

    def _ask(self, source: str, deadline: Deadline) -> Catalog | CheckpointEngineError:
        try:
            return read_metas(source, token=self._token, timeout=deadline.remaining)
        except _PASSES as error:
            return error
