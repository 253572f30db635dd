"""Loaders that do more than copy: `python -m tests.zoo.more_than_copies CHECKPOINTS` in vLLM's environment.

vLLM's Llama keeps something else that comes from its last norm, in one way after the other, and takes updates. What it
then holds is compared with cold loads, and with a checkpoint by the plugin, before and after that something is changed.
Prints JSON: the case -> what was found.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from checkpoint_engine_vllm.sink import VllmSink
from tests.oracle.walk import differences
from tests.zoo.senders import Order, Sender
from tests.zoo.vllm_engine import ENVIRONMENT, build, contents_of, prepare
from tests.zoo.vllm_families import FAMILIES
from tests.zoo.vllm_process import read

Weights = Iterable[tuple[str, torch.Tensor]]
Load = Callable[[Any, Weights], object]
CPU = torch.device("cpu")
FAMILY = FAMILIES["LlamaForCausalLM"]
ORDER = Order(1, seed=None)


def made_anew(model: Any) -> None:
    model.model.norm.held = {"twice": model.model.norm.weight.detach() * 2}


def made_anew_of_values(model: Any) -> None:
    """Not seen when the loader is run without data."""
    if not model.model.norm.weight.is_meta:
        made_anew(model)


def in_place(model: Any) -> None:
    norm = model.model.norm
    if not norm.weight.is_meta:
        norm.held = getattr(norm, "held", None) or {"twice": torch.zeros(norm.weight.numel(), device="cpu")}
        norm.held["twice"].copy_(norm.weight * 2)


def number(model: Any) -> None:
    """Of the whole model, and no tensor."""
    if not model.model.norm.weight.is_meta:
        model.total = float(model.model.norm.weight.float().sum())


def spoil(model: Any) -> None:
    if hasattr(model, "total"):
        model.total += 1
    else:
        getattr(model.model.norm, "held", {"twice": model.model.norm.weight})["twice"].data[-1] += 1


def afterwards(do: Callable[[Any], None]) -> Callable[[Load], Load]:
    def wrapped(original: Load) -> Load:
        def load_weights(self: Any, weights: Weights) -> object:
            loaded = original(self, weights)
            do(self)
            return loaded

        return load_weights

    return wrapped


def guesses(original: Load) -> Load:
    """By a name that it knows what kind of checkpoint this is, in each call, as vLLM 0.26 does for embeddings."""

    def load_weights(self: Any, weights: Weights) -> object:
        given, known = list(weights), dict(self.named_parameters())
        if given and not any(name in known for name, _ in given):
            raise ValueError(f"which model is {given[0][0]!r} of?")
        return original(self, given)

    return load_weights


CASES: dict[str, Callable[[Load], Load]] = {
    **{do.__name__: afterwards(do) for do in (made_anew, made_anew_of_values, in_place, number)},
    "guesses": guesses,
}


def tried(wrap: Callable[[Load], Load], checkpoints: Path) -> dict[str, Any]:
    kind: Any = importlib.import_module("vllm.model_executor.models.llama").LlamaForCausalLM
    original = kind.load_weights
    kind.load_weights = wrap(original)
    try:
        cold = {tag: contents_of(build(FAMILY, checkpoints / tag, "auto", CPU)) for tag in "AB"}
        return updated(checkpoints, cold)
    finally:
        kind.load_weights = original


def updated(checkpoints: Path, cold: dict[str, dict[str, str]]) -> dict[str, Any]:
    worker = build(FAMILY, checkpoints / "A", "auto", CPU)
    model, sender = worker.model_runner.get_model(), Sender(VllmSink(worker), CPU)
    tensors = {tag: read(checkpoints / tag) for tag in "AB"}
    steps = []
    for tag in "BABA":
        said = sender.send(tensors[tag], "auto", ORDER)
        steps.append({**said, "differing": differences(contents_of(worker), cold[tag])})
    equal = sender.send(tensors["A"], "verify", ORDER)
    spoil(model)
    spoiled = contents_of(worker)
    other = sender.send(tensors["A"], "verify", ORDER)
    return {
        "steps": steps,
        "equal": equal,
        "spoiled": other,
        "changed by it": differences(contents_of(worker), spoiled),
    }


def main(checkpoints: Path) -> None:
    os.environ.update(ENVIRONMENT)
    prepare(CPU, Path(tempfile.mkdtemp()) / "rendezvous")
    torch.set_num_threads(1)
    print(json.dumps({case: tried(wrap, checkpoints) for case, wrap in CASES.items()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
