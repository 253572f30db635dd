"""A rank process of the command line; `cli.ranks` starts it."""

from __future__ import annotations

import argparse
import logging
import os
import threading
import time

import msgspec

from checkpoint_engine import limits
from checkpoint_engine.cli.job import Rank
from checkpoint_engine.cli.messages import (
    AbortJob,
    Done,
    FromParent,
    FromRank,
    Job,
    JobFailed,
    Logged,
    PeerLost,
    Progressed,
)
from checkpoint_engine.contract.failure import Failure
from checkpoint_engine.contract.phase import Phase
from checkpoint_engine.deadline import Deadline
from checkpoint_engine.errors import CheckpointEngineError, RankError, UpdateError
from checkpoint_engine.host.numa import on_node_of
from checkpoint_engine.processes import ParentPipe
from checkpoint_engine.server.parameter_server import ParameterServer

__all__ = ["main"]


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
        self._last = Progressed(Phase.START)
        self._job = threading.Thread()

    def serve(self) -> None:
        """Follows the parent until it closes the pipe. Jobs run in a thread, so that an abort is heard."""
        for line in self._pipe.lines():
            message = msgspec.json.decode(line, type=FromParent)  # pyright: ignore[reportArgumentType, reportCallIssue]
            if isinstance(message, Job):
                self._job = threading.Thread(target=self._run, args=(message,), name="job", daemon=True)
                self._job.start()
            elif isinstance(message, AbortJob):
                self._abort(message)
        if self._server.abort("the command that ran the update has ended"):
            self._job.join(limits.ORPHAN_SETTLE)

    def _abort(self, order: AbortJob) -> None:
        if self._rank.give_up():
            failure = Failure.of(RankError(order.reason), self._rank.phase, self._server.rank)
            _send(self._pipe, JobFailed(order.job, failure, secondary=True, early=True))
            return
        patience = Deadline(limits.ABORT)
        # The update may be about to begin; and once it is over, the job reports by itself.
        while self._job.is_alive() and not self._server.abort(order.reason) and not patience.expired:
            time.sleep(0.02)

    def _run(self, job: Job) -> None:
        _send(self._pipe, self._outcome(job))

    def _outcome(self, job: Job) -> Done | JobFailed:
        try:
            return self._rank.run(job)
        except UpdateError as error:
            logger.info("the update failed", exc_info=True)
            self._name_lost(job, self._failure(error))
            engine = "" if error.rolled_back else self._rank.engine_outcome(error)
            return JobFailed(job.number, self._failure(error), of_update=True, engine=engine)
        except CheckpointEngineError as error:
            logger.info("the job failed", exc_info=True)
            self._name_lost(job, self._failure(error))
            early = not self._rank.updating
            return JobFailed(job.number, self._failure(error), secondary=isinstance(error, RankError), early=early)
        except Exception as error:
            # A bug of ours: the parent says so, and shows the log with the traceback.
            logger.exception("the job failed")
            return JobFailed(job.number, self._failure(error))

    def _name_lost(self, job: Job, failure: Failure) -> None:
        """Its worker waits for it, and our engine for that worker: the parent ends it before we ask the engine."""
        if failure.error == RankError.__name__ and failure.rank not in (None, self._server.rank):
            _send(self._pipe, PeerLost(job.number, failure.rank, failure.message))

    def _failure(self, error: Exception) -> Failure:
        return Failure.of(error, self._rank.phase, self._server.rank)

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
    pipe = ParentPipe(grace=limits.ORPHAN_GRACE)
    logging.getLogger("checkpoint_engine").addHandler(_WarningsToParent(pipe))
    try:
        server = ParameterServer(device=options.device)
    except CheckpointEngineError as error:
        _send(pipe, JobFailed(0, Failure.of(error, Phase.START, int(os.environ.get("RANK", "0")))))
        return
    with server, on_node_of(server.device):
        _RankProcess(pipe, server).serve()
    os._exit(0)  # everything of value is closed; a thread that still waits for an engine must not hold us up


if __name__ == "__main__":
    main()
