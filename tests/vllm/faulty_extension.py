"""A worker extension that can break the loader and slow the model down; for `--worker-extension-cls` in tests only."""

from __future__ import annotations

import time
from typing import Any

from checkpoint_engine_vllm import WorkerExtension
from checkpoint_engine_vllm.place import WorkerPlace


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

    def checkpoint_engine_test_fingerprint(self) -> dict[str, str]:
        """As a cold start in the process of `engine_process.py` has it."""
        from engine_process import fingerprint

        worker: Any = self
        return fingerprint(worker.model_runner.get_model())

    def checkpoint_engine_test_break(
        self, calls: int, once: bool = False, rank: int | None = None, replica: int | None = None
    ) -> None:
        """The model's loader raises after so many calls, from then on or once; a negative number mends it."""
        worker: Any = self
        if replica not in (None, WorkerPlace.of(worker).replica):
            return
        model = worker.model_runner.get_model()
        model.__dict__.pop("load_weights", None)
        if calls < 0 or rank not in (None, worker.rank):
            return
        original, left = model.load_weights, [calls]

        def load_weights(weights: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                if once:
                    model.__dict__.pop("load_weights", None)
                raise RuntimeError("a fault made by the test")
            return original(weights)

        model.load_weights = load_weights

    def checkpoint_engine_test_spoil(self, replica: int) -> None:
        """One replica's weights are no longer what an update has brought."""
        worker: Any = self
        if WorkerPlace.of(worker).replica == replica:
            next(worker.model_runner.get_model().parameters()).data.view(-1)[0] += 1
