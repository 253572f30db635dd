"""A worker extension with a switch that breaks the loader; served by `--worker-extension-cls` in tests only."""

from __future__ import annotations

from typing import Any

from checkpoint_engine_vllm import WorkerExtension


class FaultyExtension(WorkerExtension):
    """Ours, and a way to make vLLM's loader raise in the middle of the next update."""

    def checkpoint_engine_test_break(self, calls: int) -> None:
        """The model's loader raises once it was called that many times; a negative number mends it."""
        worker: Any = self
        model = worker.model_runner.get_model()
        model.__dict__.pop("load_weights", None)
        if calls < 0:
            return
        original, left = model.load_weights, [calls]

        def load_weights(weights: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise RuntimeError("a fault made by the test")
            return original(weights)

        model.load_weights = load_weights
