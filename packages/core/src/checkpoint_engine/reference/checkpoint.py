"""Writes real checkpoints for the reference engine."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import torch
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]

from checkpoint_engine.contract.sink import TensorSpec
from checkpoint_engine.errors import SettingError
from checkpoint_engine.reference.model import ModelSpec, checkpoint_tensors

__all__ = ["CONFIG", "make_checkpoint"]

_INDEX = "model.safetensors.index.json"
CONFIG = "config.json"


def make_checkpoint(directory: Path, spec: ModelSpec, seed: int, *, shards: int = 2, device: str = "cpu") -> Path:
    """Writes a checkpoint with random values: `shards` safetensors files, an index and the spec.

    Args:
        directory: Made if need be; files of the same names are overwritten.
        spec: What the checkpoint holds.
        seed: Two seeds give two checkpoints that differ in every tensor.
        shards: Number of files.
        device: Where the random numbers come from; a GPU is quicker for large specs.

    Raises:
        SettingError: there are fewer tensors than shards.
    """
    tensors = dict(checkpoint_tensors(spec))
    if not 0 < shards <= len(tensors):
        raise SettingError(f"{len(tensors)} tensors cannot be written to {shards} files")
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator(device=device).manual_seed(seed)
    weight_map: dict[str, str] = {}
    total = 0
    for index, names in enumerate(_shards(tensors, shards)):
        file = f"model-{index + 1:05}-of-{shards:05}.safetensors"
        content = {name: _random_tensor(tensors[name], generator).cpu() for name in names}
        save_file(content, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
        total += sum(tensor.nbytes for tensor in content.values())
    index_json = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / _INDEX).write_text(json.dumps(index_json, indent=1))
    (directory / CONFIG).write_text(spec.to_json())
    return directory


def _shards(tensors: dict[str, TensorSpec], shards: int) -> list[list[str]]:
    """Cuts the names into runs of about the same number of tensors."""
    names = list(tensors)
    bounds = [len(names) * index // shards for index in range(shards + 1)]
    return [names[start:end] for start, end in itertools.pairwise(bounds)]


def _random_tensor(spec: TensorSpec, generator: torch.Generator) -> torch.Tensor:
    if spec.dtype.is_floating_point:
        values = torch.rand(spec.shape, generator=generator, device=generator.device)
        return values.sub_(0.5).to(spec.dtype)
    if spec.dtype == torch.bool:
        return torch.rand(spec.shape, generator=generator, device=generator.device) < 0.5  # noqa: PLR2004
    return torch.randint(0, 100, spec.shape, generator=generator, device=generator.device, dtype=spec.dtype)
