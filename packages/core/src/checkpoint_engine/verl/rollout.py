"""verl's rollout of vLLM, which has vLLM's workers take weights by reload plan."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Mapping
from typing import Any

import msgspec
import torch.distributed as dist

from checkpoint_engine import limits
from checkpoint_engine.contract.failure import describe_failures
from checkpoint_engine.contract.reports import WorkerReport
from checkpoint_engine.errors import EngineRequestError, SettingError
from checkpoint_engine.transfer.order import RequestFunction
from checkpoint_engine.verl.backend import WIRE_FORMAT
from checkpoint_engine.verl.exchange import MeetingPoint, WeightExchange

__all__ = ["VllmRollout"]

_rollout: Any = importlib.import_module("verl.workers.rollout.vllm_rollout").ServerAdapter
_ray: Any = importlib.import_module("ray")


class VllmRollout(_rollout):
    """verl's own, but for weights that the backend `checkpoint_engine` brings.

    And, with `engine_kwargs.checkpoint_engine.colocated`, for those of a trainer in this very process: verl hands
    such to its rollout without any backend.
    """

    _exchange: WeightExchange | None = None

    async def update_weights(
        self,
        weights: Any,  # noqa: ANN401 - verl's
        global_steps: int | None = None,
        wire_format: str = "named_tensors",
        **others: Any,  # noqa: ANN401 - verl's
    ) -> None:
        """See `verl.workers.rollout.base.BaseRollout.update_weights`.

        Raises:
            CheckpointEngineError: vLLM did not take them.
        """
        if wire_format == WIRE_FORMAT:
            await weights.into(self._asker(weights.version))
        elif self._options().get("colocated") and wire_format == "named_tensors" and others.get("peft_config") is None:
            await self._take_from_this_process(weights, f"step-{global_steps}")
        else:
            await _rollout.update_weights(self, weights, global_steps=global_steps, wire_format=wire_format, **others)
            return
        if self._ensure_server_handle():
            await self.server_handle.clear_kv_cache.remote()
            if global_steps is not None:
                await self.server_handle.set_global_steps.remote(global_steps)

    async def _take_from_this_process(self, weights: Any, version: str) -> None:  # noqa: ANN401
        """Every rank of the trainer feeds the worker that shares its GPU."""
        options = self._options()
        if self._exchange is None:
            self._exchange = WeightExchange(
                dist.get_rank(),
                dist.get_world_size(),
                MeetingPoint.of_default_group(),
                device=options.get("device"),
                timeout=float(options.get("timeout", limits.UPDATE)),
            )
        exchange = self._exchange
        own = await exchange.take(weights, dist.get_world_size())
        ask = self._asker(version)
        await asyncio.to_thread(exchange.bring, own, lambda handles: ask(handles[exchange.rank :]), version)

    def _asker(self, version: str) -> RequestFunction:
        """Asks vLLM, if this rank is the one that speaks to it; handles are those of this and of later ranks."""
        workers = self._workers()

        def ask(handles: list[tuple[str, str]]) -> None:
            if not self._ensure_server_handle():
                return
            timeout = float(self._options().get("timeout", limits.UPDATE))
            arguments = {"handles": dict(handles[:workers]), "version": version, "timeout": timeout}
            answer = self.server_handle.collective_rpc.remote(
                "checkpoint_engine_update", timeout=timeout, kwargs=arguments
            )
            _check(_ray.get(answer, timeout=timeout))

        return ask

    def _workers(self) -> int:
        config = self.config
        if getattr(getattr(config, "disaggregation", None), "enabled", False):
            raise SettingError(
                "the backend checkpoint_engine does not know verl's disaggregated prefill; use nccl there"
            )
        return config.tensor_model_parallel_size * config.data_parallel_size * config.pipeline_model_parallel_size

    def _options(self) -> Mapping[str, Any]:
        return self.config.checkpoint_engine.engine_kwargs.get("checkpoint_engine") or {}


def _check(answers: object) -> None:
    """Raises if workers say that they failed. verl's server tells nothing: then the ranks have heard it from them."""
    reports = msgspec.convert(answers or [], list[WorkerReport])
    failures = [failure for number, report in enumerate(reports) if (failure := report.failure(number)) is not None]
    if failures:
        raise EngineRequestError(describe_failures(failures))
