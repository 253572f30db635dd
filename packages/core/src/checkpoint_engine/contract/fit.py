"""Whether a checkpoint fits a model: what it would leave without weights, and what would be cut.

An engine's loader, run without data, shows how many elements it takes of each tensor, and how many it writes into each
parameter. What is to be made of that is said here; what a parameter is, the engine's plugin says.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from checkpoint_engine.contract.findings import listed
from checkpoint_engine.contract.sink import TensorSpec
from checkpoint_engine.errors import WeightsRejectedError

__all__ = ["NOT_FILLED", "TOO_LARGE", "UNKNOWN", "Coverage", "fingerprint", "missing", "refuse", "too_large", "torn"]

NOT_FILLED = "the checkpoint does not fill these parameters of the model"
TOO_LARGE = "these tensors are larger than the model's parameters"
UNKNOWN = "the model does not know these tensors"
_UNFIT = "is the checkpoint complete, and of the served model?"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Coverage:
    """How much of a parameter a checkpoint fills."""

    elements: int
    filled: int
    tensors: frozenset[str]
    """Those that something of it comes from."""

    @property
    def complete(self) -> bool:
        """Whether every element is filled."""
        return self.filled >= self.elements

    def describe(self) -> str:
        """What it gets, for people."""
        if not self.filled:
            return "nothing"
        return f"{self.filled} of {self.elements} elements, from {', '.join(sorted(self.tensors))}"


def missing(parameters: Mapping[str, Coverage], may_lack: Callable[[str], bool]) -> list[str]:
    """Parameters that would stay without (some of) their weights, with what they would get.

    Args:
        parameters: By name.
        may_lack: Whether the engine does without (some of) them: it has a default, or another model fills it.
    """
    return [
        f"{name} ({coverage.describe()})"
        for name, coverage in parameters.items()
        if not coverage.complete and not may_lack(name)
    ]


def torn(parameters: Mapping[str, Coverage], may_lack: Callable[[str], bool]) -> list[str]:
    """Of those that `missing` finds, the ones in layers of which something else is filled.

    Engines make such a layer anew for its weights: what gets none would not keep what it holds.
    """
    filled = {_layer(name) for name, coverage in parameters.items() if coverage.filled}
    return missing({name: each for name, each in parameters.items() if _layer(name) in filled}, may_lack)


def _layer(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def too_large(
    tensors: Mapping[str, TensorSpec], taken: Mapping[tuple[str, str], int], shared_by: Callable[[str, str], int]
) -> list[str]:
    """Tensors of which all workers together would take only a part: loaders cut silently what is too long.

    Args:
        tensors: What comes, by name.
        taken: Tensor and parameter -> how many elements of it this worker puts there.
        shared_by: How many workers share a tensor (the first argument) for this parameter between them, each taking its
            own part. (Workers that hold the same part, or another stage of the model, do not count.)
    """
    here: dict[str, int] = {}
    everywhere: dict[str, int] = {}
    for (name, parameter), elements in taken.items():
        here[name] = here.get(name, 0) + elements
        everywhere[name] = everywhere.get(name, 0) + elements * shared_by(name, parameter)
    return [
        f"{name} (shape {list(tensors[name].shape)}, {here[name]} elements taken)"
        for name, elements in everywhere.items()
        if elements < math.prod(tensors[name].shape)
    ]


def refuse(
    problem: str,
    names: Sequence[str],
    *,
    engine: str,
    variable: str,
    lenient: bool,
    hint: str = _UNFIT,
    halves: Sequence[str] = (),
) -> None:
    """Raises if there are any names, unless the user accepts such checkpoints.

    Args:
        problem: What is wrong with them.
        names: Of tensors or parameters.
        engine: Such as vLLM.
        variable: The environment variable by which its user accepts that.
        lenient: Whether that is set.
        hint: What to do.
        halves: Those that nobody can accept; see `torn`.

    Raises:
        WeightsRejectedError: it says what is wrong with which tensors.
    """
    if not names:
        return
    if lenient and halves:
        raise WeightsRejectedError(
            f"{problem}: {listed(halves)}; a layer is updated whole or not at all, also with {variable}=1: bring all "
            "of its tensors, or none"
        )
    message = f"{problem}: {listed(names)}"
    if lenient:
        logger.warning("%s (accepted, %s=1)", message, variable)
        return
    raise WeightsRejectedError(
        f"{message}; {hint} ({variable}=1 in the engine's environment accepts it as far as {engine} does; parameters "
        "without weights then keep what they hold)"
    )


def fingerprint(tensors: Mapping[str, TensorSpec]) -> str:
    """Stands for the names, shapes and dtypes of tensors, in whatever order they come."""
    digest = hashlib.sha256()
    for name, spec in sorted(tensors.items()):
        digest.update(f"{name}\0{spec.dtype}\0{spec.shape}\n".encode())
    return digest.hexdigest()
