"""Runs an engine's loader over tensors without data and writes down where it copies them.

The loader sees a model on the meta device and tensors with the checkpoint's names, shapes and dtypes. Views cost
nothing to follow, since a view knows its place in its storage; copies of views (`clone`, `contiguous`, `to`) are traced
back to what was copied. Anything else that a loader does to a tensor is not movement, and is written down as the
reason why the plan does not cover it.
"""

from __future__ import annotations

import enum
import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from checkpoint_engine.contract.sink import TensorSpec
from checkpoint_engine.reload.joining import JoinedTensors, join
from checkpoint_engine.reload.overheads import deferred_garbage, without_functions
from checkpoint_engine.reload.plan import Fill, Piece, Recording
from checkpoint_engine.reload.regions import Region, trace_back

__all__ = ["Loader", "LoaderError", "needs_values", "record"]

Loader = Callable[[Iterable[tuple[str, torch.Tensor]]], object]
"""An engine's `load_weights`."""

_MOST_UNREADABLE = 100
"""Tensors at which a loader may give up; for each of them it is started anew."""

_aten: Any = torch.ops.aten
_COPIES = {_aten.clone.default, _aten._to_copy.default, _aten.contiguous.default}  # noqa: SLF001 - its name in ATen
_FILLS = {_aten.fill_.Scalar, _aten.zero_.default}
_ZEROS = {_aten.zeros.default, _aten.zeros_like.default, _aten.new_zeros.default}
_ONES = {_aten.ones.default, _aten.ones_like.default, _aten.new_ones.default}
_JOINS = {_aten.cat.default, _aten.stack.default}
_READS = {_aten._local_scalar_dense.default, _aten.item.default}  # noqa: SLF001 - its name in ATen
"""What `Tensor.item` comes down to: in inference mode torch does not take it apart before it asks a mode."""


class _Kind(enum.Enum):
    """What an operator does, as far as that can be told without its arguments."""

    VIEW = enum.auto()
    """Shows memory of its first argument in another way."""
    NEW = enum.auto()
    """Makes a tensor from none."""
    OTHER = enum.auto()


@deferred_garbage()
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
    target_region: Region
    """Where in the memory it lies."""
    cast: torch.dtype

    @property
    def origins(self) -> frozenset[str]:
        """Of whatever lies there."""
        return frozenset((self.source,))


@dataclass(frozen=True)
class _Computed:
    """Memory whose values cannot be traced back."""

    origins: frozenset[str]
    by: str


@dataclass(frozen=True)
class _Constant:
    """Memory that holds the same number everywhere, such as the biases that a checkpoint leaves out."""

    value: float
    origins: frozenset[str] = frozenset()


