"""A worker extension that can break the loader and slow the model down; for `--worker-extension-cls` in tests only."""

from __future__ import annotations

import time
from typing import Any

from checkpoint_engine_vllm import WorkerExtension


class FaultyExtension(WorkerExtension):
    """Ours, and ways to bring about what else depends on luck."""

    def checkpoint_engine_test_slow(self, seconds: float) -> None:
        """Every step takes that much longer, so that a request is still under way when an update comes."""
        worker: Any = self
        runner = worker.model_runner
        runner.__dict__.pop("execute_model", None)
        original = runner.execute_model

        def execute_model(*args: Any, **kwargs: Any) -> Any:
            time.sleep(seconds)
            return original(*args, **kwargs)

        if seconds:
            runner.execute_model = execute_model

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
