"""What a trainer does not name: `python -m tests.zoo.unnamed_buffers CHECKPOINTS` in vLLM's environment.

A model that started with noise for weights takes what a trainer's `named_parameters()` lists of a checkpoint: all but
its buffers. Prints JSON: what became of each update and comparison.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from checkpoint_engine.contract.sink import Update
from checkpoint_engine_vllm.sink import LENIENT, VllmSink
from tests.oracle.walk import differences
from tests.zoo.senders import Order, Sender
from tests.zoo.vllm_engine import ENVIRONMENT, build, contents_of, prepare
from tests.zoo.vllm_families import FAMILIES
from tests.zoo.vllm_process import read

CPU = torch.device("cpu")
FAMILY = FAMILIES["Gemma4ForCausalLM"]
BUFFER = "layer_scalar"
ORDER = Order(100_000, seed=None)
Checkpoint = dict[str, torch.Tensor]


class Engine:
    """One that started with noise."""

    def __init__(self, checkpoints: Path, cold: Mapping[str, Mapping[str, str]]) -> None:
        self._worker, self._cold = build(FAMILY, checkpoints / "A", "dummy", CPU), cold
        self._sink = VllmSink(self._worker)
        self._sender = Sender(self._sink, CPU)

    def update(self, tensors: Checkpoint, tag: str) -> dict[str, Any]:
        said = self._sender.send(tensors, "auto", ORDER)
        return {**said, "version": self._sink.version, "differing": self.differing(tag)}

    def verify(self, tensors: Checkpoint) -> dict[str, Any]:
        return self._sender.send(tensors, "verify", ORDER)

    def take_unannounced(self, tensors: Checkpoint, tag: str) -> dict[str, Any]:
        """As vLLM's own trainers send them."""
        said: dict[str, Any] = {"error": ""}
        try:
            self._sink.begin(Update("id", "zoo", "v", {}, open_ended=True))
            self._sink.load(list(tensors.items()))
            self._sink.finish()
        except Exception as error:  # noqa: BLE001 - told to the test
            said = {"error": str(error), "intact": self._sink.abort()}
        return {**said, "version": self._sink.version, "differing": self.differing(tag)}

    def differing(self, tag: str) -> list[str]:
        return differences(contents_of(self._worker), self._cold[tag])


def found(checkpoints: Path) -> dict[str, Any]:
    cold = json.loads((checkpoints / "cold.json").read_text())
    whole = {tag: read(checkpoints / tag) for tag in "AB"}
    named = {tag: {name: each for name, each in whole[tag].items() if BUFFER not in name} for tag in "AB"}
    engine = Engine(checkpoints, cold)
    result = {
        "first": engine.update(named["A"], "A"),
        "first compared": engine.verify(named["A"]),
        "whole": engine.update(whole["A"], "A"),
        "later": engine.update(named["B"], "B"),
        "later compared": engine.verify(named["B"]),
        "later compared with all": engine.verify(whole["B"]),
        "unannounced": Engine(checkpoints, cold).take_unannounced(named["A"], "A"),
        "unannounced and whole": Engine(checkpoints, cold).take_unannounced(whole["A"], "A"),
    }
    os.environ[LENIENT] = "1"
    engine = Engine(checkpoints, cold)
    return {
        **result,
        "lenient": engine.update(named["A"], "A"),
        "lenient compared": engine.verify(named["A"]),
        "lenient compared with all": engine.verify(whole["A"]),
    }


def main(checkpoints: Path) -> None:
    os.environ.update(ENVIRONMENT)
    prepare(CPU, Path(tempfile.mkdtemp()) / "rendezvous")
    torch.set_num_threads(1)
    print(json.dumps(found(checkpoints)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
