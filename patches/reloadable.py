"""Lets quantised layers take new weights after they were processed for their kernels.

Not part of vLLM: added by a patch of checkpoint-engine (MIT licence).

Processing gives a layer's parameters the layout of a kernel: they lose their loaders, some lose their names, and what a
checkpoint may leave out is no longer preset. A layer whose method is decorated here remembers what its parameters were
like. A loader that comes later is given parameters of that kind, in the same memory where their bytes fit; the next
`process_weights_after_loading` makes the kernel's layout of them and puts it where it was, so no address changes.

A layer that gets no weights keeps what it has. One that gets only some of its weights is an error.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.nn import Module, Parameter
from torch.utils._python_dispatch import TorchDispatchMode

T = TypeVar("T")
Part = tuple[int, tuple[int, ...], tuple[int, ...]]
"""Offset, shape and strides of what a loader wrote."""

_STATE = "_checkpoint_engine_reload"
_STREAMING_MARKS = ("_already_called_process_weights_after_loading", "_loaded_numel")
"""Of vLLM 0.13 to 0.15, on layers that it quantises while it loads."""


def reloadable(method_class: type[T]) -> type[T]:
    """Class decorator of a quantisation method: its layers can be loaded and processed any number of times."""
    kind: Any = method_class
    create, process = kind.create_weights, kind.process_weights_after_loading

    @functools.wraps(create)
    def create_weights(self: T, layer: Module, *args: Any, **kwargs: Any) -> None:
        there = set(layer._parameters)
        create(self, layer, *args, **kwargs)
        vars(layer)[_STATE] = _Reload(layer, there)

    @functools.wraps(process)
    def process_weights_after_loading(self: T, layer: Module) -> None:
        state = vars(layer).get(_STATE)
        if state is None:
            process(self, layer)
        else:
            state.process(self, functools.partial(process, self, layer))

    kind.create_weights = create_weights
    kind.process_weights_after_loading = process_weights_after_loading
    return method_class


def in_place(process: Callable[..., None]) -> Callable[..., None]:
    """Decorator of a method that computes tensors of its object: from the second time on they keep their addresses."""

    @functools.wraps(process)
    def processed(self: object, *args: Any, **kwargs: Any) -> None:
        before = dict(vars(self))
        process(self, *args, **kwargs)
        for name, new in list(vars(self).items()):
            if isinstance(new, torch.Tensor) and isinstance(before.get(name), torch.Tensor):
                vars(self)[name] = _keep(before[name], new, name, set())

    return processed


def abandon(model: Module) -> bool:
    """Forgets an update that came only in part; returns whether it had reached any layer.

    Layers that it reached hold garbage until an update brings all their weights.
    """
    reached = [state for layer in model.modules() if (state := vars(layer).get(_STATE)) is not None and state.staged]
    for state in reached:
        state.give_up()
    return bool(reached)


class _Form:
    """What a parameter looks like before processing."""

    def __init__(self, param: Parameter, preset: float | None) -> None:
        self.kind, self.attributes = type(param), dict(vars(param))
        self.shape, self.dtype, self.device = tuple(param.shape), param.dtype, param.device
        self.numel = math.prod(self.shape)
        self.preset = preset  # the value of a scale before anything is loaded; None for weights

    def make(self, served: Parameter) -> Parameter:
        """A parameter of this form, in the memory of the one that is served if that is of the right size."""
        if self.preset is not None:
            data = torch.full(self.shape, self.preset, dtype=self.dtype, device=self.device)
        elif self.fits(served):
            data = torch.empty(0, dtype=self.dtype, device=served.device)
            data.set_(served.untyped_storage(), 0, self.shape, torch.empty(self.shape, device="meta").stride())
        else:
            data = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        param: Any = torch.Tensor._make_subclass(self.kind, data, False)
        vars(param).update(self.attributes)
        return param

    def fits(self, served: Parameter) -> bool:
        return served.untyped_storage().nbytes() == self.numel * self.dtype.itemsize


class _Reload:
    """The state of one layer."""

    def __init__(self, layer: Module, there: set[str]) -> None:
        self.layer = layer
        self.presets = {
            name: _first_value(param) if "scale" in name else None
            for name, param in layer._parameters.items()
            if param is not None and name not in there
        }
        self.forms: dict[str, _Form] = {}  # of all parameters that processing concerns
        self.others: set[str] = set()  # names of parameters that it leaves alone, or that are None before it
        self.stand_ins: set[str] = set()  # names that are only there for loaders to find
        self.attributes: dict[str, Any] = {}  # of the layer, which processing changes: as they are before it
        self.staged: dict[str, Parameter] = {}  # what takes the weights of an update
        self.written: dict[str, set[Part]] = {}  # which parts of it have come
        self.broken = False  # whether an update reached this layer but did not complete it
        self.doing = ""
        self.rerun: Callable[[], None] | None = None  # None until the layer was processed once

    def process(self, method: object, run: Callable[[], None]) -> None:
        if self.doing == "process":  # a method calls that of its base class
            run()
        elif not self.doing:  # else a loader that quantises as it goes: `load` knows when all has come
            self.doing = "process"
            try:
                if self.rerun is None:
                    self._first(run)
                    self.rerun = functools.partial(self.process, method, run)
                elif self.staged or self.broken:
                    self._again(method, run)
            finally:
                self.doing = ""

    def load(self, name: str, param: Parameter, loaded_weight: torch.Tensor, *args: Any, **kwargs: Any) -> object:
        """What loaders find as `weight_loader` of a parameter that was processed."""
        del param
        if not self.staged:
            self._open()
        staged: Any = self.staged[name]
        loader = getattr(staged, "weight_loader", None)
        if loader is None:
            loader, args, kwargs = _default_loader(), (), {}  # models give this one no shard of a fused layer
        self.doing = "load"
        try:
            with _Writes() as writes:
                result = loader(staged, loaded_weight, *args, **kwargs)
        finally:
            self.doing = ""
        storage = staged.untyped_storage().data_ptr()
        self.written.setdefault(name, set()).update(part for where, part in writes.seen if where == storage)
        if self.rerun is not None and self._is_quantised_here() and not self._missing():
            self.rerun()  # at once: what has come takes more memory than what it becomes
        return result

    def give_up(self) -> None:
        """Forgets what has come. Scales are only staged, but weights may have been written over those in use."""
        self.staged, self.written = {}, {}
        self.broken = any(form.preset is None for form in self.forms.values())

    def _first(self, run: Callable[[], None]) -> None:
        layer = self.layer
        params, attributes = dict(layer._parameters), dict(vars(layer))
        # Only now, since layers add to the attributes of parameters after these were made.
        forms = {name: _Form(param, self.presets.get(name)) for name, param in params.items() if param is not None}
        run()
        self.forms = {
            name: form
            for name, form in forms.items()
            if name in self.presets or layer._parameters.get(name) is not params[name]
        }
        self.others = set(params) - set(self.forms)
        after = vars(layer)
        self.attributes = {
            name: value
            for name, value in attributes.items()
            if (name not in after or after[name] is not value)
            and not isinstance(value, torch.Tensor)
            and name not in _STREAMING_MARKS
        }
        for name in self.forms:
            _set_loader(self._served(name), functools.partial(self.load, name))

    def _served(self, name: str) -> Parameter:
        """The parameter of that name; where processing removed it, one for loaders to find."""
        params: dict[str, Any] = self.layer._parameters
        if params.get(name) is None:
            twin = params.get(name[: -len("_inv")]) if name.endswith("_inv") else None
            data = torch.empty(0, device=self.forms[name].device) if twin is None else twin.data
            params[name] = Parameter(data, requires_grad=False)
            self.stand_ins.add(name)
        return params[name]

    def _open(self) -> None:
        served: dict[str, Any] = self.layer._parameters
        self._forget_marks()
        self.staged = {name: form.make(served[name]) for name, form in self.forms.items()}

    def _again(self, method: object, run: Callable[[], None]) -> None:
        layer, params = self.layer, self.layer._parameters
        missing = self._missing()
        if missing:
            self.give_up()
            raise RuntimeError(
                f"weights of a {type(layer).__name__} came only in part; missing: {', '.join(missing)}. It holds "
                "garbage until an update brings all its weights"
            )
        served, before, state, done = dict(params), dict(vars(layer)), dict(vars(method)), False
        params.clear()
        params.update({**{name: served.get(name) for name in self.others}, **self.staged})
        vars(layer).update(self.attributes)
        self._forget_marks()
        try:
            run()
            for name, old in served.items():
                if old is not None and name not in self.stand_ins:
                    _keep(old, params.get(name), name, set())
            for then, now in ((before, vars(layer)), (state, vars(method))):
                for name in then.keys() & now.keys():
                    now[name] = _keep(then[name], now[name], name, set())
            done = True
        finally:
            params.clear()
            params.update(served)
            self.give_up()
            self.broken = self.broken and not done

    def _forget_marks(self) -> None:
        for mark in _STREAMING_MARKS:
            vars(self.layer).pop(mark, None)

    def _is_quantised_here(self) -> bool:
        """Whether checkpoints hold this layer's weights in a wider type than its kernel's."""
        served: dict[str, Any] = self.layer._parameters
        weights = [(name, form) for name, form in self.forms.items() if form.preset is None]
        return any(f.dtype.itemsize > 1 and "weight" in n for n, f in weights) and not any(
            form.fits(served[name]) for name, form in weights
        )

    def _missing(self) -> list[str]:
        """What has not come, in words."""
        quantised_here = self._is_quantised_here()
        found: list[str] = []
        for name, form in self.forms.items():
            parts = self.written.get(name)
            if form.preset is None:
                numel = sum(math.prod(shape) for _, shape, _ in parts or ())
                if numel < form.numel:
                    found.append(f"{name} ({form.numel - numel} of {form.numel} elements)")
            elif "weight_scale" in name and parts is None and not quantised_here:
                found.append(name)
        return found


class _Writes(TorchDispatchMode):
    """Sees where a loader copies to: the address of a memory, and which part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, Part]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.copy_.default:
            to = args[0]
            part = (to.storage_offset(), tuple(to.shape), to.stride())
            self.seen.append((to.untyped_storage().data_ptr(), part))
        return result


