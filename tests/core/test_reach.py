"""Tensors are found wherever a model holds them, and told apart by what is in them."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

from checkpoint_engine.reload.proof import Checksums
from checkpoint_engine.reload.reach import HeldTensors, reach

pytestmark = pytest.mark.pure


class Kernel:
    def __init__(self, packed: torch.Tensor) -> None:
        self.packed = packed
        self.owner = self

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.packed


class Slotted:
    __slots__ = ("packed",)

    def __init__(self, packed: torch.Tensor) -> None:
        self.packed = packed


class KernelConfig(Kernel):
    """Settings, which are no weights."""


WAYS = {
    "attribute": lambda value: value,
    "list": lambda value: [torch.ones(1), (value,)],
    "dictionary": lambda value: {"a": {"b": value}},
    "object": Kernel,
    "slot": Slotted,
    "bound method": lambda value: Kernel(value).apply,
    "closure": lambda value: lambda x: x + value,
    "default": lambda value: lambda x, value=value: x + value,
    "partial": lambda value: functools.partial(torch.add, other=value),
    "module": lambda value: [nn.Sequential(nn.ParameterList([value]))],
    "beside a parameter": lambda value: nn.Parameter(torch.ones(2)),
    "number": lambda value: float(value.sum()),
}


def model_with(way: str, value: torch.Tensor) -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    layer: Any = model[0]
    layer.weight.data.fill_(1)
    layer.bias.data.fill_(1)
    layer.held = WAYS[way](value)
    if way == "beside a parameter":
        layer.held.scale = value
    layer.kv_cache = value
    layer.settings = KernelConfig(value)
    layer.foreign = torch.no_grad()(lambda x: x + value)  # holds what it wraps, and is called like it
    return model


def held(model: nn.Module) -> HeldTensors:
    return HeldTensors(reach(model, {"kv_cache"}), Checksums())


@pytest.mark.parametrize("way", WAYS)
def test_one_element_is_seen_wherever_it_is_held(way: str) -> None:
    before = held(model_with(way, torch.zeros(2, 2)))
    assert before.differing(reach(model_with(way, torch.zeros(2, 2)), {"kv_cache"})) == []
    found = before.differing(reach(model_with(way, torch.tensor([[0.0, 0], [0, 1]])), {"kv_cache"}))
    assert [each.module for each in found] == ["0"]
    assert found[0].path.startswith("0.held")
    assert not found[0].registered


def test_what_is_registered_is_found_once_with_its_name() -> None:
    found = {each.path: each for each in reach(model_with("attribute", torch.zeros(2)), {"kv_cache"})}
    names = {"0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert {path for path, each in found.items() if each.registered} == names
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert [each.path for each in reach(model, only=model[1])] == ["1.weight", "1.bias"]


@pytest.mark.parametrize(
    "other", [torch.zeros(4), torch.zeros(2, 2, dtype=torch.int32), torch.empty(2, 2, device="meta")]
)
def test_shape_dtype_and_being_there_count(other: torch.Tensor) -> None:
    before = held(model_with("attribute", torch.zeros(2, 2)))
    assert [each.path for each in before.differing(reach(model_with("attribute", other), {"kv_cache"}))] == ["0.held"]
    assert "0.held" in before


def test_views_and_packed_layouts_have_their_own_contents() -> None:
    whole = torch.arange(16.0).reshape(4, 4)
    model: Any = nn.Module()
    model.views = [whole, whole[1], whole.t(), whole.to_sparse(), torch.empty(0)]
    before = HeldTensors(reach(model), Checksums())
    whole[1, 0] = -1
    model.views[3] = whole.to_sparse()
    assert [each.own for each in before.differing(reach(model))] == [f"views.{n}" for n in range(4)]
