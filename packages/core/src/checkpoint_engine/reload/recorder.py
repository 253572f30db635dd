"""Runs an engine's loader over tensors without data and writes down where it copies them.

The loader sees a model on the meta device and tensors with the checkpoint's names, shapes and dtypes. Views cost
nothing to follow, since a view knows its place in its storage; copies of views (`clone`, `contiguous`, `to`) are traced
back to what was copied. Anything else that a loader does to a tensor is not movement, and is written down as the
reason why the plan does not cover it.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from checkpoint_engine.engine.adapter import TensorSpec
from checkpoint_engine.reload.overheads import kept_garbage, without_functions
from checkpoint_engine.reload.plan import Fill, Piece, Recording
from checkpoint_engine.reload.regions import Region, trace_back

Loader = Callable[[Iterable[tuple[str, torch.Tensor]]], object]
"""An engine's `load_weights`."""

_MOST_UNREADABLE = 100
"""Tensors at which a loader may give up; for each of them it is started anew."""

_aten: Any = torch.ops.aten
_COPIES = {_aten.clone.default, _aten._to_copy.default, _aten.contiguous.default}  # noqa: SLF001 - its name in ATen
_FILLS = {_aten.fill_.Scalar, _aten.zero_.default}


class _Kind(enum.Enum):
    """What an operator does, as far as that can be told without its arguments."""

    VIEW = enum.auto()
    """Shows memory of its first argument in another way."""
    NEW = enum.auto()
    """Makes a tensor from none."""
    OTHER = enum.auto()


@kept_garbage()
def record(load: Loader, targets: Mapping[str, torch.Tensor], tensors: Mapping[str, TensorSpec]) -> Recording:
    """Runs `load` over tensors without data.

    Args:
        load: The loader of a model on the meta device. It may be called several times, each time with some tensors.
        targets: That model's parameters and buffers by name; each storage once.
        tensors: The checkpoint's tensors, in the order in which the loader gets them.

    Raises:
        LoaderError: the loader raised at a tensor, for another reason than its lack of data.
    """
    sources = {name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for name, spec in tensors.items()}
    recorder = _Recorder(targets, sources)
    feed = _Feed(sources, recorder)
    while not feed.exhausted:
        try:
            with torch.no_grad(), without_functions(), recorder:
                load(iter(feed))
            break
        except Exception as error:
            if not needs_values(error):
                raise LoaderError(feed.current, error) from error
            recorder.note_unreadable(feed.current, error)
            if recorder.has_given_up:
                break
    return recorder.recording()


class LoaderError(Exception):
    """An engine's loader raised `error` at tensor `name`."""

    def __init__(self, name: str, error: Exception) -> None:
        super().__init__(f"{name}: {type(error).__name__}: {error}")
        self.name, self.error = name, error


def needs_values(error: Exception) -> bool:
    """Whether a loader failed only because its tensors have no data."""
    return isinstance(error, NotImplementedError) or "meta" in str(error).lower()


class _Feed:
    """Hands the tensors to the loader; goes on where it stopped when it is asked again."""

    def __init__(self, sources: Mapping[str, torch.Tensor], recorder: _Recorder) -> None:
        self._rest = iter(sources.items())
        self._recorder = recorder
        self.exhausted = False
        self.current = "(none)"

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._rest:
            self.current = self._recorder.current = name
            yield name, tensor
        self.exhausted = True


@dataclass(frozen=True)
class _Copy:
    """Memory of the loader's own that holds a copy of (part of) a tensor."""

    source: str
    region: Region
    """What was copied."""
    dtype: torch.dtype
    """As what it was read."""
    place: Region
    """Where in the memory it lies."""
    cast: torch.dtype


@dataclass(frozen=True)
class _Computed:
    """Memory whose values cannot be traced back."""

    sources: frozenset[str]
    by: str


