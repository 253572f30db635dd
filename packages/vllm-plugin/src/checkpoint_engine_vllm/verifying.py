"""Compares what a vLLM worker holds with what a checkpoint would make of it.

The checkpoint goes through vLLM's own loader and processing, layer by layer, as in a reload. But vLLM copies the result
into clones of a layer's tensors, which are then compared with the real ones and thrown away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from checkpoint_engine.engine.adapter import Adapter, Update
from checkpoint_engine.engine.findings import Findings, same_bytes
from checkpoint_engine_vllm import compat
from checkpoint_engine_vllm.protocols import LayerState, Worker

_TORCHS_OWN = {"_parameters", "_buffers", "_modules"}
_PACKED = "weight (packed)"


class Verifier:
    """See `checkpoint_engine.engine.adapter.Verifiable`."""

    def __init__(self, worker: Worker, adapter: Adapter) -> None:
        """Makes one; `adapter` is not the worker's own, so that nothing is noted there."""
        self._worker = worker
        self._adapter = adapter
        self._names: dict[torch.nn.Module, str] = {}
        self._held: dict[torch.nn.Module, _Held] = {}
        self._last: dict[torch.nn.Module, _Contents] = {}
        """Modules that vLLM completes in place, once all others are complete."""
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
        self._last = {
            module: _Contents(module)
            for module in self._names
            if compat.is_attention(module) or _is_packed_and_tied(module)
        }
        self._unwatch = compat.watch_processing(self._compare_layer)
        self._adapter.begin(replace(update, reload="loader"))

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
            for module, contents in self._last.items():
                self._processed.add(module)
                for name, held, expected in contents.compare(self._held[module]):
                    self._findings.note(f"{self._names[module]}.{name}", held, expected)
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
        for contents in self._last.values():
            contents.restore()
        for held in self._held.values():
            held.restore()
        self._held, self._last = {}, {}

    def _compare_layer(self, process: Callable[[], None], module: torch.nn.Module, state: LayerState) -> None:
        """Stands in for vLLM's processing of a layer whose weights are all there."""
        real = state.kernel_tensors
        padded = " (padded)" if state.load_numel < (state.load_numel_total or 0) else ""
        clones = tuple({name: _clone(tensor) for name, tensor in tensors.items()} for tensors in real)
        shape = compat.checkpoint_shape(state, "weight")
        packed = _unpacked(module, shape)
        state.kernel_tensors = (clones[0], clones[1])
        restore = compat.keep_state(state)
        try:
            process()
            expected = _unpacked(module, shape)
        finally:
            restore()
            state.kernel_tensors = real
            held = self._held.get(module)
            if held is not None:
                held.restore()
        compat.place_kernel_tensors(module, state)
        self._processed.add(module)
        name = self._names.get(module, type(module).__name__)
        for tensors, made in zip(real, clones, strict=True):
            for own, tensor in tensors.items():
                if tensor.numel():
                    self._findings.note(f"{name}.{own}{padded}", tensor, made[own])
        if packed is not None and expected is not None:
            self._findings.note(f"{name}.{_PACKED}", packed, expected)

    def _left_out(self) -> Iterable[str]:
        done = {parameter.data_ptr() for module in self._processed for parameter in module.parameters(recurse=False)}
        for module, name in self._names.items():
            if module not in self._processed:
                for own, parameter in module.named_parameters(recurse=False):
                    if parameter.numel() and parameter.data_ptr() not in done:
                        yield f"{name}.{own}"


class _Held:
    """What a module and its quantisation method hold besides parameters and buffers, to be put back."""

    def __init__(self, module: torch.nn.Module) -> None:
        method: object = getattr(module, "quant_method", None)
        owners = [module] if method is None else [module, method]
        self._kept = [
            (owner, {name: value for name, value in vars(owner).items() if name not in _TORCHS_OWN})
            for owner in owners
            if hasattr(owner, "__dict__")
        ]

    def get(self, name: str) -> Any:  # noqa: ANN401 - whatever vLLM puts there
        """An attribute of the module, as it was."""
        return self._kept[0][1].get(name)

    def restore(self) -> None:
        """Puts everything back."""
        for owner, before in self._kept:
            now = vars(owner)
            for name in [name for name in now if name not in before and name not in _TORCHS_OWN]:
                del now[name]
            now.update(before)


class _Contents:
    """The values of a module's tensors, of whatever kind, before vLLM writes to them in place."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._before = {name: (tensor, _clone(tensor)) for name, tensor in _all_tensors(module).items()}

    def compare(self, held: _Held) -> Iterable[tuple[str, torch.Tensor, torch.Tensor]]:
        """Name, old and new value of each tensor."""
        now = _all_tensors(self._module)
        for name, (_, before) in self._before.items():
            if name in now and before.numel():
                yield name, before, now[name]
        if _is_packed_and_tied(self._module):
            shape = self._module.get_parameter("weight").shape
            old, new = _multiply(held.get("cpu_linear"), self._module, shape), _unpacked(self._module, shape)
            if old is not None and new is not None:
                yield _PACKED, old, new

    def restore(self) -> None:
        """Writes the old values back where they have changed."""
        for tensor, before in self._before.values():
            if not same_bytes(tensor, before):
                tensor.data.copy_(before)


def _all_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, buffers and plain tensors that carry weights; no KV cache."""
    plain = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, torch.Tensor) and not name.startswith("kv_cache")
    }
    return {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False)), **plain}


def _clone(tensor: torch.Tensor) -> torch.Tensor:
    clone = tensor.detach().clone()
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(clone, requires_grad=False)
    return clone


# -- what the CPU's kernels pack away


def _is_packed_and_tied(module: torch.nn.Module) -> bool:
    """Whether it computes with a packed copy of weights that are another module's."""
    weight = getattr(module, "weight", None)
    return hasattr(module, "cpu_linear") and isinstance(weight, torch.Tensor) and bool(weight.numel())


def _unpacked(module: torch.nn.Module, shape: Sequence[int] | None) -> torch.Tensor | None:
    """Weights that only a CPU kernel holds; None where there is none."""
    return _multiply(getattr(module, "cpu_linear", None), module, shape)


def _multiply(kernel: Any, module: torch.nn.Module, shape: Sequence[int] | None) -> torch.Tensor | None:  # noqa: ANN401
    # Times one and plus zeros: what the kernel gives for the identity are its weights, bit by bit.
    weight = getattr(module, "weight", None)
    if kernel is None or shape is None or not isinstance(weight, torch.Tensor) or weight.device.type != "cpu":
        return None
    return kernel(torch.eye(shape[1], dtype=weight.dtype, device="cpu"), weight, None)
