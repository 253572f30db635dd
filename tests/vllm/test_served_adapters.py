"""LoRA adapters that come while vLLM serves, where its workers fail; vLLM itself is a stand-in."""

from __future__ import annotations

import asyncio
import os
import sys
from argparse import Namespace
from collections import defaultdict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import anyio
import msgspec
import pytest

from checkpoint_engine.sdk.access import RefusedError
from checkpoint_engine_vllm.adapters import take_adapter
from checkpoint_engine_vllm.served_adapters import ServedAdapters


class LoRARequest(msgspec.Struct):
    """As vLLM has it."""

    lora_name: str
    lora_int_id: int
    lora_path: str
    load_inplace: bool = False


def read(directory: str) -> str:
    return Path(directory, "adapter_model.safetensors").read_text()


class Engine:
    """Two workers that read an adapter as vLLM's do; the second may fail at it."""

    def __init__(self) -> None:
        self.vllm_config = SimpleNamespace(lora_config=object())
        self.held: list[dict[int, str]] = [{}, {}]
        self.failures = 0

    async def collective_rpc(self, method: str, *, args: tuple[str, int, str], **patience: float) -> list[str]:
        assert (method, *patience) == ("checkpoint_engine_adapter", "timeout")
        return [take_adapter(Worker(self, number), *args) for number in (0, 1)]


class Worker:
    """One of them."""

    def __init__(self, engine: Engine, number: int) -> None:
        self.engine, self.number = engine, number

    def add_lora(self, request: LoRARequest) -> None:
        assert request.load_inplace
        if self.number and self.engine.failures:
            self.engine.failures -= 1
            raise RuntimeError("no memory for it")
        self.engine.held[self.number][request.lora_int_id] = read(request.lora_path)

    def remove_lora(self, number: int) -> None:
        self.engine.held[self.number].pop(number, None)


class Served:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **arguments: Any) -> None:
        module = ModuleType("vllm.lora.request")
        module.LoRARequest = LoRARequest  # pyright: ignore[reportAttributeAccessIssue]
        for name in ("vllm", "vllm.lora"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setitem(sys.modules, module.__name__, module)
        numbers = iter(range(1, 100))
        self.models = SimpleNamespace(
            lora_requests={},
            lora_id_counter=SimpleNamespace(inc=lambda _: next(numbers)),
            lora_resolver_lock=defaultdict(asyncio.Lock),
            is_base_model=lambda name: name == "tiny",
        )
        self.engine, self.source = Engine(), tmp_path
        self.adapters = ServedAdapters(SimpleNamespace(openai_serving_models=self.models), Namespace(**arguments))

    def take(self, weights: str, name: str = "math") -> None:
        (self.source / "adapter_model.safetensors").write_text(weights)
        (self.source / "adapter_config.json").write_text("{}")
        anyio.run(self.adapters.take, self.engine, name, str(self.source), weights)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Served:
    return Served(monkeypatch, tmp_path)


def test_every_path_that_was_told_leads_to_the_newest_weights(served: Served) -> None:
    """A request that has begun keeps its path, by which vLLM may read the adapter again."""
    told = []
    for weights in ("one", "two", "three"):
        served.take(weights)
        request = served.models.lora_requests["math"]
        told.append(request.lora_path)
        assert (request.lora_int_id, request.load_inplace) == (1, False)
        assert served.engine.held == [{1: weights}] * 2
        assert {read(path) for path in told} == {weights}
    assert len({*told}) == 3, "vLLM's caches go by the path"
    home = Path(told[0]).parent
    assert [each.name for each in home.iterdir() if each.name.startswith("files")] == ["files-2"]


def test_if_one_worker_does_not_take_it_all_keep_the_old_one(served: Served) -> None:
    served.take("one")
    served.engine.failures = 1
    with pytest.raises(RefusedError, match="no memory for it"):
        served.take("two")
    assert served.engine.held == [{1: "one"}] * 2
    assert read(served.models.lora_requests["math"].lora_path) == "one"
    assert served.adapters.versions == {"math": "one"}
    served.take("two")
    assert served.engine.held == [{1: "two"}] * 2


def test_what_cannot_be_put_back_is_no_longer_served(served: Served) -> None:
    served.take("one")
    served.engine.failures = 2
    with pytest.raises(RefusedError):
        served.take("two")
    assert served.models.lora_requests == served.adapters.versions == {}
    served.take("three")
    assert served.engine.held[0][served.models.lora_requests["math"].lora_int_id] == "three"


def test_a_new_one_that_fails_leaves_nothing(served: Served) -> None:
    served.models.lora_requests["math"] = before = LoRARequest("math", 77, "/of/a/file")
    served.engine.failures = 1
    with pytest.raises(RefusedError):
        served.take("one")
    assert served.models.lora_requests == {"math": before}
    assert served.engine.held == [{}, {}]


def test_what_is_refused(served: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="the served model's"):
        served.take("one", name="tiny")
    with pytest.raises(RefusedError, match="no LoRA adapter that can be read"):
        anyio.run(served.adapters.take, served.engine, "math", str(tmp_path / "nowhere"), "")
    pipes = tmp_path / "pipes"
    pipes.mkdir()
    os.mkfifo(pipes / "adapter_model.safetensors")  # whose other end nobody opens
    with pytest.raises(RefusedError, match="is not a file of the user"):
        anyio.run(served.adapters.take, served.engine, "math", str(pipes), "")
    with pytest.raises(RefusedError, match="--api-server-count 1"):
        Served(monkeypatch, tmp_path, api_server_count=2).take("one")
