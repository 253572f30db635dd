"""What callers pass by mistake is named, with what to pass instead."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from checkpoint_engine.deadline import Deadline
from checkpoint_engine.errors import SettingError, UnsupportedTensorError
from checkpoint_engine.server.parameter_server import ParameterServer

pytestmark = pytest.mark.pure


@pytest.fixture(scope="module")
def server() -> Iterator[ParameterServer]:
    with ParameterServer(rank=0, world_size=1, device="cpu") as made:
        yield made


@pytest.mark.parametrize(
    ("name", "arguments", "error", "says"),
    [
        ("a", {"files": "model.safetensors"}, SettingError, r"files=\['model.safetensors'\]"),
        (7, {"named_tensors": {"x": torch.ones(2)}}, SettingError, "names are text"),
        ("a", {"named_tensors": torch.nn.Linear(2, 2).named_parameters()}, SettingError, "dict"),
        ("a", {"named_tensors": {3: torch.ones(2)}}, SettingError, "names are text"),
        ("a", {"named_tensors": {"_extra_state": io.BytesIO()}}, UnsupportedTensorError, "leave it out"),
        ("a", {"named_tensors": {"x._extra_state": None}}, UnsupportedTensorError, "leave it out"),
        ("a", {"named_tensors": {"x": 3.0}}, UnsupportedTensorError, "no tensor but a float"),
    ],
)
def test_odd_arguments(server: ParameterServer, name: Any, arguments: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        server.register_checkpoint(name, **arguments)
    assert server.checkpoints == []


@pytest.mark.parametrize("seconds", [math.nan, math.inf, 1e12])
def test_no_wait_is_without_end(seconds: float) -> None:
    with pytest.raises(SettingError, match="no time to wait"):
        Deadline(seconds)
