"""New weights reach a serving vLLM in place.

In vLLM's environment: `WorkerExtension`, and `LlmClient` beside an offline `LLM(...)`. In that of the parameter server,
which needs no vLLM: `VllmClient`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from checkpoint_engine_vllm.client import VllmClient
    from checkpoint_engine_vllm.extension import WorkerExtension
    from checkpoint_engine_vllm.extension import WorkerExtension as VllmColocateWorkerExtension
    from checkpoint_engine_vllm.llm_client import LlmClient

__version__ = "0.1.0"
__all__ = ["LlmClient", "VllmClient", "VllmColocateWorkerExtension", "WorkerExtension", "__version__"]


def __getattr__(name: str) -> object:
    # vLLM imports this package in each of its processes, also in those that need none of it.
    if name == "VllmClient":
        from checkpoint_engine_vllm.client import VllmClient  # noqa: PLC0415

        return VllmClient
    if name == "LlmClient":
        from checkpoint_engine_vllm.llm_client import LlmClient  # noqa: PLC0415

        return LlmClient
    if name in ("WorkerExtension", "VllmColocateWorkerExtension"):
        from checkpoint_engine_vllm.extension import WorkerExtension  # noqa: PLC0415

        return WorkerExtension
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
