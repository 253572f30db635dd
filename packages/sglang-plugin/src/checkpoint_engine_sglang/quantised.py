"""Which quantised layers cannot be given new weights."""

from __future__ import annotations

import os

import torch

from checkpoint_engine_sglang import compat
from checkpoint_engine_sglang.compat import Runner
from checkpoint_engine_sglang.layouts import LayerLayout, layouts_of, owners

__all__ = ["QUANTISED", "find_unsafe"]

QUANTISED = "CHECKPOINT_ENGINE_SGLANG_QUANTISED"
"""Environment variable: `1` updates quantised layers that are not known to survive it."""

_MOST_NAMED = 4
_COMPARED = frozenset(
    {
        "CompressedTensorsW4A4Fp4",
        "CompressedTensorsW8A8Fp8",
        "CompressedTensorsW8A8Int8",
        "Fp8LinearMethod",
        "Fp8MoEMethod",
        "ModelOptFp4LinearMethod",
        "ModelOptNvFp4FusedMoEMethod",
        "Mxfp4FlashinferTrtllmMoEMethod",
        "Mxfp4MoEMethod",
        "W8A8Int8LinearMethod",
    }
)
"""What processes layers that were compared with a start after updates; for docs/sglang.md."""


def find_unsafe(runner: Runner) -> str:
    """The layers whose weights cannot be replaced, and why; empty if there are none, or the user takes the risk."""
    if os.environ.get(QUANTISED) == "1" or compat.is_reloading_by_itself(runner.model):
        return ""
    found: dict[str, list[str]] = {}
    layouts = layouts_of(runner.model)
    for name, module, method in compat.processed_modules(runner.model):
        reason = _why_unsafe(module, method, layouts.get(name))
        if reason:
            found.setdefault(reason, []).append(name)
    return "; ".join(
        f"{reason}: {', '.join(names[:_MOST_NAMED])}"
        + (f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else "")
        for reason, names in found.items()
    )


def _why_unsafe(module: torch.nn.Module, method: object, layout: LayerLayout | None) -> str:
    if compat.is_unquantised(method):
        return ""
    kind = _kind(module, method)
    if layout is None:
        return f"the plugin has not seen what the weights of {kind} were like when SGLang made the model"
    if len(layout.plain) != len([*owners(module)]):
        return f"SGLang has exchanged what processes the weights of {kind}"
    if kind not in _COMPARED and not kind.endswith("KVCacheMethod"):
        return f"updates of {kind} were never compared with a start"
    return ""


def _kind(module: torch.nn.Module, method: object) -> str:
    scheme = vars(module).get("scheme")
    kind = type(method if scheme is None else scheme).__name__
    is_mxfp8 = kind.endswith("MoEMethod") and getattr(method, "use_mxfp8", False)
    return f"{kind} for MXFP8" if is_mxfp8 else kind
