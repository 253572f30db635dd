"""A rank of the command line that halts in a phase until a file says that it may go on; see `fault_matrix`."""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path

from checkpoint_engine.cli import rank
from checkpoint_engine.cli.messages import Progressed
from checkpoint_engine.contract.phase import Phase
from checkpoint_engine.transfer.report import Progress

_PHASE = Phase(os.environ["HELD_PHASE"])
_DIRECTORY = Path(os.environ["HELD_DIRECTORY"])
_RANKS = os.environ["HELD_RANKS"].split(",")
_HANGS = "HELD_HANGS" in os.environ
"""Whether nothing else of the process runs meanwhile either, as in a library call that keeps Python's lock."""
_SECONDS = 60.0


def hold(phase: Phase) -> None:
    """Says that this rank has come to the phase, and waits, if it is the one."""
    name = os.environ["RANK"]
    mark = _DIRECTORY / f"held-{name}"
    if phase is not _PHASE or name not in _RANKS or mark.exists():
        return
    mark.touch()
    if _HANGS:
        ctypes.PyDLL(None).usleep(int(_SECONDS * 1e6))
    until = time.monotonic() + _SECONDS
    while not (_DIRECTORY / "go").exists() and time.monotonic() < until:
        time.sleep(0.01)


class HeldProgress(Progress):
    """Halts where a phase is entered; loading, after the first bucket."""

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name == "phase" and value is not Phase.LOAD and isinstance(value, Phase):
            hold(value)
        if name == "buckets_done" and value and self.phase is Phase.LOAD:  # some tensors are new by now
            hold(Phase.LOAD)


def main() -> None:
    """Runs the rank."""
    report = rank._RankProcess._progressed

    def progressed(process: rank._RankProcess, progress: Progressed) -> None:
        report(process, progress)
        if progress.phase in (Phase.READ, Phase.GATHER):
            hold(progress.phase)

    rank._RankProcess._progressed = progressed
    made = rank.ParameterServer.__init__

    def make(server: rank.ParameterServer, **options: str) -> None:
        made(server, **options)
        server._updates.progress = HeldProgress()

    rank.ParameterServer.__init__ = make  # pyright: ignore[reportAttributeAccessIssue]
    rank.main()


if __name__ == "__main__":
    main()
