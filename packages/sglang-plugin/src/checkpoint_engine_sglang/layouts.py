"""What a model's layers look like before their first weights: the layout that its loader fills.

SGLang's processing of weights (packing, transposing, requantising) replaces it, and keeps no way back. So it is written
down when SGLang has made a model, in a few hundred bytes a parameter and without its data.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from checkpoint_engine_sglang import compat

__all__ = [
    "LayerLayout",
    "TensorLayout",
    "deriving_nothing",
    "first_values_of",
    "layout_of",
    "layouts_of",
    "owners",
    "remember",
    "without_data",
]

_SMALL, _AT_ONCE = 1 << 16, 1 << 22
"""Elements: what is no larger than the first is kept whole, and else only if all its elements are the same; so many of
them are looked at at once."""
_PLAIN = (bool, int, float, str, torch.dtype, type(None))


@dataclass(frozen=True)
class TensorLayout:
    """A parameter or buffer as it was made."""

    kind: type
    attributes: dict[str, object]
    """That SGLang's loaders and processing go by, such as `weight_loader` and `format_ue8m0`."""
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    initial: torch.Tensor | None
    """What it holds where a checkpoint brings nothing for it; None if that is nothing in particular."""

    @property
    def nbytes(self) -> int:
        """Of its elements."""
        return self.shape.numel() * self.dtype.itemsize

    def make(self, device: torch.device | str) -> torch.Tensor:
        """A new one, with the values that it had."""
        # SGLang's schedulers run in inference mode, and threads of its loaders do not: they could not write there.
        with torch.inference_mode(mode=False):
            memory = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)
            if self.initial is not None and not memory.is_meta:
                memory.copy_(self.initial)
            if not issubclass(self.kind, torch.nn.Parameter):
                return memory
            made: Any = cast("Any", torch.Tensor)._make_subclass(self.kind, memory, False)  # noqa: SLF001 - constructors differ
        vars(cast("object", made)).update(self.attributes)
        return made

    @classmethod
    def of(cls, tensor: torch.Tensor, *, keep_values: bool = True) -> TensorLayout:
        """Describes a tensor."""
        attributes = dict(vars(tensor)) if isinstance(tensor, torch.nn.Parameter) else {}
        initial = _initial(tensor.data) if keep_values else None
        return cls(type(tensor), attributes, tensor.shape, tensor.stride(), tensor.dtype, initial)


@dataclass(frozen=True)
class LayerLayout:
    """A layer as it was made."""

    parameters: dict[str, TensorLayout | None]
    buffers: dict[str, TensorLayout | None]
    plain: tuple[dict[str, object], ...]
    """Numbers, words and switches of each of its `owners`."""

    @property
    def slots(self) -> Iterator[tuple[str, TensorLayout]]:
        """All that hold something."""
        yield from (
            (name, slot) for kind in (self.parameters, self.buffers) for name, slot in kind.items() if slot is not None
        )

    def is_kept(self, module: torch.nn.Module) -> bool:
        """Whether the layer's tensors still look as they did."""
        parameters, buffers = compat.tensors_of(module)
        return self.parameters.keys() == parameters.keys() and all(
            _looks_like(held.get(name), slot)
            for kind, held in ((self.parameters, parameters), (self.buffers, buffers))
            for name, slot in kind.items()
        )


def owners(module: torch.nn.Module) -> Iterator[object]:
    """Whoever remembers something of the way in which a layer was processed."""
    yield module
    for name in ("quant_method", "scheme"):
        owner: object = vars(module).get(name)
        if owner is not None:
            yield owner
            # One that does part of the work for it, as FP8's does for experts of four bits.
            remembered: dict[str, object] = vars(owner)
            yield from (held for held in remembered.values() if compat.processes_weights(held))


_cache: WeakKeyDictionary[torch.nn.Module, dict[str, LayerLayout]] = WeakKeyDictionary()
"""Model -> name of a layer -> its layout."""


_first_values: WeakKeyDictionary[torch.nn.Module, dict[str, torch.Tensor]] = WeakKeyDictionary()
"""Model -> name of a parameter or buffer -> its first value."""


def remember(model: torch.nn.Module) -> None:
    """Writes down what a model is like that SGLang has just made."""
    _cache[model] = {
        name: layout_of(module) for name, module, _ in compat.processed_modules(model) if not _is_unfinished(module)
    }
    _first_values[model] = {
        f"{name}.{own}".lstrip("."): value
        for name, module in compat.named_modules(model)
        if name not in _cache[model]
        for own, tensor in compat.kept_tensors(module).items()
        if (value := _initial(tensor)) is not None
    }


def first_values_of(model: torch.nn.Module) -> Mapping[str, torch.Tensor]:
    """What its parameters and buffers held at first, where that is known, outside of layers that SGLang processes."""
    return _first_values.get(model, {})


def layouts_of(model: torch.nn.Module) -> dict[str, LayerLayout]:
    """Of the layers that SGLang processes; empty if the plugin was not there when it made this model."""
    return _cache.get(model, {})