def _keep(old: Any, new: Any, where: str, seen: set[tuple[int, int]]) -> Any:
    """Brings `old` to the state of `new`, tensors in their memory; returns what is to be used from now on."""
    if old is new or (id(old), id(new)) in seen:
        return old
    seen.add((id(old), id(new)))
    if isinstance(old, torch.Tensor):
        return _overwrite(old, new, where)
    if type(old) is not type(new):
        return new
    if isinstance(old, dict):
        kept = {key: _keep(old[key], value, where, seen) if key in old else value for key, value in new.items()}
        old.clear()
        old.update(kept)
        return old
    if isinstance(old, (list, tuple)) and len(old) == len(new):
        items = [_keep(a, b, where, seen) for a, b in zip(old, new)]
        return old if all(a is b for a, b in zip(old, items)) else type(old)(items)
    if type(old).__module__.startswith("vllm.") and hasattr(old, "__dict__"):
        # A kernel and its configuration, which hold tensors of the layer and some of their own.
        _keep(vars(old), vars(new), f"{where} ({type(old).__name__})", seen)
        return old
    return new


def _overwrite(old: torch.Tensor, new: object, where: str) -> torch.Tensor:
    if not isinstance(new, torch.Tensor) or (old.shape, old.dtype) != (new.shape, new.dtype):
        raise RuntimeError(f"processing made {_shown(old)} of {where} before, and {_shown(new)} now")
    if (old.data_ptr(), old.stride()) != (new.data_ptr(), new.stride()):
        shared = old.untyped_storage().data_ptr() == new.untyped_storage().data_ptr()
        old.data.copy_(new.data.clone() if shared else new.data)
    return old


def _shown(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)


def _first_value(param: Parameter) -> float:
    return 0.0 if param.is_meta or param.numel() == 0 else param.data.flatten()[0].item()


def _set_loader(param: Parameter, loader: Callable[..., object]) -> None:
    is_property = isinstance(getattr(type(param), "weight_loader", None), property)
    setattr(param, "_weight_loader" if is_property else "weight_loader", loader)


def _default_loader() -> Callable[..., object]:
    from vllm.model_executor.model_loader.weight_utils import default_weight_loader

    return default_weight_loader
