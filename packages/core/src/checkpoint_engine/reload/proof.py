"""Proves that a plan does what the engine's loader does: checksums of every piece, taken on the device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch

from checkpoint_engine.reload.overheads import without_functions
from checkpoint_engine.reload.plan import Fill, Piece, ReloadPlan
from checkpoint_engine.reload.replay import view_of

__all__ = ["Checksums", "Numbered", "NumberedSums", "Proof"]

_CHUNK = 1 << 20
"""Words that have weights of their own; what is longer is summed in chunks."""
_BATCH = 32 << 20
"""Bytes summed at a time, so that the memory needed stays small."""
_WORD = 8
"""Bytes."""
_SEED = 0x5EED

Numbered = Iterable[tuple[int, torch.Tensor]]


class Checksums:
    """Sums of a tensor's bytes as 64-bit words, each multiplied by a number that belongs to its place; modulo 2^64.

    The numbers are odd, so that any single wrong word changes the sum, and drawn at random, so that exchanged or moved
    ones do.
    """

    def __init__(self) -> None:
        self._weights: dict[torch.device, torch.Tensor] = {}

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The checksum of a tensor's elements in their order, whatever its strides: a scalar int64 on its device."""
        return self.of_each([tensor])[0]

    def of_each(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """The checksums of tensors of one shape and dtype, in as few operations as one takes: 1-D int64."""
        if not tensors[0].numel():
            return torch.zeros(len(tensors), dtype=torch.int64, device=tensors[0].device)
        words = _words(tensors)
        weights = self._weights_on(words.device)
        whole = words.shape[1] // _CHUNK * _CHUNK
        rest = words[:, whole:]
        sums = (rest * weights[: rest.shape[1]]).sum(1, keepdim=True)
        if not whole:
            return sums[:, 0]
        chunks = words[:, :whole].view(len(tensors), -1, _CHUNK)
        step = max(1, _BATCH // (len(tensors) * _CHUNK * _WORD))
        some = (chunks[:, start : start + step] for start in range(0, chunks.shape[1], step))
        sums = torch.cat([sums, *((each * weights).sum(2) for each in some)], dim=1)
        # So that chunks cannot be exchanged.
        return (sums * torch.arange(1, 2 * sums.shape[1], 2, device=sums.device)).sum(1)

    def _weights_on(self, device: torch.device) -> torch.Tensor:
        if device not in self._weights:
            generator = torch.Generator("cpu").manual_seed(_SEED)
            # Engines load inside a context that makes another device the default.
            numbers = torch.randint(
                -(1 << 62), 1 << 62, (_CHUNK,), dtype=torch.int64, generator=generator, device="cpu"
            )
            self._weights[device] = (2 * numbers + 1).to(device)
        return self._weights[device]


def _words(tensors: list[torch.Tensor]) -> torch.Tensor:
    """One row of 64-bit words for each tensor, filled up with zeros."""
    one = tensors[0]
    rows = one.contiguous() if len(tensors) == 1 else torch.stack(tensors)
    raw = rows.reshape(len(tensors), one.numel()).view(torch.uint8)
    if raw.shape[1] % _WORD:
        raw = torch.nn.functional.pad(raw, (0, -raw.shape[1] % _WORD))
    elif raw.storage_offset() % _WORD:
        raw = raw.clone()
    return raw.view(torch.int64)


class NumberedSums:
    """Checksums of numbered pieces, many at a time."""

    def __init__(self, checksums: Checksums) -> None:
        """Begins without any."""
        self._checksums = checksums
        self._taken: list[tuple[list[int], torch.Tensor]] = []
        self._known: dict[int, int] = {}

    def take(self, pieces: Numbered) -> None:
        """Takes the checksums of pieces as they are now; of two with one number, the last counts."""
        alike: dict[tuple[torch.Size, torch.dtype], tuple[list[int], list[torch.Tensor]]] = {}
        with without_functions():
            for number, part in pieces:
                kind = part.shape, part.dtype
                numbers, parts = alike.setdefault(kind, ([], []))
                numbers.append(number)
                parts.append(part)
                if len(parts) * part.nbytes >= _BATCH:
                    self._sum(*alike.pop(kind))
            for numbers, parts in alike.values():
                self._sum(numbers, parts)

    def known(self) -> Mapping[int, int]:
        """Number -> checksum; waits for the device."""
        if self._taken:
            numbers = [number for taken, _ in self._taken for number in taken]
            sums = cast("list[int]", cast("Any", torch.cat([sums for _, sums in self._taken])).tolist())
            self._known.update(zip(numbers, sums, strict=True))
            self._taken.clear()
        return self._known

    def _sum(self, numbers: list[int], parts: list[torch.Tensor]) -> None:
        self._taken.append((numbers, self._checksums.of_each(parts)))


class Proof:
    """What targets should hold, in every element, against what they do hold.

    What pieces should hold is taken from the tensors as they come; constants are known; and a plan that has neither for
    some elements of a target has lost them.
    """

    def __init__(self, plan: ReloadPlan, device: torch.device) -> None:
        """Makes an empty one; `device` is where the targets lie, and where the sums are taken."""
        self._device = device
        self.checksums = Checksums()
        pieces = [piece for pieces in plan.pieces.values() for piece in pieces]
        self._writes: list[Piece | Fill] = [*pieces, *(fill for fills in plan.fills.values() for fill in fills)]
        self._of_source: dict[str, list[tuple[int, Piece]]] = {}
        self._of_target: dict[str, list[tuple[int, Piece | Fill]]] = {}
        for number, piece in enumerate(pieces):
            self._of_source.setdefault(piece.source, []).append((number, piece))
        for number, write in enumerate(self._writes):
            self._of_target.setdefault(write.target, []).append((number, write))
        self._expected, self._found = NumberedSums(self.checksums), NumberedSums(self.checksums)
        self._short: dict[str, str] = {}
        """Targets in which something is not written, and a tensor that comes into them."""

    def expect(self, tensors: Sequence[tuple[str, torch.Tensor]], targets: Iterable[str]) -> None:
        """Takes the checksums of what these tensors bring to `targets`."""
        self._expected.take(self._parts(tensors, set(targets)))

    def find(self, target: str, memory: torch.Tensor) -> None:
        """Takes the checksums of what a target holds; the last call counts."""
        writes = self._of_target.get(target, ())
        self._found.take((number, view_of(memory, each.target_region, each.target_dtype)) for number, each in writes)
        self._expected.take(
            (number, torch.full(fill.target_region.shape, fill.value, dtype=fill.target_dtype, device=memory.device))
            for number, fill in writes
            if isinstance(fill, Fill)
        )
        if writes and sum(each.target_region.elements for _, each in writes) != memory.numel():
            self._short[target] = writes[0][1].source

    def differing(self, targets: Iterable[str]) -> Mapping[str, str]:
        """Target -> the first tensor that is not in it as planned, of those whose checksums were taken."""
        wanted, found = set(targets), self._found.known()
        result = {target: source for target, source in self._short.items() if target in wanted}
        for number, expected in self._expected.known().items():
            write = self._writes[number]
            if write.target in wanted and found.get(number) != expected:
                result.setdefault(write.target, write.source)
        return result

    def _parts(self, tensors: Sequence[tuple[str, torch.Tensor]], targets: set[str]) -> Numbered:
        for name, tensor in tensors:
            pieces = [pair for pair in self._of_source.get(name, ()) if pair[1].target in targets]
            here = tensor.to(self._device, non_blocking=self._device.type != "cpu") if pieces else tensor
            for number, piece in pieces:
                yield number, view_of(here, piece.region, piece.source_dtype).to(piece.target_dtype)
