"""Runs in SGLang's environment: the contract of sinks, on a model as SGLang loads it.

contract_process.py DIRECTORY NAME     NAME: a checkpoint there, beside another one, NAME-b

Prints JSON: the checks of the sdk that fail, and why; and how the first updates of three engines went, of which the
second finds what the first has proved, and the third does not.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from quantised_process import bits, load, numbers_of, read, start, tensors_of

from checkpoint_engine.sdk import TensorSpec, Update
from checkpoint_engine.sdk.testing import EngineUnderTest, run_checks


class UnderTest(EngineUnderTest):
    """One of SGLang's models, without a scheduler around it."""

    def __init__(self, directories: list[Path]) -> None:
        from checkpoint_engine_sglang.compat import Runner
        from checkpoint_engine_sglang.sink import SGLangSink

        self._tensors = [read(directory) for directory in directories]
        self._cold = [state_of(load(directory, "")[0]) for directory in directories]
        self._model, config = load(directories[0], "", "dummy")
        runner = Runner("target", self._model, config, torch.device("cpu"), has_graphs=True)
        self._sink = SGLangSink([runner], 1)

    @property
    def sink(self) -> Any:
        return self._sink

    def checkpoint(self, number: int) -> dict[str, torch.Tensor]:
        return self._tensors[number]

    def cold(self, number: int) -> dict[str, str]:
        return self._cold[number]

    def state(self) -> dict[str, str]:
        return state_of(self._model)

    def addresses(self) -> dict[str, int]:
        return {name: tensor.data_ptr() for name, tensor in tensors_of(self._model)}

    def spoil(self) -> None:
        dict(self._model.named_parameters())["model.norm.weight"].data.view(torch.uint8)[5] ^= 1


def state_of(model: torch.nn.Module) -> dict[str, str]:
    tensors = {name: hashlib.sha256(bits(tensor).numpy().tobytes()).hexdigest() for name, tensor in tensors_of(model)}
    return tensors | {name: repr(number) for name, number in numbers_of(model).items()}


def first_update(under_test: UnderTest, proofs: str) -> tuple[str, list[str]]:
    """How it went, and what a cold start holds otherwise."""
    os.environ["CHECKPOINT_ENGINE_PROOFS"] = proofs
    tensors, sink = under_test.checkpoint(1), under_test.sink
    specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    sink.begin(Update("id", "checkpoint", "version", specs))
    for pair in tensors.items():
        sink.load([pair])
    way, held, cold = sink.finish().reload, under_test.state(), under_test.cold(1)
    return way, sorted(name for name in held.keys() | cold.keys() if held.get(name) != cold.get(name))[:5]


if __name__ == "__main__":
    parent, name = Path(sys.argv[1]), sys.argv[2]
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    start(parent / name)
    with torch.inference_mode():
        directories = [parent / name, parent / f"{name}-b"]
        verdicts = run_checks(UnderTest(directories))
        with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
            firsts = [first_update(UnderTest(directories), proofs) for proofs in (one, one, two)]
    print(json.dumps({"failed": {check: words for check, words in verdicts.items() if words}, "firsts": firsts}))