class _Recorder(TorchDispatchMode):
    def __init__(self, targets: Mapping[str, torch.Tensor], sources: Mapping[str, torch.Tensor]) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self._targets = {_storage(tensor): (name, tensor) for name, tensor in targets.items()}
        self._sources = {_storage(tensor): (name, tensor) for name, tensor in sources.items()}
        self._memory: dict[int, _Copy | _Computed] = {}
        self._recording = Recording()
        self._touched: list[torch.Tensor] = []
        """What the loader has used since it took the last tensor, for the time that it cannot go on."""
        self._current = ""
        self._value_of = ""
        """The tensor whose value the loader has read, until it takes the next one."""
        # A storage's address must not be used again while we tell storages apart by it.
        self._keep_alive: list[torch.Tensor] = [*targets.values(), *sources.values()]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: nothing is compiled here, and torch would import its compiler, for seconds, to make sure of that."""
        return False

    @property
    def current(self) -> str:
        """The tensor that the loader has taken last."""
        return self._current

    @current.setter
    def current(self, name: str) -> None:
        self._current = name
        self._value_of = ""
        self._touched.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401 - torch's own signature
        kwargs = kwargs or {}
        kind = _kind(func)
        if kind is _Kind.VIEW:
            self._touched.append(args[0])
            return func(*args, **kwargs)
        if kind is _Kind.NEW:
            return func(*args, **{**kwargs, "device": "meta"})
        if func is _aten.lift_fresh.default:  # numbers out of Python
            return args[0].to("meta")
        if func is _aten._local_scalar_dense.default and self._is_lone(args[0]):  # noqa: SLF001 - its name in ATen
            return self._read(args[0])
        result = func(*args, **kwargs)
        inputs = _tensors_in((*args, *cast("dict[str, object]", kwargs).values()))
        self._touched.extend(inputs)
        written = [tensor for tensor in _written(func, args, kwargs or {}) if tensor.numel()]
        if func is _aten.copy_.default and written:
            self._note_copy(written[0], args[1])
        elif func in _FILLS and written:
            self._note_fill(written[0], 0.0 if len(args) == 1 else float(args[1]))
        elif written:
            for tensor in written:
                self._note_computed(tensor, inputs, str(func))
        else:
            self._follow(func, inputs, result)
        return result

    def note_unreadable(self, name: str, error: Exception) -> None:
        """The loader gave up at a tensor because it has no values."""
        reason = f"its loader reads values ({str(error)[:100]})"
        self._recording.unreadable[name] = reason
        self._recording.drop(name)
        touched = {self._targets[key][0] for key in map(_storage, self._touched) if key in self._targets}
        for target in sorted(touched):
            self._recording.flaws.setdefault(target, f"{name}: {reason}")
            self._recording.note_write(target, 0, {name})

    def _is_lone(self, tensor: torch.Tensor) -> bool:
        """Whether it shows a whole tensor of one element: loaders fill in such scales by their value."""
        source = self._sources.get(_storage(tensor))
        return source is not None and source[1].numel() == 1

    def _read(self, tensor: torch.Tensor) -> int:
        name = self._sources[_storage(tensor)][0]
        self._value_of = name
        self._recording.unreadable.setdefault(name, "its loader reads its value")
        return 1

    @property
    def has_given_up(self) -> bool:
        """Whether the loader reads so many values that going on after each of them leads nowhere."""
        if len(self._recording.unreadable) > _MOST_UNREADABLE:
            self._recording.complete = False
        return not self._recording.complete

    def recording(self) -> Recording:
        """What was seen."""
        return self._recording

    # -- what happens to tensors

    def _follow(self, func: object, inputs: list[torch.Tensor], result: object) -> None:
        """A new tensor: a view of one of the inputs, a copy, or something computed."""
        known = {_storage(tensor) for tensor in inputs}
        for tensor in _tensors_in((result,)):
            if _storage(tensor) in known:
                continue
            made = self._copy_of(inputs[0], tensor) if func in _COPIES and inputs else None
            sources = self._origins(inputs)
            if made is not None or sources:
                self._memory[_storage(tensor)] = made or _Computed(sources, str(func))
                self._keep_alive.append(tensor)

    def _copy_of(self, tensor: torch.Tensor, copy: torch.Tensor) -> _Copy | None:
        place = Region.of(copy)
        found = self._trace(tensor)
        if found is None or place.offset or int(copy.untyped_storage().nbytes()) != copy.nbytes:
            return None
        source, splits, region, dtype = found
        if tensor.dtype not in {dtype, copy.dtype}:
            return None  # two casts, one after the other, are not one
        return _Copy(source, region, dtype, place.refined(splits), copy.dtype)

    def _trace(self, tensor: torch.Tensor) -> tuple[str, tuple[tuple[int, int], ...], Region, torch.dtype] | None:
        """The source that a tensor shows part of: its name, how to split dimensions, which part, read as what."""
        storage, view = _storage(tensor), Region.of(tensor)
        if storage in self._sources:
            name, source = self._sources[storage]
            return (name, (), view, tensor.dtype) if tensor.dtype.itemsize == source.dtype.itemsize else None
        copy = self._memory.get(storage)
        if not isinstance(copy, _Copy) or tensor.dtype != copy.cast:
            return None
        traced = trace_back(view, copy.place, copy.region)
        return None if traced is None else (copy.source, *traced, copy.dtype)

    def _note_copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        if _storage(target) not in self._targets:
            self._note_copy_elsewhere(target, source)
            return
        name, parameter = self._targets[_storage(target)]
        found = self._trace(source if source.shape == target.shape else source.expand(target.shape))
        unknown = found is None or found[0] in self._recording.unreadable
        if found is None or unknown or target.dtype.itemsize != parameter.dtype.itemsize:
            self._note_computed(target, [source], "a copy")
            return
        origin, splits, region, dtype = found
        if dtype != source.dtype != target.dtype:
            self._note_computed(target, [source], "two casts")
            return
        place = Region.of(target).moved(-int(parameter.storage_offset())).refined(splits)
        self._recording.pieces[Piece(origin, dtype, region, name, target.dtype, place)] = None
        self._recording.note_write(name, target.numel(), {origin})

    def _note_copy_elsewhere(self, target: torch.Tensor, source: torch.Tensor) -> None:
        made = self._copy_of(source.expand(target.shape), target) if _storage(target) not in self._memory else None
        if made is None:
            self._note_computed(target, [target, source], "copies put together")
        else:
            self._memory[_storage(target)] = made
            self._keep_alive.append(target)

    def _note_fill(self, target: torch.Tensor, value: float) -> None:
        if _storage(target) not in self._targets:
            self._note_computed(target, [target], "a fill")
            return
        name, parameter = self._targets[_storage(target)]
        if self._value_of:
            self._recording.flaws.setdefault(name, f"filled with the value of {self._value_of}")
            self._recording.note_write(name, target.numel(), {self._value_of})
            return
        place = Region.of(target).moved(-int(parameter.storage_offset()))
        self._recording.fills.append(Fill(self._current, name, target.dtype, place, value))
        self._recording.note_write(name, target.numel(), ())

    def _note_computed(self, target: torch.Tensor, inputs: list[torch.Tensor], by: str) -> None:
        """Something was written that cannot be replayed as a copy."""
        storage, sources = _storage(target), self._origins(inputs)
        if storage in self._targets:
            name = self._targets[storage][0]
            self._recording.flaws.setdefault(name, f"computed from {', '.join(sorted(sources)) or 'nothing'} ({by})")
            self._recording.note_write(name, target.numel(), sources)
        elif sources or storage in self._sources:
            self._memory[storage] = _Computed(sources, by)
            self._sources.pop(storage, None)
            self._keep_alive.append(target)

    def _origins(self, tensors: Iterable[torch.Tensor]) -> frozenset[str]:
        names: set[str] = set()
        for tensor in tensors:
            storage = _storage(tensor)
            held = self._memory.get(storage)
            if storage in self._sources:
                names.add(self._sources[storage][0])
            elif held is not None:
                names.update({held.source} if isinstance(held, _Copy) else held.sources)
        return frozenset(names)


def _storage(tensor: torch.Tensor) -> int:
    return cast("Any", tensor.untyped_storage())._cdata  # noqa: SLF001 - a meta tensor has no other identity


def _tensors_in(values: Iterable[object]) -> list[torch.Tensor]:
    """Tensors among an operator's arguments or results, which may be in lists."""
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found.extend(_tensors_in(cast("Iterable[object]", value)))
    return found


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:  # noqa: ANN401 - torch's own types
    """The arguments that an operator writes to."""
    return _tensors_in(
        args[index] if index < len(args) else kwargs.get(name) for index, name in _written_arguments(func)
    )


@functools.cache
def _kind(func: Any) -> _Kind:  # noqa: ANN401 - torch's own types
    arguments, returns = func._schema.arguments, func._schema.returns  # noqa: SLF001 - the only way to ask
    if _written_arguments(func) or func is _aten.lift_fresh.default:
        return _Kind.OTHER
    if returns and all(each.alias_info is not None for each in (*returns, arguments[0])):
        return _Kind.VIEW
    takes_tensors = any("Tensor" in str(argument.type) for argument in arguments)
    takes_device = any(argument.name == "device" for argument in arguments)
    return _Kind.NEW if takes_device and not takes_tensors else _Kind.OTHER


@functools.cache
def _written_arguments(func: Any) -> list[tuple[int, str]]:  # noqa: ANN401 - torch's own types
    return [
        (index, argument.name)
        for index, argument in enumerate(func._schema.arguments)  # noqa: SLF001 - the only way to ask
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
