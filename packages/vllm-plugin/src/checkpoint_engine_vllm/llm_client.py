"""The client of an offline `LLM(...)`, in the process that has made it: calls in the place of requests."""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

from checkpoint_engine.sdk import DeadlineError, EngineRequestError
from checkpoint_engine.sdk.client import CollectiveRpcClient, Deadline, NoEndpoint, PauseMode
from checkpoint_engine_vllm.development import NO_EXTENSION

__all__ = ["LlmClient"]


class LlmClient(CollectiveRpcClient):
    """See `checkpoint_engine.client.engine_client.EngineClient`; during a call nothing else may use the engine."""

    def __init__(self, llm: Any, *, timeout: float = 60.0) -> None:  # noqa: ANN401 - vLLM's own
        super().__init__(NoEndpoint(f"the LLM {id(llm):#x} of process {os.getpid()}"), timeout=timeout)
        self._llm = llm
        self._turn = threading.Lock()
        """An `LLM` is made for one thread; what belongs around an update is done beside it."""

    def wait_ready(self, deadline: Deadline) -> None:
        """Checks that its workers can be updated.

        Raises:
            EngineRequestError: they lack our methods.
            DeadlineError: they do not answer in time.
        """
        try:
            self.status(deadline)
        except EngineRequestError as error:
            raise EngineRequestError(f"{error}; {NO_EXTENSION}") from error

    def world_size(self) -> int | None:
        """Number of the workers that one call reaches."""
        return int(self._llm.llm_engine.vllm_config.parallel_config.world_size)

    def collective_rpc(self, method: str, deadline: Deadline, args: Sequence[object] = ()) -> list[Any]:
        """Runs a method on every worker and returns their results in order of rank.

        Raises:
            EngineRequestError: vLLM or a worker raised.
            DeadlineError: they did not answer in time.
        """
        return self._call(deadline, self._llm.collective_rpc, method, timeout=deadline.remaining, args=tuple(args))

    def needs_pause(self, mode: PauseMode) -> bool:
        """Not where vLLM is too old for a pause offline: its workers are called between two steps all the same."""
        return super().needs_pause(mode) and _takes(self._llm.sleep, "mode")

    def pause(self, mode: PauseMode, *, reset_caches: bool, deadline: Deadline) -> None:
        """Sleep of level 0, which takes no memory; running requests are kept, aborted or waited for.

        Raises:
            EngineRequestError: vLLM refuses, as mode `wait` where the engine runs in this process.
            DeadlineError: it did not pause in time.
        """
        del reset_caches
        self._call(deadline, self._llm.sleep, level=0, mode=mode)

    def resume(self, deadline: Deadline) -> None:
        """Lets it run requests again; memory that sleeps goes on sleeping."""
        self._call(deadline, self._llm.wake_up, tags=["scheduling"])

    def is_paused(self, deadline: Deadline) -> bool:
        """Whether it is, or sleeps in any other way."""
        return bool(self._call(deadline, self._llm.llm_engine.is_sleeping))

    def reset_caches(self, deadline: Deadline) -> None:
        """Drops the prefix, multimodal and encoder caches; one that this vLLM does not have is passed over.

        Raises:
            EngineRequestError: vLLM refuses, or the prefix cache is still in use.
            DeadlineError: another call was not over in time.
        """
        reset = self._llm.reset_prefix_cache
        running = {"reset_running_requests": True} if _takes(reset, "reset_running_requests") else {}
        if self._call(deadline, reset, **running) is False:
            who = self.endpoint.address
            raise EngineRequestError(f"{who} cannot reset its prefix cache: requests still hold blocks of it")
        for owner, name in ((self._llm, "reset_mm_cache"), (self._llm.llm_engine, "reset_encoder_cache")):
            if hasattr(owner, name):
                self._call(deadline, getattr(owner, name))

    def publish_version(self, version: str, deadline: Deadline) -> None:
        """Where vLLM has a version of its weights."""
        publish = getattr(self._llm.llm_engine, "set_weight_version", None)
        if publish is not None:
            self._call(deadline, publish, version)

    def _call(self, deadline: Deadline, call: Callable[..., Any], *arguments: object, **named: object) -> Any:  # noqa: ANN401
        who, what = self.endpoint.address, getattr(call, "__name__", repr(call))
        if not self._turn.acquire(timeout=deadline.remaining):
            raise DeadlineError(f"another call of {who} was not over within {deadline.said}")
        try:
            return call(*arguments, **named)
        except TimeoutError as error:
            raise DeadlineError(f"{who} was not through with {what} within {deadline.said}") from error
        except Exception as error:  # whatever vLLM raises
            raise EngineRequestError(f"{who} failed at {what} ({type(error).__name__}: {error})") from error
        finally:
            self._turn.release()


def _takes(function: Callable[..., object], parameter: str) -> bool:
    return parameter in inspect.signature(function).parameters
