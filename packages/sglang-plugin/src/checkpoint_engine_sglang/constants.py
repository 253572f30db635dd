"""What a checkpoint brings nothing for: constants of the model, or something that it should have brought.

A start without weights puts noise into both. If the checkpoint of the start has no more names than this one, it is a
constant. If that is not known, or it has, then a parameter should have come; and of a buffer the loader says it: it is
offered a tensor of the name that the buffer would have in this checkpoint.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open

from checkpoint_engine.sdk import TensorSpec
from checkpoint_engine.sdk.plans import LoaderError, Recording, record
from checkpoint_engine_sglang import compat
from checkpoint_engine_sglang.compat import Runner
from checkpoint_engine_sglang.layouts import first_values_of, without_data

__all__ = ["find_constants", "names_at_start"]

_INDEX = "model.safetensors.index.json"


def find_constants(
    runner: Runner, recording: Recording, tensors: Collection[str]
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """What gets nothing: constants, with their values, and buffers that the loader would take from a checkpoint.

    Args:
        runner: The model as it serves.
        recording: Of its loader with all tensors of a checkpoint.
        tensors: Their names.
    """
    model, parameters = runner.model, dict(runner.model.named_parameters())
    held = {
        f"{module}.{own}".lstrip("."): tensor.untyped_storage().data_ptr()
        for module, one in compat.named_modules(model)
        for own, tensor in compat.kept_tensors(one).items()
    }
    filled = {held[target] for target in recording.origins if target in held}  # under whatever names, as tied heads are
    left = {name: value for name, value in first_values_of(model).items() if held.get(name) not in {None, *filled}}
    names = names_at_start(runner.path) if left else frozenset[str]()
    # A draft model may hold parameters of the served one, which that one fills.
    if names and names <= set(tensors) and runner.role == "target":
        return left, []
    left = {name: value for name, value in left.items() if name not in parameters}
    prefixes = _prefixes(recording.origins)
    lacking = [name for name in left if _is_taken(model, name, prefixes)]
    return {name: value for name, value in left.items() if name not in lacking}, lacking


@functools.cache
def names_at_start(directory: str) -> frozenset[str]:
    """The tensors of the checkpoint that the engine was started with; none if that is not to be found."""
    try:
        index = Path(directory) / _INDEX
        if index.is_file():
            return frozenset(json.loads(index.read_text())["weight_map"])
        names: set[str] = set()
        for file in Path(directory).glob("model*.safetensors"):
            with cast("Any", safe_open)(file, framework="pt") as opened:
                names.update(opened.keys())
        return frozenset(names)
    except (OSError, ValueError, KeyError, SafetensorError):
        return frozenset()


def _is_taken(model: torch.nn.Module, buffer: str, prefixes: Mapping[str, str]) -> bool:
    named = _named_alike(buffer, prefixes)
    with without_data(model) as targets:
        if buffer not in targets:
            return False
        spec = TensorSpec(targets[buffer].dtype, tuple(targets[buffer].shape))
        try:
            found = record(compat.loader_of(model), targets, {named: spec})
        except LoaderError:  # it does not know the name
            return False
    return named in found.origins.get(buffer, ())


def _named_alike(target: str, prefixes: Mapping[str, str]) -> str:
    """What a checkpoint would call something, going by what it calls its neighbours."""
    parts = target.split(".")
    for kept in range(len(parts) - 1, 0, -1):
        prefix = ".".join(parts[:kept])
        if prefix in prefixes:
            return ".".join(filter(None, (prefixes[prefix], *parts[kept:])))
    return target


def _prefixes(origins: Mapping[str, set[str]]) -> dict[str, str]:
    """Module -> what checkpoints call it, from parameters that have the same name in it as in the checkpoint."""
    found: dict[str, str] = {}
    for target, names in origins.items():
        for name in names:
            here, there = target.split("."), name.split(".")
            while here and there and here[-1] == there[-1]:
                here.pop()
                there.pop()
                found.setdefault(".".join(here), ".".join(there))
    return found
