"""A trainer's tensors under the names and in the layout of a checkpoint: as views of them, so nothing is copied."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from checkpoint_engine.boxes import TensorBox
from checkpoint_engine.errors import UnsupportedTensorError
from checkpoint_engine.source.shards import NamedTensors, TensorShard, parts_of

__all__ = ["CheckpointBox", "CheckpointLayout", "checkpoint_views"]


@dataclass(frozen=True)
class CheckpointBox:
    """A box of a trainer's whole tensor, and which elements of which tensor of a checkpoint it is.

    Rows 0 to 7 of a fused parameter, which are rows 16 to 23 of the keys; and expert 3 of a grouped parameter (experts,
    columns, rows), which the checkpoint has by itself and transposed:

        CheckpointBox("k_proj.weight", shape=(32, 64), offsets=(16, 0), begin=(0, 0), size=(8, 64))
        CheckpointBox("experts.3.w", shape=(96, 64), offsets=(0, 0), begin=(3, 0, 0), size=(1, 64, 96), dims=(2, 1))
    """

    name: str
    """In the checkpoint."""
    shape: Sequence[int]
    """Of the checkpoint's tensor."""
    offsets: Sequence[int]
    """Where in that the box begins."""
    begin: Sequence[int]
    """Where in the trainer's tensor it begins."""
    size: Sequence[int]
    """How far it reaches in each dimension of the trainer's tensor."""
    dims: Sequence[int] | None = None
    """Which dimensions of the trainer's tensor the checkpoint's tensor has, in its order; all of them as they are if
    None. In those that it has not, the box has size 1."""

    @property
    def box(self) -> TensorBox:
        """Of the trainer's tensor."""
        return TensorBox(tuple(self.begin), tuple(self.size))


CheckpointLayout = Callable[[str, tuple[int, ...]], "Sequence[CheckpointBox] | None"]
"""Name and shape of a trainer's whole tensor -> the boxes of it that a checkpoint has; None: as it is, under its name.

It knows nothing of ranks: how a tensor is cut is another matter. What no box has (rows that pad a vocabulary) is left
out, and so is a tensor for which there are no boxes."""


def checkpoint_views(tensors: NamedTensors, layout: CheckpointLayout) -> dict[str, list[TensorShard]]:
    """What this rank has of a checkpoint, as views of the trainer's tensors.

    The views stay good for as long as the trainer keeps its tensors in their memory, whatever it writes to them: a
    training loop makes them once, and publishes them after every step.

    Args:
        tensors: By the trainer's names: whole ones, DTensors or `TensorShard`s, as trainers cut them.
        layout: Where they belong.

    Raises:
        UnsupportedTensorError: the layout names boxes that are not there, or the tensors are none that can be given.
    """
    found: dict[str, list[TensorShard]] = {}
    for name, value in tensors.items():
        for part, whole, begin in parts_of(name, value):
            held = TensorBox(begin, tuple(part.shape))
            for place in _places(name, whole, layout):
                shard = _view(part.detach(), held, place)
                if shard is not None:
                    found.setdefault(place.name, []).append(shard)
    return found


def _places(name: str, whole: tuple[int, ...], layout: CheckpointLayout) -> Iterator[CheckpointBox]:
    places = layout(name, whole)
    if places is None:
        places = [CheckpointBox(name, whole, (0,) * len(whole), (0,) * len(whole), whole)]
    for place in places:
        fault = _fault_of(place, whole)
        if fault:
            raise UnsupportedTensorError(f"the layout takes {place} from {name!r} of shape {list(whole)}: {fault}")
        yield place


def _fault_of(place: CheckpointBox, whole: tuple[int, ...]) -> str:
    """What makes no sense of it; empty if nothing."""
    dims = range(len(whole)) if place.dims is None else place.dims
    if not len(place.begin) == len(place.size) == len(whole) or not len(dims) == len(place.shape) == len(place.offsets):
        return "numbers of dimensions differ"
    if len(set(dims)) < len(dims) or not set(dims) <= set(range(len(whole))):
        return f"its tensor has no such dimensions as {list(dims)}"
    if any(size != 1 for dim, size in enumerate(place.size) if dim not in dims):
        return "of dimensions that are left out, a box has size 1"
    if not _within(place.begin, place.size, whole):
        return "the box leaves the trainer's tensor"
    if not _within(place.offsets, [place.size[dim] for dim in dims], place.shape):
        return "the box leaves the checkpoint's tensor"
    return ""


def _within(begin: Sequence[int], size: Sequence[int], whole: Sequence[int]) -> bool:
    return all(0 <= b <= b + s <= n for b, s, n in zip(begin, size, whole, strict=True))


def _view(part: torch.Tensor, held: TensorBox, place: CheckpointBox) -> TensorShard | None:
    """What a part has of a box; None if that is nothing."""
    common = held if held == place.box else held.meet(place.box)
    if common is None:
        return None
    dims = tuple(range(part.dim()) if place.dims is None else place.dims)
    view = part[TensorBox(tuple(c - h for c, h in zip(common.begin, held.begin, strict=True)), common.shape).slices]
    left_out = [dim for dim in range(part.dim()) if dim not in dims]
    view = view.permute((*left_out, *dims))[(0,) * len(left_out)]
    offsets = (o + common.begin[d] - place.begin[d] for o, d in zip(place.offsets, dims, strict=True))
    return TensorShard(view, tuple(place.shape), tuple(offsets))
