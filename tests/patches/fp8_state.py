"""What layers hold, and where two of them differ."""

from __future__ import annotations

import types
from collections.abc import Iterator

import torch

NUMBER = "number"


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor and number that a kernel may be given."""
    found = dict(model.named_parameters()) | dict(model.named_buffers())
    objects = {name: vars(layer) for name, layer in model.named_modules()}
    objects |= {f"{name}.method": vars(at["quant_method"]) for name, at in objects.items() if "quant_method" in at}
    objects["impl"] = vars(getattr(model, "impl", types.SimpleNamespace()))
    for name, attributes in objects.items():
        for key, value in attributes.items():
            if isinstance(value, torch.Tensor):
                found[f"{name}.{key}"] = value
            elif isinstance(value, (bool, int, float)) and not key.startswith("_already_called"):
                found[f"{NUMBER} {name}.{key}"] = torch.tensor(value)
            for field, inner in tensors_in(value):
                found[f"{name}.{key}.{field}"] = inner
    return {name: value.detach() for name, value in found.items() if value.numel()}


def tensors_in(value: object) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of a kernel's configuration, which refer to those of the layer or are its own."""
    for part, desc in getattr(value, "__dict__", {}).items():
        scales = getattr(desc, "scale", None)
        if type(value).__module__.endswith("fused_moe.config") and isinstance(scales, torch.Tensor):
            yield part, scales


def differences(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    wrong = [f"{name} is there only once" for name in found.keys() ^ expected.keys()]
    for name in found.keys() & expected.keys():
        a, b = found[name], expected[name]
        if (a.shape, a.stride(), a.dtype) != (b.shape, b.stride(), b.dtype):
            wrong.append(f"{name} has another layout")
        elif not torch.equal(as_bytes(a), as_bytes(b)):
            wrong.append(f"{name} has other values")
    return sorted(wrong)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def addresses(model: torch.nn.Module) -> dict[str, int]:
    """Where captured graphs would look for these tensors."""
    return {name: value.data_ptr() for name, value in state(model).items() if not name.startswith(NUMBER)}
