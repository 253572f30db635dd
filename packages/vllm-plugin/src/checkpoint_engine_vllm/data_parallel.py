"""Asking the workers of all data-parallel replicas behind one server: vLLM itself tells what those of the first say."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from itertools import chain
from typing import Any, cast

__all__ = ["ask_all_workers"]

_RPC = "collective_rpc"


async def ask_all_workers(engine: Any, method: str, timeout: float, arguments: Sequence[object]) -> list[Any]:  # noqa: ANN401 - vLLM's own
    """Runs a method on every worker of every replica; returns what each says, replica by replica."""
    core: Any = getattr(engine, "engine_core", None)
    replicas = cast("Sequence[object]", getattr(core, "core_engines", ()))
    call: Callable[..., Awaitable[list[Any]]] | None = getattr(core, "_call_utility_async", None)
    if len(replicas) < 2 or call is None:  # noqa: PLR2004 - more than one
        return list(await engine.collective_rpc(method, timeout=timeout, args=tuple(arguments)))
    asked = (call(_RPC, method, timeout, tuple(arguments), None, engine=replica) for replica in replicas)
    return list(chain.from_iterable(await asyncio.gather(*asked)))
