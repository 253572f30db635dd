"""Compares what a vLLM worker holds with what a checkpoint would make of it.

The checkpoint goes through vLLM's own loader and processing, layer by layer, as in a reload. But vLLM copies the result
into clones of a layer's tensors, which are then compared with the real ones and thrown away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch

from checkpoint_engine.engine.adapter import Adapter, Update
from checkpoint_engine.engine.findings import Findings, same_bytes
from checkpoint_engine.reload.proof import Checksums
from checkpoint_engine_vllm import compat
from checkpoint_engine_vllm.protocols import LayerState, Worker

_TORCHS_OWN = {"_parameters", "_buffers", "_modules"}
_DEEPEST = 3
"""Objects of vLLM within objects of vLLM: method, scheme, kernel."""
_PACKED = "weight (packed)"
_SHAPE = "weight_shape"
"""A fused layer gets one of each part; vLLM keeps any of them, and needs none."""


class Verifier:
    """See `checkpoint_engine.engine.adapter.Verifiable`."""

    def __init__(self, worker: Worker, adapter: Adapter) -> None:
        """Makes one; `adapter` is not the worker's own, so that nothing is noted there."""
        self._worker = worker
        self._adapter = adapter
        self._names: dict[torch.nn.Module, str] = {}
        self._held: dict[torch.nn.Module, _Held] = {}
        self._in_place: dict[torch.nn.Module, _Contents] = {}
        """What vLLM overwrites where it is: biases as they come, attention once all other layers are complete."""
        self._packed: dict[torch.nn.Module, torch.Tensor] = {}
        """Checksums of weights that only a CPU kernel holds."""
        self._findings = Findings()
        self._processed: set[torch.nn.Module] = set()
        self._unwatch: Callable[[], None] | None = None

    def begin(self, update: Update) -> None:
        """Checks the announced tensors, as an update does.

        Raises:
            WeightsRejectedError: they are not the model's.
        """
        self._findings, self._processed = Findings(), set()
        draft = compat.draft_model(self._worker)
        self._names = {}
        for prefix, model in (("", compat.target_model(self._worker)), ("draft_model.", draft)):
            if model is not None:
                for name, module in compat.modules_by_name(model).items():
                    self._names.setdefault(module, prefix + name)
        self._held = {module: _Held(module) for module in self._names}
        self._packed = {module: packed for module in self._names if (packed := self._unpack(module)) is not None}
        self._in_place = {module: _Contents(module) for module in self._names if compat.is_attention(module)}
        self._unwatch = compat.watch_processing(self._compare_layer)
        self._adapter.begin(replace(update, reload="loader"))
        for module in self._names:
            contents = _Contents(module, only_registered=True)
            if contents and module not in self._in_place:
                self._in_place[module] = contents

    def load(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Gives tensors to vLLM's loaders; layers that are complete are compared."""
        self._adapter.load(tensors)

    def finish(self) -> Mapping[str, str | int | float]:
        """Compares what vLLM completes last, and tells what was found.

        Raises:
            WeightsRejectedError: tensors are missing.
        """
        try:
            self._adapter.finish()
            for module, contents in self._in_place.items():
                if module in self._processed or compat.is_attention(module):
                    self._processed.add(module)
                    for name, held, expected in contents.compare():
                        self._findings.note(f"{self._names[module]}.{name}", held, expected)
            for module in self._packed.keys() - self._processed:  # tied to another module, and packed by itself
                self._compare_packed(module)
        finally:
            self._end()
        self._findings.not_compared = [f"{name} (the checkpoint has nothing for it)" for name in self._left_out()]
        return self._findings.details()

    def abort(self) -> bool:
        """Ends the comparison; the engine holds what it held."""
        try:
            self._adapter.abort()
        finally:
            self._end()
        return True

    # -- inside

    def _end(self) -> None:
        if self._unwatch is not None:
            self._unwatch()
            self._unwatch = None
        for contents in self._in_place.values():
            contents.restore()
        for held in self._held.values():
            held.restore()
        self._held, self._in_place, self._packed = {}, {}, {}

    def _compare_layer(self, process: Callable[[], None], module: torch.nn.Module, state: LayerState) -> None:
        """Stands in for vLLM's processing of a layer whose weights are all there."""
        real = state.kernel_tensors
        padded = " (padded)" if state.load_numel < (state.load_numel_total or 0) else ""
        clones = tuple({name: _clone(tensor) for name, tensor in tensors.items()} for tensors in real)
        state.kernel_tensors = (clones[0], clones[1])
        restore = compat.keep_state(state)
        try:
            process()
            if module in self._packed:
                self._compare_packed(module)
        finally:
            restore()
            state.kernel_tensors = real
            held = self._held.get(module)
            if held is not None:
                held.restore()
        compat.place_kernel_tensors(module, state)
        self._processed.add(module)
        name = self._names.get(module, type(module).__name__)
        in_place = self._in_place.get(module, ())
        for tensors, made in zip(real, clones, strict=True):
            for own, tensor in tensors.items():
                if tensor.numel() and own not in in_place and own != _SHAPE:
                    self._findings.note(f"{name}.{own}{padded}", tensor, made[own])

    def _compare_packed(self, module: torch.nn.Module) -> None:
        packed = self._unpack(module)
        if packed is not None:
            self._findings.note(f"{self._names[module]}.{_PACKED}", self._packed[module], packed)

    def _unpack(self, module: torch.nn.Module) -> torch.Tensor | None:
        """The checksum of weights that only a CPU kernel holds; None where there are none."""
        weight, method = getattr(module, "weight", None), getattr(module, "quant_method", None)
        width = _first_of(module, "input_size_per_partition", "input_size", "embedding_dim")
        if not compat.on_cpu(self._worker) or not hasattr(method, "apply") or width is None:
            return None
        if not isinstance(weight, torch.Tensor) or (weight.numel() and not hasattr(module, "cpu_linear")):
            return None
        # Times one and plus zeros: what a kernel gives for the identity are its weights.
        identity = torch.eye(width, dtype=self._worker.model_config.dtype, device="cpu")
        with compat.engine_context(self._worker):
            return Checksums().of(cast("Any", method).apply(module, identity))

    def _left_out(self) -> Iterable[str]:
        done = {parameter.data_ptr() for module in self._processed for parameter in module.parameters(recurse=False)}
        for module, name in self._names.items():
            if module not in self._processed:
                for own, parameter in module.named_parameters(recurse=False):
                    if parameter.numel() and parameter.data_ptr() not in done:
                        yield f"{name}.{own}"


class _Held:
    """What a module, and the objects of vLLM that process it, hold besides parameters and buffers; to be put back."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._kept = [
            (owner, {name: value for name, value in vars(owner).items() if name not in _TORCHS_OWN})
            for owner in _owners(module)
        ]

    def restore(self) -> None:
        """Puts everything back."""
        for owner, before in self._kept:
            now = vars(owner)
            for name in [name for name in now if name not in before and name not in _TORCHS_OWN]:
                del now[name]
            now.update(before)


def _owners(module: torch.nn.Module) -> list[object]:
    """A module, its quantisation method, and what these keep of the kind; no configuration, no other module."""
    found: dict[int, object] = {id(module): module}
    latest: list[object] = [module]
    for _ in range(_DEEPEST):
        held = [value for owner in latest for value in vars(owner).values()]
        latest = [
            value
            for value in held
            if type(value).__module__.startswith("vllm.")
            and hasattr(value, "__dict__")
            and not isinstance(value, (torch.nn.Module, torch.Tensor, type))
            and not type(value).__name__.endswith("Config")
            and id(value) not in found
        ]
        found.update((id(value), value) for value in latest)
    return list(found.values())


class _Contents:
    """The values of a module's tensors before vLLM writes to them in place."""

    def __init__(self, module: torch.nn.Module, *, only_registered: bool = False) -> None:
        """Copies those that have data: parameters and buffers, and plain tensors unless `only_registered`."""
        self._module = module
        self._before = {
            name: (tensor, _clone(tensor))
            for name, tensor in _all_tensors(module, only_registered=only_registered).items()
            if not tensor.is_meta and tensor.numel()
        }

    def __bool__(self) -> bool:
        return bool(self._before)

    def __contains__(self, name: object) -> bool:
        return name in self._before

    def compare(self) -> Iterable[tuple[str, torch.Tensor, torch.Tensor]]:
        """Name, old and new value of each tensor."""
        now = _all_tensors(self._module)
        return ((name, before, now[name]) for name, (_, before) in self._before.items() if name in now)

    def restore(self) -> None:
        """Writes the old values back where they have changed."""
        for tensor, before in self._before.values():
            if not same_bytes(tensor, before):
                tensor.data.copy_(before)


def _all_tensors(module: torch.nn.Module, *, only_registered: bool = False) -> dict[str, torch.Tensor]:
    """Parameters, buffers and plain tensors that carry weights; no KV cache."""
    plain = {
        name: value
        for name, value in vars(module).items()
        if not only_registered and isinstance(value, torch.Tensor) and not name.startswith("kv_cache")
    }
    return {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False)), **plain}


def _clone(tensor: torch.Tensor) -> torch.Tensor:
    clone = tensor.detach().clone()
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(clone, requires_grad=False)
    return clone


def _first_of(module: torch.nn.Module, *names: str) -> int | None:
    return next((int(getattr(module, name)) for name in names if hasattr(module, name)), None)
