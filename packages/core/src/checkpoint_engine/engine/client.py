"""How the parameter server asks an engine to take an update."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, ClassVar, Literal, Protocol, TypeVar, cast, runtime_checkable
from urllib.parse import urlsplit

import msgspec

from checkpoint_engine.background import in_background
from checkpoint_engine.deadline import Deadline
from checkpoint_engine.engine.endpoint import Endpoint, shorten
from checkpoint_engine.errors import (
    CheckpointEngineError,
    DeadlineError,
    EngineRequestError,
)

PauseMode = Literal["keep", "abort", "wait", "none"]
"""What becomes of running requests: kept and continued, aborted, waited for; or the engine is not paused."""

_POLL_SECONDS = 0.25
_SETTLE_SECONDS = 15.0
"""For asking an engine, after a failure, what it holds now, and for resuming it."""
_ANSWER_SECONDS = 5.0
"""An engine that runs into the deadline itself gets this much longer to say so."""

_Converted = TypeVar("_Converted")

logger = logging.getLogger(__name__)


class EngineClient(Protocol):
    """Speaks for one engine instance; made from its endpoint, `http://host:port` or `unix:/path/to.sock`."""

    def __init__(self, endpoint: str, *, timeout: float = 60.0) -> None: ...

    def wait_ready(self, deadline: Deadline) -> None:
        """Waits until the engine serves.

        Raises:
            DeadlineError: it does not come up in time; the message says what was seen last.
            EngineRequestError: something answers there, but it is not such an engine.
        """
        ...

    def world_size(self) -> int | None:
        """Number of the engine's workers, tensor- and pipeline-parallel; None if it cannot tell."""
        ...

    def update_weights(
        self,
        handles: Mapping[str, str],
        *,
        version: str,
        pause: PauseMode,
        reset_caches: bool,
        timeout: float,
    ) -> None:
        """Makes every worker of the engine take the update that `handles` (device identity -> handle) offers.

        Returns once all workers hold exactly `version` and the engine serves again. After a failure the
        engine serves again if its old weights are whole, and stays paused if they are not.

        Raises:
            EngineRequestError: the engine refuses, or a worker failed; the message names the worker.
            DeadlineError: it does not answer in time.
        """
        ...


@runtime_checkable
class VerifyingClient(Protocol):
    """A client whose engine can be compared with a checkpoint."""

    def verify_weights(self, handles: Mapping[str, str], *, version: str, timeout: float) -> None:
        """See `CollectiveRpcClient.verify_weights`."""
        ...


class WorkerReport(msgspec.Struct, frozen=True):
    """What a worker's `checkpoint_engine_update` returns."""

    ok: bool
    dirty: bool = False
    version: str = ""
    error: str = ""
    phase: str = ""
    seconds: float = 0.0
    verified: bool = False
    """Whether its weights were only compared with what came."""


class WorkerStatus(msgspec.Struct, frozen=True):
    """What a worker's `checkpoint_engine_status` returns: `dirty` says that its weights may be a mixture."""

    dirty: bool
    version: str | None = None
    updating: bool = False


