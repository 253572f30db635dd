"""While vLLM's loader runs, it does not add up what unfinished layers hold; with a stand-in for vLLM's module."""

from __future__ import annotations

import sys
from contextlib import suppress
from types import SimpleNamespace

import pytest

from checkpoint_engine_vllm import compat


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


def test_a_vllm_that_never_adds_up_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace()
    monkeypatch.setitem(sys.modules, compat._RELOAD, module)
    with compat.without_adding_up():
        assert not vars(module)
