"""Compares what a vLLM worker holds with what a checkpoint would make of it.

The checkpoint goes through vLLM's own loader and processing, layer by layer, as in a reload. But vLLM copies the result
into clones of a layer's tensors, which are then compared with the real ones and thrown away. What vLLM makes of them
besides (in plain attributes, kernels, quantisation methods) is compared by checksums that were taken before.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol, cast

import torch

from checkpoint_engine.sdk import (
    ComparisonFigures,
    ComparisonSink,
    EngineSink,
    Findings,
    Tensors,
    Update,
    WeightSink,
    WorkerError,
    listed,
    same_bytes,
)
from checkpoint_engine.sdk.plans import Checksums, HeldTensors, Reached
from checkpoint_engine_vllm import compat
from checkpoint_engine_vllm.adapters import without_adapters
from checkpoint_engine_vllm.noise import Noise
from checkpoint_engine_vllm.protocols import LayerState, Worker
from checkpoint_engine_vllm.reaching import reach_weights

__all__ = ["Rehearsal", "VllmVerifier"]

_Sources = Mapping[str, Collection[str]] | None
"""Name of a parameter or buffer -> the tensors that come into it; None where that is not known."""

_TORCHS_OWN = {"_parameters", "_buffers", "_modules"}
_DEEPEST = 3
"""Objects of vLLM within objects of vLLM: method, scheme, kernel."""
_SMALL = 1 << 20
"""Bytes of a tensor that is copied, to be put back."""
_PACKED = "weight (packed)"
_SHAPE = "weight_shape"
"""A fused layer gets one of each part; vLLM keeps any of them, and needs none."""


class Rehearsal(WeightSink, Protocol):
    """A sink that a checkpoint goes through for the sake of a comparison."""

    def sources(self) -> _Sources:
        """What comes into each tensor of the worker; asked for once it has begun."""
        ...

    def put_back(self) -> None:
        """Undoes what it wrote beside layers."""
        ...


class VllmVerifier(ComparisonSink):
    """See `checkpoint_engine.contract.sink.Verifiable`."""

    takes_parts = True

    def __init__(self, worker: Worker, engine: EngineSink, reload: Rehearsal, noise: Noise) -> None:
        """Makes one.

        Args:
            worker: What is looked at.
            engine: Its sink.
            reload: A sink of its own, through which the checkpoint goes; what is noted there counts for nothing.
            noise: What the worker's start has made up.
        """
        super().__init__(engine)
        self._worker = worker
        self._reload = reload
        self._noise = noise
        self._sources: _Sources = {}
        self._names: dict[torch.nn.Module, str] = {}
        self._models: dict[str, torch.nn.Module] = {}
        """By what stands before the names of their modules."""
        self._before: dict[str, HeldTensors] = {}
        """All that each model holds."""
        self._held: dict[torch.nn.Module, _Held] = {}
        self._in_place: dict[torch.nn.Module, _Contents] = {}
        """What vLLM overwrites where it is: biases as they come, attention once all other layers are complete."""
        self._small: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Tensors besides parameters and buffers that a loader may overwrite, and their values."""
        self._packed: dict[torch.nn.Module, torch.Tensor] = {}
        """Checksums of weights that only a CPU kernel holds."""
        self._checksums = Checksums()
        self._findings = Findings()
        self._processed: set[torch.nn.Module] = set()
        self._unwatch: Callable[[], None] | None = None

    def running(self) -> AbstractContextManager[object]:
        """What loaders do not know is not compared."""
        return without_adapters(compat.target_model(self._worker))

    def check(self, update: Update) -> None:
        """The reload does."""

    def open(self, update: Update) -> None:
        """Checks the announced tensors, as an update does, and notes what will be overwritten.

        Raises:
            WeightsRejectedError: they are not the model's.
        """
        draft = compat.draft_model(self._worker)
        for prefix, model in (("", compat.target_model(self._worker)), ("draft_model.", draft)):
            if model is not None:
                self._models[prefix] = model
                for name, module in compat.modules_by_name(model).items():
                    self._names.setdefault(module, prefix + name)
        self._before = {
            prefix: HeldTensors(reach_weights(model), self._checksums) for prefix, model in self._models.items()
        }
        self._held = {module: _Held(module) for module in self._names}
        self._small = [
            (each.tensor, _clone(each.tensor))
            for model in self._models.values()
            for each in reach_weights(model)
            if not each.registered and _is_plain(each.tensor) and each.tensor.nbytes <= _SMALL
        ]
        self._packed = {module: packed for module in self._names if (packed := self._unpack(module)) is not None}
        self._in_place = {module: _Contents(module) for module in self._names if compat.is_attention(module)}
        self._unwatch = compat.watch_processing(self._compare_layer)
        self._reload.begin(replace(update, reload="loader"))
        self._sources = self._reload.sources()
        for module in self._names:
            contents = _Contents(module, only_registered=True)
            if contents and module not in self._in_place:
                self._in_place[module] = contents

    def take(self, tensors: Tensors) -> None:
        """Gives tensors to vLLM's loaders; layers that are complete are compared."""
        self._reload.load(tensors)

    def complete(self, update: Update) -> ComparisonFigures:
        """Compares what vLLM completes last, and tells what was found.

        Raises:
            WorkerError: what the engine holds could not be put back.
        """
        try:
            self._reload.finish()
            for module, contents in self._in_place.items():
                if module in self._processed or compat.is_attention(module):
                    self._processed.add(module)
                    for name, held, expected in contents.compare():
                        self._findings.note(f"{self._names[module]}.{name}", held, expected)
            for module in self._packed.keys() - self._processed:  # tied to another module, and packed by itself
                self._compare_packed(module)
            for prefix, model in self._models.items():
                self._compare_beside(prefix, reach_weights(model), last=True)
            if not update.partial:
                self._note_left_out()
        finally:
            self._end()
        self._check_put_back()
        for name in self._noise.left() if not update.partial else ():
            if name not in self._findings.different:
                self._findings.leave_out(name, "it holds the noise of the start, and the checkpoint has nothing for it")
        return self._findings.figures()

    def restore(self) -> bool:
        """Puts everything back."""
        try:
            self._reload.abort()
        finally:
            self._end()
        return True

    # -- inside

    def _end(self) -> None:
        if self._unwatch is not None:
            self._unwatch()
            self._unwatch = None
        self._reload.put_back()
        for contents in self._in_place.values():
            contents.restore()
        for held in self._held.values():
            held.restore()
        for tensor, before in self._small:
            if not same_bytes(tensor, before):
                tensor.data.copy_(before)
        self._held, self._in_place, self._packed, self._small = {}, {}, {}, []

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
            for prefix, model in self._models.items():
                self._compare_beside(prefix, reach_weights(model, only=module))
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
        if not isinstance(weight, torch.Tensor) or weight.is_meta:  # a head that a pooling model has no use for
            return None
        if weight.numel() and not hasattr(module, "cpu_linear"):
            return None
        # Times one and plus zeros: what a kernel gives for the identity are its weights.
        dtype = getattr(module, "params_dtype", None) or self._worker.model_config.dtype
        identity = torch.eye(width, dtype=dtype, device="cpu")
        with compat.engine_context(self._worker):
            return self._checksums.of(cast("Any", method).apply(module, identity))

    def _compare_beside(self, prefix: str, reached: Iterable[Reached], *, last: bool = False) -> None:
        """Compares what modules hold besides the parameters and buffers that vLLM puts back.

        Args:
            prefix: Of the model's names.
            reached: What is held now.
            last: Whether all layers are complete: what still is not as it was, a loader has written where it lies.
        """
        found = [
            each
            for each in reached
            if (last or not (each.registered or each.tensor.is_meta))  # made while the rest of the layer was not there
            and self._names.get(module := self._module(prefix, each)) == prefix + each.module  # not its other name
            and each.own not in self._in_place.get(module, ())
        ]
        new = [each for each in found if not each.registered and self._module(prefix, each) not in self._processed]
        self._findings.tensors += len(new)
        self._findings.nbytes += sum(each.tensor.nbytes for each in new)
        known = set(self._findings.different)
        different = [prefix + each.path for each in self._before[prefix].differing(found)]
        self._findings.different += [path for path in different if path not in known]

    def _module(self, prefix: str, reached: Reached) -> torch.nn.Module:
        return self._models[prefix].get_submodule(reached.module)

    def _note_left_out(self) -> None:
        done = {tensor.data_ptr() for module in self._processed for tensor in _all_tensors(module).values()}
        for module, name in self._names.items():
            for own, tensor in _all_tensors(module, only_registered=True).items():
                path = f"{name}.{own}" if name else own
                if module in self._processed or not tensor.numel() or tensor.data_ptr() in done:
                    continue
                sources = None if self._sources is None else self._sources.get(path, ())
                if sources:
                    self._findings.leave_out(path, f"vLLM's loader fills it from {min(sources)!r}, and was not seen to")
                elif isinstance(tensor, torch.nn.Parameter) and sources is None:
                    self._findings.leave_out(path, "it is not known whether the checkpoint has something for it")
                elif isinstance(tensor, torch.nn.Parameter):
                    self._findings.not_compared.append(f"{path} (the checkpoint has nothing for it)")

    def _check_put_back(self) -> None:
        changed = [
            prefix + each.path
            for prefix, model in self._models.items()
            for each in self._before[prefix].differing(reach_weights(model))
        ]
        if changed:
            self._engine.life.spoil()
            raise WorkerError(
                f"the comparison has changed what the engine holds ({listed(changed)}), and could not put it back; a "
                "complete update does. Please report this"
            )


class _Held:
    """What a module, and the objects of vLLM that process it, hold besides parameters and buffers; to be put back."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._cached = [
            (owner, {name: value for name, value in vars(owner).items() if name not in _TORCHS_OWN})
            for owner in _owners(module)
        ]

    def restore(self) -> None:
        """Puts everything back."""
        for owner, before in self._cached:
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


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_mkldnn and tensor.numel() > 0


def _clone(tensor: torch.Tensor) -> torch.Tensor:
    clone = tensor.detach().clone()
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(clone, requires_grad=False)
    return clone


def _first_of(module: torch.nn.Module, *names: str) -> int | None:
    return next((int(getattr(module, name)) for name in names if hasattr(module, name)), None)
