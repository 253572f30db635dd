"""The oracle finds tensors wherever a model can hold them."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

from tests.oracle.packed import Packed
from tests.oracle.walk import contents, differences

pytestmark = pytest.mark.pure


class Kernel:
    """Holds things as engines' kernels do."""

    __slots__ = ("__dict__", "packed")

    def __init__(self, packed: torch.Tensor) -> None:
        self.packed = packed
        self.owner: Any = None

    def apply(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        return x @ self.packed


def made(value: torch.Tensor, way: str) -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2))
    layer: Any = model[0]
    torch.nn.init.ones_(layer.weight)
    torch.nn.init.ones_(layer.bias)
    kernel = Kernel(value)
    kernel.owner = kernel  # goes round in circles
    below = nn.Linear(2, 2, bias=False)
    below.weight.data = value
    held = {
        "attribute": value,
        "list": [torch.ones(1), (value,)],
        "dict": {"a": {"b": value}},
        "object": kernel,
        "bound method": kernel.apply,
        "closure": lambda x: x + value,
        "default": lambda x, value=value: x + value,
        "partial": functools.partial(torch.add, other=value),
        "unregistered module": [nn.Sequential(below)],
        "of a parameter": layer.weight,
    }
    layer.weight.scale = value if way == "of a parameter" else torch.ones(2, 2)
    if way == "parameter":
        layer.weight.data = value
    elif way == "buffer":
        layer.register_buffer("table", value, persistent=False)
    else:
        layer.held = held[way]
    return model


WAYS = ["attribute", "list", "dict", "object", "bound method", "closure", "default", "partial"]


@pytest.mark.parametrize("way", ["parameter", "buffer", *WAYS, "unregistered module", "of a parameter"])
def test_a_tensor_is_found_wherever_it_is_held(way: str) -> None:
    value = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    before = contents(made(value.clone(), way))
    assert differences(before, contents(made(value.clone(), way))) == []
    value[1, 1] = 5.0
    assert differences(contents(made(value, way)), before)


def test_numbers_count_and_requests_do_not() -> None:
    model: Any = nn.Linear(2, 2)
    model.scale_float, model.kv_cache = 0.5, [torch.zeros(4)]
    before = contents(model)
    model.kv_cache[0][2] = 1.0
    assert contents(model) == before
    model.scale_float = 0.25
    assert differences(contents(model), before) == ["scale_float: 0.25, not 0.5"]


def test_strides_do_not_count_but_places_do() -> None:
    model: Any = nn.Linear(2, 2, bias=False)
    before = contents(model)
    model.weight.data = model.weight.data.t().contiguous().t()
    assert contents(model) == before
    model.weight.data = model.weight.data.t()
    assert contents(model) != before


def test_what_only_a_kernel_holds_is_told_by_what_it_computes() -> None:
    model: Any = nn.Linear(2, 2, bias=False)
    model.input_size, hidden = 2, torch.ones(2, 2)
    model.quant_method = type("Method", (), {"apply": lambda self, layer, x: x @ model._p()})()
    model._p = functools.partial(torch.mul, hidden, 1)
    probe = Packed(torch.float32, torch.device("cpu"))
    before = contents(model, [probe], left_out=["_p"])
    hidden[0, 1] = 2.0
    [found] = differences(contents(model, [probe], left_out=["_p"]), before)
    assert found.startswith("apply(eye)")


class NoKernel:
    """A method of a layer whose kernel does not run here."""

    def apply(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel")


def test_a_probe_that_fails_is_alike_whatever_default_dtype_a_failed_start_has_left() -> None:
    layer: Any = nn.Linear(2, 2)
    layer.input_size, layer.quant_method = 2, NoKernel()
    probe = Packed(torch.float32, torch.device("cpu"))
    before = contents(layer, [probe])
    assert any("raises RuntimeError" in path for path in before)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert differences(contents(layer, [probe]), before) == []
    finally:
        torch.set_default_dtype(torch.float32)