class _Recorder(TorchDispatchMode):
    def __init__(self, targets: Mapping[str, torch.Tensor], sources: Mapping[str, torch.Tensor]) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self._targets = {_storage(tensor): (name, tensor) for name, tensor in targets.items()}
        self._sources = {_storage(tensor): (name, tensor) for name, tensor in sources.items()}
        self._memory: dict[int, _Copy | JoinedTensors | _Computed | _Constant] = {}
        self._copied: defaultdict[str, list[_Copy]] = defaultdict(list)
        """What targets hold, for whoever copies from one."""
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
            shown = func(*args, **kwargs)
            self._follow_view(func, args[0], shown)
            return shown
        if kind is _Kind.NEW:
            made = func(*args, **{**kwargs, "device": "meta"})
            self._note_constant(func, args, made)
            return made
        if func is _aten.lift_fresh.default:  # numbers out of Python
            return args[0].to("meta")
        if func in _READS and self._is_lone(args[0]):
            return self._read(args[0])
        result = func(*args, **kwargs)
        inputs = _tensors_in((*args, *cast("dict[str, object]", kwargs).values()))
        self._touched.extend(inputs)
        written = [tensor for tensor in _written(func, args, kwargs or {}) if tensor.numel()]
        if self._note_constant(func, args, result):
            return result
        if func is _aten.copy_.default and written:
            self._note_copy(written[0], args[1])
        elif func in _FILLS and written:
            self._note_fill(written[0], 0.0 if len(args) == 1 else float(args[1]))
        elif written:
            for tensor in written:
                self._note_computed(tensor, inputs, str(func))
        else:
            dimension = args[1] if len(args) > 1 and func in _JOINS else kwargs.get("dim", 0)
            self._follow(func, inputs, result, dimension)
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

    def _follow(self, func: object, inputs: list[torch.Tensor], result: object, dimension: int) -> None:
        """A new tensor: a view of one of the inputs, a copy, inputs side by side, or something computed."""
        known = {_storage(tensor) for tensor in inputs}
        for tensor in _tensors_in((result,)):
            if _storage(tensor) in known:
                continue
            made = self._copy_of(inputs[0], tensor) if func in _COPIES and inputs else None
            if func in _COPIES and inputs and isinstance(held := self._memory.get(_storage(inputs[0])), _Constant):
                made = held
            if func in _JOINS:
                made = self._joined(func, inputs, tensor, dimension)
            sources = self._origins(inputs)
            if made is not None or sources:
                self._memory[_storage(tensor)] = made or _Computed(sources, str(func))
                self._keep_alive.append(tensor)

    def _joined(
        self, func: object, inputs: list[torch.Tensor], result: torch.Tensor, dimension: int
    ) -> JoinedTensors | None:
        """Tensors put side by side, if each of them shows part of a source."""
        alike = all(tensor.dtype == result.dtype for tensor in inputs) and result.is_contiguous()
        parts = [(tuple(tensor.shape), self._trace(tensor)) for tensor in inputs if tensor.numel()]
        if not alike or any(traced is None or traced[3] != result.dtype for _, traced in parts):
            return None
        return join(parts, dimension % result.dim(), stacked=func is _aten.stack.default, shape=tuple(result.shape))

    def _follow_view(self, func: object, tensor: torch.Tensor, shown: object) -> None:
        """What shows memory may copy it first: in inference mode `to`, `contiguous` and `reshape` come as they are."""
        if isinstance(shown, torch.Tensor) and _storage(shown) == _storage(tensor):
            return
        for each in _tensors_in((shown,)):
            if _storage(each) == _storage(tensor):
                continue
            made = self._copy_of(tensor, each) if each.shape == tensor.shape else None
            sources = self._origins([tensor])
            if made is not None or sources:
                self._memory[_storage(each)] = made or _Computed(sources, str(func))
                self._keep_alive.append(each)

    def _note_constant(self, func: object, args: tuple[Any, ...], made: torch.Tensor) -> bool:
        """Whether an operator has made a tensor that is the same number everywhere."""
        value = 0.0 if func in _ZEROS else 1.0 if func in _ONES else None
        if func is _aten.full.default and isinstance(args[1], (bool, int, float)):
            value = float(args[1])
        if value is None:
            return False
        self._memory[_storage(made)] = _Constant(value)
        self._keep_alive.append(made)
        return True

    def _copy_of(self, tensor: torch.Tensor, copy: torch.Tensor) -> _Copy | JoinedTensors | None:
        target_region = Region.of(copy)
        if target_region.offset or int(copy.untyped_storage().nbytes()) != copy.nbytes:
            return None
        joined = self._memory.get(_storage(tensor))
        if isinstance(joined, JoinedTensors):
            alike = {tensor.dtype, copy.dtype, *(part.dtype for part in joined.parts)}
            return joined.copied(Region.of(tensor), target_region) if len(alike) == 1 else None
        found = self._trace(tensor)
        if found is None:
            return None
        source, splits, region, dtype = found
        if tensor.dtype not in {dtype, copy.dtype}:
            return None  # two casts, one after the other, are not one
        return _Copy(source, region, dtype, target_region.refined(splits), copy.dtype)

    def _trace(self, tensor: torch.Tensor) -> tuple[str, tuple[tuple[int, int], ...], Region, torch.dtype] | None:
        """The source that a tensor shows part of: its name, how to split dimensions, which part, read as what."""
        storage, view = _storage(tensor), Region.of(tensor)
        if storage in self._sources:
            name, source = self._sources[storage]
            return (name, (), view, tensor.dtype) if tensor.dtype.itemsize == source.dtype.itemsize else None
        copies = [self._memory.get(storage)]
        if storage in self._targets:
            name, parameter = self._targets[storage]
            view = view.moved(-int(parameter.storage_offset()))
            copies = [] if self._recording.written.get(name, 0) > parameter.numel() else self._copied[name]
        for copy in copies:
            if isinstance(copy, _Copy) and tensor.dtype == copy.cast:
                traced = trace_back(view, copy.target_region, copy.region)
                if traced is not None:
                    return copy.source, *traced, copy.dtype
        return None

    def _note_copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        if _storage(target) not in self._targets:
            self._note_copy_to_plain_tensor(target, source)
            return
        name, parameter = self._targets[_storage(target)]
        constant = self._memory.get(_storage(source))
        if isinstance(constant, _Constant):
            self._note_fill(target, constant.value)
            return
        if isinstance(constant, JoinedTensors) and self._note_joined(target, source, constant):
            return
        found = self._trace(source if source.shape == target.shape else source.expand(target.shape))
        unknown = found is None or found[0] in self._recording.unreadable
        if found is None or unknown or target.dtype.itemsize != parameter.dtype.itemsize:
            self._note_computed(target, [source], "a copy")
            return
        origin, splits, region, dtype = found
        if dtype != source.dtype != target.dtype:
            self._note_computed(target, [source], "two casts")
            return
        target_region = Region.of(target).moved(-int(parameter.storage_offset())).refined(splits)
        self._note_piece(Piece(origin, dtype, region, name, target.dtype, target_region))

    def _note_piece(self, piece: Piece) -> None:
        self._recording.pieces[piece] = None
        copied = _Copy(piece.source, piece.region, piece.source_dtype, piece.target_region, piece.target_dtype)
        self._copied[piece.target].append(copied)
        self._recording.note_write(piece.target, piece.region.elements, {piece.source})

    def _note_joined(self, target: torch.Tensor, source: torch.Tensor, joined: JoinedTensors) -> bool:
        """Whether a copy of (part of) tensors that were put side by side comes down to copies of those."""
        name, parameter = self._targets[_storage(target)]
        into = Region.of(target).moved(-int(parameter.storage_offset()))
        shown = source if source.shape == target.shape else source.expand(target.shape)
        copies = joined.copies(Region.of(shown), into)
        readable = joined.origins.isdisjoint(self._recording.unreadable)
        if copies is None or not readable or target.dtype.itemsize != parameter.dtype.itemsize:
            return False
        if sum(region.elements for _, region, _ in copies) != target.numel() or any(
            part.dtype != source.dtype for part, _, _ in copies
        ):
            return False
        for part, region, target_region in copies:
            self._note_piece(Piece(part.source, part.dtype, region, name, target.dtype, target_region))
        self._recording.note_joined({part.source for part, _, _ in copies})
        return True

    def _note_copy_to_plain_tensor(self, target: torch.Tensor, source: torch.Tensor) -> None:
        fresh = isinstance(self._memory.get(_storage(target)), (_Constant, type(None)))
        made = self._copy_of(source.expand(target.shape), target) if fresh else None
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
        target_region = Region.of(target).moved(-int(parameter.storage_offset()))
        origins = self._recording.origins.get(name, set())
        # A loader may have taken other tensors since: what it fills up belongs to what it has put there.
        source = self._current if not origins or self._current in origins else min(origins)
        self._recording.note_fill(Fill(source, name, target.dtype, target_region, value))

    def _note_computed(self, target: torch.Tensor, inputs: list[torch.Tensor], by: str) -> None:
        """Something was written that cannot be replayed as a copy."""
        storage, sources = _storage(target), self._origins(inputs)
        if storage in self._targets:
            name = self._targets[storage][0]
            self._recording.flaws.setdefault(name, f"computed from {', '.join(sorted(sources)) or 'nothing'} ({by})")
            given = [tensor for tensor in inputs if _storage(tensor) not in self._targets]
            self._recording.note_write(name, target.numel(), self._origins(given))
            self._recording.computed_with |= self._origins(given)
            self._recording.origins[name] |= sources  # through other targets too, which are there when it is computed
        elif sources or storage in self._sources:
            self._memory[storage] = _Computed(sources, by)
            self._sources.pop(storage, None)
            self._keep_alive.append(target)
        else:
            self._memory.pop(storage, None)  # it may have been a constant

    def _origins(self, tensors: Iterable[torch.Tensor]) -> frozenset[str]:
        """The checkpoint's tensors that these come from."""
        names: set[str] = set()
        for tensor in tensors:
            storage = _storage(tensor)
            held = self._memory.get(storage)
            if storage in self._sources:
                names.add(self._sources[storage][0])
            elif storage in self._targets:
                names |= self._recording.origins.get(self._targets[storage][0], set())
            elif held is not None:
                names |= held.origins
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
