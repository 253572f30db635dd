"""Which quantised layers cannot be given new weights."""

from __future__ import annotations

import os

from checkpoint_engine_sglang import compat
from checkpoint_engine_sglang.compat import Runner
from checkpoint_engine_sglang.layouts import layouts_of

QUANTISED = "CHECKPOINT_ENGINE_SGLANG_QUANTISED"
"""Environment variable: `1` updates quantised layers that are not known to survive it."""

_MOST_NAMED = 4
_RENAMED = ("mxfp8",)
"""Methods for which SGLang's loaders change the names of tensors before the model sees them."""


def find_unsafe(runner: Runner) -> str:
    """The layers whose weights cannot be replaced, and why; empty if there are none, or the user takes the risk."""
    if os.environ.get(QUANTISED) == "1" or compat.is_reloading_by_itself(runner.model):
        return ""
    found: dict[str, list[str]] = {}
    layouts = layouts_of(runner.model)
    for name, _, method in compat.processed_modules(runner.model):
        reason = _why_unsafe(runner, method, known=name in layouts)
        if reason:
            found.setdefault(reason, []).append(name)
    return "; ".join(
        f"{reason}: {', '.join(names[:_MOST_NAMED])}"
        + (f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else "")
        for reason, names in found.items()
    )


def is_quantised(runner: Runner) -> bool:
    """Whether any layer holds something else than what the checkpoint of its kind has in 16 bits."""
    return any(not compat.is_unquantised(method) for _, _, method in compat.processed_modules(runner.model))


def _why_unsafe(runner: Runner, method: object, *, known: bool) -> str:
    kind = type(method).__name__
    if compat.is_unquantised(method):
        return ""
    if not known:
        return f"the plugin has not seen what the weights of {kind} were like when SGLang made the model"
    if getattr(runner.config, "quantization", None) in _RENAMED:
        return f"SGLang renames tensors of {runner.config.quantization} outside of the model's own loader"
    return ""
