"""A small tensor-parallel engine in plain torch, for the demo and for tests.

It does to weights what real engines do: shards and fuses them, stacks experts, pads the vocabulary, and never
moves a parameter. It runs no model.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]

from checkpoint_engine.contract.sink import TensorSpec
from checkpoint_engine.errors import CheckpointFormatError, WeightsRejectedError
from checkpoint_engine.reference.checkpoint import CONFIG, make_checkpoint
from checkpoint_engine.reference.model import ModelSpec, plan_layout

__all__ = ["Comparison", "ModelSpec", "ReferenceEngine", "make_checkpoint"]

_DUMMY_BYTE = 0x3C
"""Fills parameters before weights come; as bfloat16 it is 0.0115."""
_MOST_NAMES = 5
"""Names of tensors or parameters repeated in a message."""


@dataclass(frozen=True)
class Comparison:
    """Outcome of comparing two workers' parameters byte by byte."""

    parameters: int
    tensors: int
    nbytes: int
    different: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether every byte is the same."""
        return not self.different


class ReferenceEngine:
    """One worker: the shard of tensor-parallel rank `tp_rank`, with dummy values until weights are loaded."""

    def __init__(
        self, spec: ModelSpec, *, tp_rank: int = 0, tp_size: int = 1, device: torch.device | str = "cpu"
    ) -> None:
        self.spec, self.tp_rank, self.tp_size = spec, tp_rank, tp_size
        self.device = torch.device(device)
        self.layout = plan_layout(spec, tp_rank, tp_size)
        self.parameters = {name: _dummy(shape, self.device) for name, shape in self.layout.parameters.items()}

    @classmethod
    def cold_start(
        cls, directory: Path, *, tp_rank: int = 0, tp_size: int = 1, device: torch.device | str = "cpu"
    ) -> ReferenceEngine:
        """Builds a worker straight from the files of a checkpoint, as an engine that starts anew would.

        Raises:
            SettingError: the directory has no `config.json` of a reference model.
            CheckpointFormatError: the directory holds no safetensors files.
            WeightsRejectedError: the files hold other tensors than the spec says.
        """
        spec = ModelSpec.parse(str(directory / CONFIG))
        engine = cls(spec, tp_rank=tp_rank, tp_size=tp_size, device=device)
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise CheckpointFormatError(f"{directory} holds no *.safetensors files")
        loaded: set[str] = set()
        for file in files:
            loaded |= engine.load_weights(load_file(file).items())
        engine.check_complete(loaded)
        return engine

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Copies this worker's part of each tensor into its parameters, in place; returns the names.

        Raises:
            WeightsRejectedError: a tensor is unknown or misshapen; nothing was written.
        """
        offered = list(tensors)
        self.check_tensors(_specs(offered))
        return self.write(offered)

    def write(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """`load_weights` for tensors that `check_tensors` has accepted."""
        for name, tensor in tensors:
            slot = self.layout.slots[name]
            self.parameters[slot.parameter][slot.into].copy_(tensor[slot.take], non_blocking=True)
            if slot.zeros is not None:
                self.parameters[slot.parameter][slot.zeros].zero_()
        return {name for name, _ in tensors}

    def check_tensors(self, tensors: Mapping[str, TensorSpec]) -> None:
        """Raises unless every tensor is known here and has the right shape.

        Raises:
            WeightsRejectedError: a tensor is unknown or misshapen.
        """
        slots = self.layout.slots
        unknown = [name for name in tensors if name not in slots]
        if unknown:
            raise WeightsRejectedError(f"the engine does not know {_listing(unknown)}")
        for name, tensor in tensors.items():
            if tensor.shape != slots[name].spec.shape:
                raise WeightsRejectedError(
                    f"tensor {name!r} has the shape {tensor.shape}, the engine needs {slots[name].spec.shape}"
                )

    def check_complete(self, names: Iterable[str]) -> None:
        """Raises unless `names` are all that the engine needs.

        Raises:
            WeightsRejectedError: some are missing.
        """
        given = set(names)
        missing = [name for name in self.layout.slots if name not in given]
        if missing:
            raise WeightsRejectedError(f"the engine needs {_listing(missing)}, which did not come")

    def compare(self, other: ReferenceEngine) -> Comparison:
        """Compares all parameters with those of another worker, byte by byte."""
        different = [
            name
            for name, parameter in self.parameters.items()
            if not torch.equal(_raw(parameter).cpu(), _raw(other.parameters[name]).cpu())
        ]
        return Comparison(
            parameters=len(self.parameters),
            tensors=len(self.layout.slots),
            nbytes=sum(parameter.nbytes for parameter in self.parameters.values()),
            different=tuple(different),
        )

    def checksum(self) -> str:
        """SHA-256 over the raw bytes of all parameters, in order of name."""
        digest = hashlib.sha256()
        for name in sorted(self.parameters):
            raw = _raw(self.parameters[name]).cpu()
            digest.update((ctypes.c_char * raw.nbytes).from_address(raw.data_ptr()) if raw.nbytes else b"")
        return digest.hexdigest()

    def addresses(self) -> dict[str, int]:
        """Where each parameter lies; never changes."""
        return {name: parameter.data_ptr() for name, parameter in self.parameters.items()}


def _dummy(spec: TensorSpec, device: torch.device) -> torch.Tensor:
    parameter = torch.empty(spec.shape, dtype=spec.dtype, device=device)
    _raw(parameter).fill_(1 if spec.dtype == torch.bool else _DUMMY_BYTE)
    return parameter


def _specs(tensors: Sequence[tuple[str, torch.Tensor]]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors}


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor, as 1-D uint8 that shares its memory."""
    return tensor.reshape(-1).view(torch.uint8)


def _listing(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_MOST_NAMES])
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return f"tensor{'s' if len(names) > 1 else ''} {shown}{more}"