class CollectiveRpcClient:
    """A client for engines that run a method on all their workers by `POST /collective_rpc`, as vLLM does.

    Subclasses say how their engine pauses, resumes, drops caches and publishes a version.
    """

    setup_hint: ClassVar[str] = ""
    """Added to errors that look as if the engine had been started without our worker methods."""

    def __init__(self, endpoint: str, *, timeout: float = 60.0) -> None:
        self.endpoint = Endpoint(endpoint)
        self.timeout = timeout

    # -- what engines differ in

    def pause(self, mode: PauseMode, *, reset_caches: bool, deadline: Deadline) -> None:
        """Stops the engine from running requests."""
        raise NotImplementedError

    def resume(self, deadline: Deadline) -> None:
        """Lets it run requests again."""
        raise NotImplementedError

    def reset_caches(self, deadline: Deadline) -> None:
        """Drops what was computed with the old weights."""
        raise NotImplementedError

    def publish_version(self, version: str, deadline: Deadline) -> None:
        """Tells the engine the name of the weights it now serves, if it wants to know."""

    # -- what they share

    def wait_ready(self, deadline: Deadline) -> None:
        """Polls `GET /health` until it succeeds; see `EngineClient`."""
        seen = "nothing was tried"
        while not deadline.expired:
            try:
                reply = self.endpoint.send("GET", "/health", Deadline(min(5.0, deadline.remaining)))
            except (EngineRequestError, DeadlineError) as error:
                seen = str(error)
            else:
                if reply.ok:
                    return
                seen = f"GET /health was answered with {reply.status}: {shorten(reply.text)}"
                if reply.status in range(400, 500):
                    raise EngineRequestError(f"{self.endpoint.address} is not an engine that can be updated: {seen}")
            time.sleep(min(_POLL_SECONDS, deadline.remaining))
        raise DeadlineError(f"{self.endpoint.address} was not ready within {deadline.seconds:g} s: {seen}")

    def world_size(self) -> int | None:
        """Asks `GET /get_world_size`; see `EngineClient`."""
        reply = self.endpoint.send("GET", "/get_world_size", Deadline(self.timeout))
        if not reply.ok:
            return None
        try:
            return msgspec.json.decode(reply.text, type=dict[str, int]).get("world_size")
        except msgspec.MsgspecError:
            return None

    def collective_rpc(self, method: str, deadline: Deadline, args: Sequence[object] = ()) -> list[Any]:
        """Runs a method on every worker and returns their results in order of rank.

        Raises:
            EngineRequestError: the engine answers with an error.
            DeadlineError: it does not answer in time.
        """
        body: dict[str, object] = {
            "method": method,
            "args": list(args),
            "kwargs": {},
            "timeout": deadline.remaining,
        }
        answer = self.endpoint.call(
            "POST", "/collective_rpc", Deadline(deadline.remaining + _ANSWER_SECONDS), body=body
        )
        if not isinstance(answer, dict) or not isinstance(answer.get("results"), list):  # pyright: ignore[reportUnknownMemberType]
            raise EngineRequestError(f"{self.endpoint.address} returned no results of {method!r}: {answer!r}")
        return cast("list[Any]", answer["results"])

    def status(self, deadline: Deadline) -> list[WorkerStatus]:
        """What every worker holds now.

        Raises:
            EngineRequestError: the engine answers with an error.
            DeadlineError: it does not answer in time.
        """
        return self._converted(self.collective_rpc("checkpoint_engine_status", deadline), list[WorkerStatus])

    def update_weights(
        self,
        handles: Mapping[str, str],
        *,
        version: str,
        pause: PauseMode,
        reset_caches: bool,
        timeout: float,
    ) -> None:
        """Pauses, updates all workers, resets caches, publishes the version, resumes; see `EngineClient`."""
        deadline = Deadline(timeout)
        paused = pause != "none"
        resetting: Future[None] | None = None
        if paused:
            self._pause_or_undo(pause, reset_caches, deadline)
            if reset_caches:  # nothing fills them until it is resumed: they need not wait for the new weights
                resetting = in_background(lambda: self.reset_caches(deadline), "checkpoint-engine-caches")
        try:
            self._update_workers(handles, version, deadline)
        except (EngineRequestError, DeadlineError) as error:
            raise type(error)(f"{error}; {self._settle(paused)}") from error
        try:
            if resetting is not None:
                resetting.result()  # its requests end with the deadline
            elif reset_caches:
                self.reset_caches(deadline)
            self.publish_version(version, deadline)
            if paused:
                self.resume(deadline)
        except (EngineRequestError, DeadlineError) as error:
            stays = "and may still be paused" if paused else "but its caches may be stale"
            raise type(error)(f"{error}; all workers hold version {version!r} {stays}: update again") from error

    def verify_weights(self, handles: Mapping[str, str], *, version: str, timeout: float) -> None:
        """Has every worker compare its weights with the checkpoint that `handles` offer; the engine is not paused.

        Raises:
            EngineRequestError: the engine refuses, or a worker failed; the message names the worker.
            DeadlineError: it does not answer in time.
        """
        self._update_workers(handles, version, Deadline(timeout), compare=True)

    def _pause_or_undo(self, mode: PauseMode, reset_caches: bool, deadline: Deadline) -> None:  # noqa: FBT001
        try:
            self.pause(mode, reset_caches=reset_caches, deadline=deadline)
        except CheckpointEngineError:
            # Whether the engine heard us is unknown; its weights are whole, so it may serve.
            self._resume_quietly()
            raise

    def _update_workers(
        self, handles: Mapping[str, str], version: str, deadline: Deadline, *, compare: bool = False
    ) -> None:
        args = (dict(handles), version, deadline.remaining)
        try:
            results = self.collective_rpc("checkpoint_engine_update", deadline, args)
        except EngineRequestError as error:
            raise EngineRequestError(f"{error}{self.setup_hint and f' ({self.setup_hint})'}") from error
        reports = self._converted(results, list[WorkerReport])
        failures: dict[str, list[int]] = {}
        for rank, report in enumerate(reports):
            if not report.ok:
                failures.setdefault(f"failed in {report.phase or 'update'}: {report.error}", []).append(rank)
        if failures or not reports:
            words = (f"worker {', '.join(map(str, ranks))} {text}" for text, ranks in failures.items())
            raise EngineRequestError(f"{self.endpoint.address}: {'; '.join(words) or 'no worker answered'}")
        if not compare and any(report.verified for report in reports):
            raise EngineRequestError(
                f"{self.endpoint.address} was to be updated, but the parameter server only had it compare: with "
                "`reload='verify'` belongs the client's `verify_weights`"
            )

    def _settle(self, paused: bool) -> str:  # noqa: FBT001
        """After a failure: resumes the engine if its weights are whole; says what was found, for people."""
        try:
            workers = self.status(Deadline(_SETTLE_SECONDS))
        except CheckpointEngineError as error:
            return f"what its workers hold now is unknown{', it was left paused' if paused else ''} ({error})"
        mixed = len({worker.version for worker in workers}) > 1
        if mixed or any(worker.dirty or worker.updating for worker in workers):
            return f"its weights are a mixture now{', it was left paused' if paused else ''}: update again"
        if paused and not self._resume_quietly():
            return "it still holds its old weights, but could not be resumed"
        return "it still holds its old weights"

    def _resume_quietly(self) -> bool:
        try:
            self.resume(Deadline(_SETTLE_SECONDS))
        except CheckpointEngineError as error:
            logger.warning("cannot resume %s: %s", self.endpoint.address, error)
            return False
        return True

    def _converted(self, results: list[Any], kind: type[_Converted]) -> _Converted:
        try:
            return msgspec.convert(results, kind)
        except msgspec.MsgspecError as error:
            hint = self.setup_hint or "is its plugin of another version?"
            raise EngineRequestError(
                f"the workers of {self.endpoint.address} returned something unexpected ({error}): {results!r}; {hint}"
            ) from error


