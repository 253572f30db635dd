"""While vLLM's loader runs, it does not add up what unfinished layers hold; with a stand-in for vLLM's module."""

from __future__ import annotations

import sys
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch

from checkpoint_engine_vllm import compat
from checkpoint_engine_vllm.reload import LayerwiseReload
from checkpoint_engine_vllm.repairs import Repairs


def on_a_device(_: object) -> bool:
    return True


def test_vllm_does_not_add_up_while_it_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(has_device_tensors=on_a_device)
    monkeypatch.setitem(sys.modules, compat._RELOAD, module)

    def load() -> None:
        with compat.without_adding_up():
            assert not module.has_device_tensors("tensors on a GPU")
            raise ValueError

    with suppress(ValueError):
        load()
    assert module.has_device_tensors is on_a_device


def test_a_reload_loads_like_that(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(has_device_tensors=on_a_device)
    monkeypatch.setitem(sys.modules, compat._RELOAD, module)
    monkeypatch.setattr(compat, "layerwise", SimpleNamespace)
    seen: list[bool] = []

    class Model(torch.nn.Module):
        def load_weights(self, weights: object) -> set[str]:
            del weights
            seen.append(module.has_device_tensors("tensors on a GPU"))
            return {"weight"}

    LayerwiseReload(Model(), SimpleNamespace(), Repairs()).load([("weight", torch.ones(1))])
    assert seen == [False]


def test_a_vllm_that_never_adds_up_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace()
    monkeypatch.setitem(sys.modules, compat._RELOAD, module)
    with compat.without_adding_up():
        assert not vars(module)
