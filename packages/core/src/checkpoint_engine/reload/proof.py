"""Proves that a plan does what the engine's loader does: checksums of every piece, taken on the device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch

from checkpoint_engine.reload.plan import Piece, ReloadPlan
from checkpoint_engine.reload.replay import view_of

_CHUNK = 1 << 20
"""Words summed at a time, so that the memory needed stays small."""
_WORD = 8
"""Bytes."""
_SEED = 0x5EED


class Checksums:
    """Sums of a tensor's bytes as 64-bit words, each multiplied by a number that belongs to its place; modulo 2^64.

    The numbers are odd, so that any single wrong word changes the sum, and drawn at random, so that exchanged or moved
    ones do.
    """

    def __init__(self) -> None:
        self._weights: dict[torch.device, torch.Tensor] = {}

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The checksum of a tensor's elements in their order, whatever its strides: a scalar int64 on its device."""
        raw = tensor.contiguous().view(-1).view(torch.uint8)
        if raw.storage_offset() % _WORD:
            raw = raw.clone()
        whole = raw.numel() // _WORD * _WORD
        weights = self._weights_on(tensor.device)
        # As few operations as possible: there are two such sums for every piece of a plan.
        sums = [(chunk * weights[: chunk.numel()]).sum() for chunk in _chunks(raw[:whole].view(torch.int64))]
        if whole < raw.numel():
            rest = raw[whole:].to(torch.int64)
            sums.append((rest * weights[: rest.numel()]).sum())
        if not sums:
            return torch.zeros((), dtype=torch.int64, device=tensor.device)
        total = sums[0]
        for index, other in enumerate(sums[1:], start=1):
            total += (2 * index + 1) * other  # so that chunks cannot be exchanged
        return total

    def _weights_on(self, device: torch.device) -> torch.Tensor:
        if device not in self._weights:
            generator = torch.Generator("cpu").manual_seed(_SEED)
            # Engines load inside a context that makes another device the default.
            numbers = torch.randint(
                -(1 << 62), 1 << 62, (_CHUNK,), dtype=torch.int64, generator=generator, device="cpu"
            )
            self._weights[device] = (2 * numbers + 1).to(device)
        return self._weights[device]


def _chunks(words: torch.Tensor) -> Iterator[torch.Tensor]:
    for start in range(0, words.numel(), _CHUNK):
        yield words[start : start + _CHUNK]


class Proof:
    """What pieces should hold, taken from the tensors as they come, against what the targets do hold."""

    def __init__(self, plan: ReloadPlan, device: torch.device) -> None:
        """Makes an empty one; `device` is where the targets lie, and where the sums are taken."""
        self._device = device
        self._plan = plan
        self.checksums = Checksums()
        self._pieces: dict[str, list[Piece]] = {}
        for pieces in plan.pieces.values():
            for piece in pieces:
                self._pieces.setdefault(piece.target, []).append(piece)
        self._expected: dict[Piece, torch.Tensor] = {}
        self._found: dict[Piece, torch.Tensor] = {}

    def expect(self, tensors: Sequence[tuple[str, torch.Tensor]], targets: Iterable[str]) -> None:
        """Takes the checksums of what these tensors bring to `targets`."""
        wanted = set(targets)
        for name, tensor in tensors:
            pieces = [piece for piece in self._plan.pieces.get(name, ()) if piece.target in wanted]
            if pieces and tensor.device != self._device:
                tensor = tensor.to(self._device)  # noqa: PLW2901 - the same tensor elsewhere
            for piece in pieces:
                part = view_of(tensor, piece.region, piece.source_dtype).to(piece.target_dtype)
                self._expected[piece] = self.checksums.of(part)

    def find(self, target: str, memory: torch.Tensor) -> None:
        """Takes the checksums of what a target holds; the last call counts."""
        for piece in self._pieces.get(target, ()):
            self._found[piece] = self.checksums.of(view_of(memory, piece.place, piece.target_dtype))

    def differing(self, targets: Iterable[str]) -> Mapping[str, str]:
        """Target -> the first tensor that is not in it as planned, of those whose checksums were taken."""
        wanted = set(targets)
        pieces = [piece for piece in self._expected if piece.target in wanted]
        if not pieces:
            return {}
        missing = [piece for piece in pieces if piece not in self._found]
        pieces = [piece for piece in pieces if piece in self._found]
        wrong = list[Piece]()
        if pieces:
            expected = torch.stack([self._expected[piece] for piece in pieces])
            found = torch.stack([self._found[piece] for piece in pieces])
            differs = cast("list[bool]", cast("Any", expected != found).tolist())
            wrong = [piece for piece, wrong in zip(pieces, differs, strict=True) if wrong]
        result: dict[str, str] = {}
        for piece in (*missing, *wrong):
            result.setdefault(piece.target, piece.source)
        return result