class ReferenceClient(CollectiveRpcClient):
    """The client of `checkpoint_engine.engine.reference_server`."""

    def pause(self, mode: PauseMode, *, reset_caches: bool, deadline: Deadline) -> None:  # noqa: ARG002
        """`POST /pause`."""
        self.endpoint.call("POST", "/pause", deadline, query={"mode": mode})

    def resume(self, deadline: Deadline) -> None:
        """`POST /resume`."""
        self.endpoint.call("POST", "/resume", deadline)

    def reset_caches(self, deadline: Deadline) -> None:
        """`POST /reset_prefix_cache`."""
        self.endpoint.call("POST", "/reset_prefix_cache", deadline)


def request_inference_to_update(
    url: str, socket_paths: Mapping[str, str], timeout: float = 300.0, uds: str | None = None
) -> None:
    """Asks an engine to call `update_weights_from_ipc` on its workers; returns when they have.

    Args:
        url: The engine's `/collective_rpc`, such as `http://localhost:8000/collective_rpc`.
        socket_paths: Identity of each device -> handle of the parameter-server rank that feeds it.
        timeout: Seconds for the whole request.
        uds: Path of the engine's Unix socket, if it listens on one; the host of `url` is then ignored.

    Raises:
        EngineRequestError: nobody listens, or the engine answers with an error.
        DeadlineError: it does not answer in time.
    """
    parts = urlsplit(url)
    endpoint = Endpoint(f"unix:{uds}" if uds else f"{parts.scheme}://{parts.netloc}")
    body = {"method": "update_weights_from_ipc", "args": [dict(socket_paths)], "timeout": timeout}
    endpoint.call("POST", parts.path or "/collective_rpc", Deadline(timeout), body=body)
