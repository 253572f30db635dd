"""One model of a worker while its new weights come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from checkpoint_engine.engine.adapter import TensorSpec
from checkpoint_engine.errors import CheckpointEngineError, WeightsRejectedError, WorkerError
from checkpoint_engine_sglang import postprocess
from checkpoint_engine_sglang.compat import Runner
from checkpoint_engine_sglang.trial import Trial, Watched, rejection

_REJECTIONS = (KeyError, ValueError, AssertionError, AttributeError, IndexError)
"""What SGLang's loaders raise for a tensor that is unknown or of the wrong shape."""


class Load:
    """Gives tensors to the loader of one model, in the company that the loader needs."""

    def __init__(self, runner: Runner, names: Mapping[str, str], trial: Trial | None) -> None:
        self.runner = runner
        self.names = names
        """Name of a tensor -> its name in this model; others are not for it."""
        self.trial = trial
        """None where nothing is known beforehand of what the loader does."""
        self._delivered: set[str] = set()
        self._held: dict[str, torch.Tensor] = {}
        self._places = _places(runner)

    def take(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Loads those of the tensors that are this model's; their memory may be used again afterwards.

        Raises:
            WeightsRejectedError: the loader does not take a tensor.
            WorkerError: the loader failed otherwise.
        """
        mine = [(self.names[name], tensor) for name, tensor in tensors if name in self.names]
        self._delivered.update(name for name, _ in mine)
        ready = self._complete_groups(mine)
        if not ready:
            return
        watched = Watched(ready)
        try:
            cast("Any", self.runner.model).load_weights(iter(watched))
        except CheckpointEngineError:
            raise
        except Exception as error:
            if isinstance(error, _REJECTIONS):
                found = dict(ready).get(watched.last)
                spec = None if found is None else TensorSpec(found.dtype, tuple(found.shape))
                raise rejection(watched.last, spec, error) from error
            raise WorkerError(
                f"SGLang's loader of the {self.runner.role} model failed at tensor {watched.last!r}: "
                f"{type(error).__name__}: {error}"
            ) from error

    def finish(self) -> None:
        """Checks that everything came, and completes the model.

        Raises:
            WeightsRejectedError: a tensor is missing.
            WorkerError: SGLang's processing failed, or moved weights that CUDA graphs read.
        """
        lost = [own for own in self.names.values() if own not in self._delivered]
        if lost:
            raise WeightsRejectedError(f"announced but not delivered: {', '.join(lost[:8])}")
        postprocess.complete(self.runner)
        moved = [name for name, place in _places(self.runner).items() if self._places.get(name) != place]
        if moved and self.runner.has_graphs:
            raise WorkerError(
                f"SGLang has moved the weights {', '.join(moved[:4])}: CUDA graphs that it has captured would go on "
                "with the old ones; start it with --disable-cuda-graph, or anew with the new weights"
            )

    def _complete_groups(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
        """Holds back what the loader joins with tensors that are still to come; adds what waited for these."""
        joined = {} if self.trial is None else self.trial.joined
        if not joined:
            return list(tensors)
        here = dict(tensors)
        ready: list[tuple[str, torch.Tensor]] = []
        for name, tensor in tensors:
            group = joined.get(name, frozenset((name,)))
            if group <= here.keys() | self._held.keys():
                ready.extend((other, self._held.pop(other)) for other in sorted(group & self._held.keys()))
                ready.append((name, tensor))
            else:
                self._held[name] = tensor.clone()
                here.pop(name)
        return ready


def _places(runner: Runner) -> dict[str, int]:
    return {name: parameter.data_ptr() for name, parameter in runner.model.named_parameters()}
