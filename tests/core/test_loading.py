"""What an engine's loader gets, and where it lies: pure."""

from __future__ import annotations

import pytest
import torch

from checkpoint_engine.errors import WeightsRejectedError
from checkpoint_engine.reload.loading import give_to_loader

pytestmark = pytest.mark.pure


class Elsewhere(torch.Tensor):
    """Stands for a tensor on another device: what it is on the host is plain."""

    def cpu(self, *_: object, **__: object) -> torch.Tensor:
        return self.as_subclass(torch.Tensor) + 0


def test_a_loader_computes_on_the_host_and_copies_from_where_tensors_are() -> None:
    given: dict[str, torch.Tensor] = {}
    tensors = {name: torch.arange(3.0).as_subclass(Elsewhere) for name in ("A_log", "weight")}
    give_to_loader("a loader", given.update, tensors.items(), {"A_log"})
    assert {name: type(tensor) for name, tensor in given.items()} == {"A_log": torch.Tensor, "weight": Elsewhere}
    assert given["weight"] is tensors["weight"]


def test_what_a_loader_does_not_take_is_named() -> None:
    def load(pairs: object) -> None:
        next(pairs)  # type: ignore[call-overload]
        raise KeyError("no such parameter")

    with pytest.raises(WeightsRejectedError, match=r"a loader does not take tensor 'w' \(float32, shape \[2\]\)"):
        give_to_loader("a loader", load, [("w", torch.zeros(2))])
