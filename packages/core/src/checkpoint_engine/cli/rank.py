"""A rank process of the command line; `cli.ranks` starts it."""

from __future__ import annotations

import argparse
import logging
import os
import threading
import time

import msgspec

from checkpoint_engine.cli.job import Rank
from checkpoint_engine.cli.messages import Abort, Done, Failed, FromParent, FromRank, Job, Logged, Progressed
from checkpoint_engine.deadline import Deadline
from checkpoint_engine.errors import CheckpointEngineError, RankError, UpdateError
from checkpoint_engine.host.numa import near
from checkpoint_engine.processes import ParentPipe
from checkpoint_engine.server import ParameterServer

_ABORT_SECONDS = 2.0
_SETTLE_SECONDS = 8.0
"""For putting the engine into a known state after the parent is gone."""

logger = logging.getLogger(__name__)


class _WarningsToParent(logging.Handler):
    """Sends warnings of the library to the terminal of the parent."""

    def __init__(self, pipe: ParentPipe) -> None:
        super().__init__(logging.WARNING)
        self._pipe = pipe

    def emit(self, record: logging.LogRecord) -> None:
        _send(self._pipe, Logged(record.getMessage()))


class _RankProcess:
    def __init__(self, pipe: ParentPipe, server: ParameterServer) -> None:
        self._pipe = pipe
        self._server = server
        self._rank = Rank(server, self._progressed)
        self._last = Progressed("")
        self._job = threading.Thread()

    def serve(self) -> None:
        """Follows the parent until it closes the pipe. Jobs run in a thread, so that an abort is heard."""
        for line in self._pipe.lines():
            message = msgspec.json.decode(line, type=FromParent)  # pyright: ignore[reportArgumentType, reportCallIssue]
            if isinstance(message, Job):
                self._job = threading.Thread(target=self._run, args=(message,), name="job", daemon=True)
                self._job.start()
            elif isinstance(message, Abort):
                self._abort(message)
        if self._server.abort("the command that ran the update has ended"):
            self._job.join(_SETTLE_SECONDS)

    def _abort(self, order: Abort) -> None:
        if not self._rank.updating:
            _send(self._pipe, Failed(order.job, "RankError", order.reason, secondary=True))
            return
        patience = Deadline(_ABORT_SECONDS)
        # The update may be about to begin; and once it is over, the job reports by itself.
        while self._job.is_alive() and not self._server.abort(order.reason) and not patience.expired:
            time.sleep(0.02)

    def _run(self, job: Job) -> None:
        _send(self._pipe, self._outcome(job))

    def _outcome(self, job: Job) -> Done | Failed:
        try:
            return self._rank.run(job)
        except UpdateError as error:
            logger.info("the update failed", exc_info=True)
            outcome = self._rank.engine_outcome()
            return Failed(job.number, "UpdateError", str(error), error.phase, error.rank, error.kind, outcome)
        except CheckpointEngineError as error:
            logger.info("the job failed", exc_info=True)
            return Failed(job.number, type(error).__name__, str(error), secondary=isinstance(error, RankError))
        except Exception as error:
            # A bug of ours: the parent says so, and shows the log with the traceback.
            logger.exception("the job failed")
            return Failed(job.number, type(error).__name__, str(error))

    def _progressed(self, progress: Progressed) -> None:
        if self._server.rank == 0 and progress != self._last:
            self._last = progress
            _send(self._pipe, progress)


def _send(pipe: ParentPipe, message: FromRank) -> None:
    pipe.send(msgspec.json.encode(message))


def main() -> None:
    """Entry point of the process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default=None)
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    logging.basicConfig(
        level=logging.INFO if options.verbose else logging.WARNING,
        format=f"%(asctime)s rank {os.environ.get('RANK')} %(name)s: %(message)s",
    )
    pipe = ParentPipe(grace=_SETTLE_SECONDS + 1)
    logging.getLogger("checkpoint_engine").addHandler(_WarningsToParent(pipe))
    try:
        server = ParameterServer(device=options.device)
    except CheckpointEngineError as error:
        _send(pipe, Failed(0, type(error).__name__, str(error)))
        return
    with server, near(server.device):
        _RankProcess(pipe, server).serve()
    os._exit(0)  # everything of value is closed; a thread that still waits for an engine must not hold us up


if __name__ == "__main__":
    main()