@contextlib.contextmanager
def without_data(model: torch.nn.Module) -> Generator[dict[str, torch.Tensor]]:
    """Gives a model parameters and buffers without data, in the layout that its loader fills; takes them away again.

    Yields them by name, of those that share memory the first. Whatever a loader does to the model meanwhile, nothing of
    it has changed afterwards. What a model derives from its weights is not derived.
    """
    layouts = layouts_of(model)
    before = [(module, dict(vars(module))) for _, module in compat.named_modules(model)]
    bare = _Bare()
    try:
        compat.forget_parameters(model)
        for name, module in compat.named_modules(model):
            held, layout = vars(module), layouts.get(name)
            held["_modules"] = dict(held["_modules"])  # some loaders remove what they need no more
            if layout is not None and not layout.is_kept(module):
                for slot_name, _ in layout.slots:
                    held.pop(slot_name, None)
                held["_parameters"] = bare.made(name, layout.parameters)
                held["_buffers"] = bare.made(name, layout.buffers)
            else:
                parameters, buffers = compat.tensors_of(module)
                held["_parameters"], held["_buffers"] = bare.of(name, parameters), bare.of(name, buffers)
        with deriving_nothing(model):
            yield bare.named
    finally:
        for module, held in before:
            vars(module).clear()
            vars(module).update(held)


@contextlib.contextmanager
def deriving_nothing(model: torch.nn.Module) -> Generator[None]:
    """Keeps loaders from deriving what a model has besides its weights: they may not all be there."""
    modules = [module for _, module in compat.named_modules(model) if hasattr(module, "post_load_weights")]
    try:
        for module in modules:
            vars(module)["post_load_weights"] = _derive_nothing
        yield
    finally:
        for module in modules:
            vars(module).pop("post_load_weights", None)


class _Bare:
    """Tensors without data."""

    def __init__(self) -> None:
        self.named: dict[str, torch.Tensor] = {}
        self._made: dict[int, torch.Tensor] = {}

    def made(self, prefix: str, slots: dict[str, TensorLayout | None]) -> dict[str, torch.Tensor | None]:
        return {name: None if slot is None else self._note(prefix, name, slot) for name, slot in slots.items()}

    def of(self, prefix: str, tensors: Mapping[str, torch.Tensor | None]) -> dict[str, torch.Tensor | None]:
        found: dict[str, torch.Tensor | None] = {}
        for name, tensor in tensors.items():
            if tensor is not None and id(tensor) not in self._made:
                self._made[id(tensor)] = self._note(prefix, name, TensorLayout.of(tensor, keep_values=False))
            found[name] = None if tensor is None else self._made[id(tensor)]
        return found

    def _note(self, prefix: str, name: str, slot: TensorLayout) -> torch.Tensor:
        tensor = slot.make("meta")
        self.named[f"{prefix}.{name}".lstrip(".")] = tensor
        return tensor


def _derive_nothing(*_: object, **__: object) -> None: ...


def layout_of(module: torch.nn.Module) -> LayerLayout:
    """What a layer is like now."""

    def describe(tensors: Mapping[str, torch.Tensor | None]) -> dict[str, TensorLayout | None]:
        return {name: None if tensor is None else TensorLayout.of(tensor) for name, tensor in tensors.items()}

    parameters, buffers = compat.tensors_of(module)
    return LayerLayout(describe(parameters), describe(buffers), tuple(_plain(owner) for owner in owners(module)))


def _plain(owner: object) -> dict[str, object]:
    """What an object holds that can neither share memory nor be changed in place."""
    return {name: value for name, value in vars(owner).items() if isinstance(value, _PLAIN)}


def _initial(tensor: torch.Tensor) -> torch.Tensor | None:
    if tensor.is_meta or not tensor.numel():
        return None
    first = tensor.as_strided((1,), (1,), tensor.storage_offset())
    if _is_all(tensor, first):
        return first.to("cpu", copy=True).reshape(())
    return tensor.to("cpu", copy=True) if tensor.numel() <= _SMALL else None


def _is_all(tensor: torch.Tensor, first: torch.Tensor) -> bool:
    """Whether all its elements are the same."""
    if tensor.numel() <= _AT_ONCE:
        return torch.equal(_bits(tensor), _bits(first).expand(tensor.numel(), -1))
    rows = max(1, _AT_ONCE * tensor.shape[0] // tensor.numel())
    return all(_is_all(part, first) for part in (torch.split(tensor, rows) if tensor.shape[0] > 1 else tensor.unbind()))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Not all dtypes can be compared, and what was never written may be no number."""
    return tensor.flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8).reshape(tensor.numel(), -1)


def _looks_like(tensor: torch.Tensor | None, slot: TensorLayout | None) -> bool:
    if tensor is None or slot is None:
        return tensor is slot
    return (
        type(tensor) is slot.kind
        and (tensor.shape, tensor.stride(), tensor.dtype) == (slot.shape, slot.stride, slot.dtype)
        and all(name in vars(tensor) for name in slot.attributes)
    )


def _is_unfinished(module: torch.nn.Module) -> bool:
    """Whether a loader decides on the shapes, as for GGUF."""
    return any(
        isinstance(tensor, (UninitializedParameter, UninitializedBuffer)) for tensor in module.parameters(recurse=False)
    )
