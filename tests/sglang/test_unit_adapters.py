"""Where a name of a LoRA adapter leads while another one comes in its place; SGLang itself is a stand-in."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from checkpoint_engine.sdk.access import RefusedError
from checkpoint_engine_sglang import compat
from checkpoint_engine_sglang.adapters import cannot_keep, without_adapters
from checkpoint_engine_sglang.messages import unpack
from checkpoint_engine_sglang.named_adapters import NamedAdapters

pytestmark = pytest.mark.pure


class LoRARef(msgspec.Struct):
    """As SGLang has it."""

    lora_id: str
    lora_name: str
    lora_path: str
    pinned: bool = False


class Lock:
    """SGLang's lock for readers and writers, as far as it is used here."""

    def __init__(self) -> None:
        self.writer_lock = asyncio.Lock()


class Registry:
    """SGLang's, with one request at most."""

    def __init__(self) -> None:
        self._registry: dict[str, LoRARef] = {}
        self._registry_lock = Lock()
        self.in_use = asyncio.Event()
        self.in_use.set()

    @property
    def num_registered_loras(self) -> int:
        return len(self._registry)

    def get_all_adapters(self) -> dict[str, LoRARef]:
        return dict(self._registry)

    def _register_adapter(self, reference: LoRARef) -> None:
        assert reference.lora_name not in self._registry
        self._registry[reference.lora_name] = reference

    async def wait_for_unload(self, identity: str) -> None:
        assert identity not in {each.lora_id for each in self._registry.values()}
        await self.in_use.wait()


def read(directory: str) -> str:
    return Path(directory, "adapter_model.safetensors").read_text()


class Served:
    """A server whose workers hold adapters by identity."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, source: Path, **arguments: Any) -> None:
        for name in ("sglang.srt.lora.lora_registry", "sglang.srt.managers.io_struct"):
            module: Any = ModuleType(name)
            module.LoRARef, module.UnloadLoRAAdapterReqInput = LoRARef, SimpleNamespace
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(compat, "request_type", lambda: SimpleNamespace)
        self.source, self.held, self.problem = source, dict[str, str](), ""
        self.registry = Registry()
        settings = {"enable_lora": True, "served_model_name": "tiny", **arguments}
        manager = SimpleNamespace(
            server_args=SimpleNamespace(**settings),
            lora_registry=self.registry,
            lora_ref_cache={},
            lora_update_lock=asyncio.Lock(),
            update_lora_adapter_communicator=self.unload,
        )
        self.adapters = NamedAdapters(manager, self.load)

    async def load(self, request: Any) -> str:
        _, order = unpack(request.zmq_handles)
        assert order is not None
        identity, _, directory, _ = order.adapter
        if not self.problem:
            self.held[identity] = read(directory)
        return self.problem

    async def unload(self, request: Any) -> None:
        del self.held[request.lora_id]

    async def take(self, weights: str, name: str = "math") -> None:
        (self.source / "adapter_model.safetensors").write_text(weights)
        (self.source / "adapter_config.json").write_text("{}")
        await self.adapters.take(name, str(self.source), weights)

    def led_to(self, name: str = "math") -> str:
        return self.held[self.registry.get_all_adapters()[name].lora_id]


def test_a_name_leads_to_the_new_one_and_the_old_one_goes_once_nobody_uses_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def replace() -> None:
        served = Served(monkeypatch, tmp_path)
        await served.take("one")
        served.registry.in_use.clear()
        await served.take("two")
        assert served.led_to() == "two"
        assert served.adapters.versions == {"math": "two"}
        assert sorted(served.held.values()) == ["one", "two"], "a request still uses the old one"
        served.registry.in_use.set()
        for _ in range(100):
            await asyncio.sleep(0.01)
            if len(served.held) == 1:
                break
        assert list(served.held.values()) == ["two"]

    asyncio.run(replace())


def test_one_that_is_not_taken_leaves_the_name_where_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def fail() -> None:
        served = Served(monkeypatch, tmp_path)
        await served.take("one")
        served.problem = "worker 1 has no memory for it"
        with pytest.raises(RefusedError, match="no memory for it"):
            await served.take("two")
        assert served.led_to() == "one"
        assert served.adapters.versions == {"math": "one"}

    asyncio.run(fail())


@pytest.mark.parametrize(
    ("arguments", "name", "why"),
    [
        ({"enable_lora": False}, "math", "--enable-lora"),
        ({"dp_size": 2}, "math", "--dp-size above 1"),
        ({"tokenizer_worker_num": 2}, "math", "--tokenizer-worker-num above 1"),
        ({"max_loaded_loras": 0}, "math", "unload one"),
        ({}, "tiny", "the served model's"),
        ({}, "", "no name"),
    ],
)
def test_what_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: dict[str, Any], name: str, why: str
) -> None:
    async def ask() -> None:
        with pytest.raises(RefusedError, match=why):
            await Served(monkeypatch, tmp_path, **arguments).take("one", name)

    asyncio.run(ask())


class Wrapper(torch.nn.Module):
    """As SGLang's before a layer: it holds the layer's parameters as well."""

    def __init__(self, base_layer: torch.nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.weight = base_layer.weight


class ExpertsWrapper(Wrapper):
    """That of experts."""


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("sglang.srt.lora.layers")
    module.BaseLayerWithLoRA, module.FusedMoEWithLoRA = Wrapper, ExpertsWrapper
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.usefixtures("layers")
def test_wrappers_stand_aside_while_weights_come() -> None:
    inner = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False))
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), inner)
    plain = [name for name, _ in model.named_modules()]
    wrapper = Wrapper(inner[0])
    inner[0] = wrapper
    wrapped = [name for name, _ in model.named_modules()]
    with without_adapters(model):
        assert [name for name, _ in model.named_modules()] == plain
        wrapper.base_layer.weight = torch.nn.Parameter(torch.ones(2, 2))
    assert inner[0] is wrapper
    assert wrapper.weight is wrapper.base_layer.weight
    assert [name for name, _ in model.named_modules()] == wrapped != plain
    assert cannot_keep(model) == ""
    model.append(ExpertsWrapper(torch.nn.Linear(2, 2)))
    assert "wrapped experts for LoRA (2)" in cannot_keep(model)
