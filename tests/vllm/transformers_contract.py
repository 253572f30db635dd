"""Runs in vLLM's environment, which has transformers: the contract of sinks, on the example's.

transformers_contract.py FIRST SECOND     two models of one shape; prints the checks that fail as JSON
"""

from __future__ import annotations

import hashlib
import json
import sys

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers_engine.sink import TransformersSink

from checkpoint_engine.sdk.testing import EngineUnderTest, run_checks


class UnderTest(EngineUnderTest):
    def __init__(self, directories: list[str]) -> None:
        self._fresh = [AutoModelForCausalLM.from_pretrained(directory) for directory in directories]
        self._model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directories[0]))
        self._sink = TransformersSink(self._model)

    @property
    def sink(self) -> TransformersSink:
        return self._sink

    def checkpoint(self, number: int) -> dict[str, torch.Tensor]:
        return {name: parameter.data for name, parameter in self._fresh[number].named_parameters()}

    def cold(self, number: int) -> dict[str, str]:
        return digests(self._fresh[number])

    def state(self) -> dict[str, str]:
        return digests(self._model)

    def addresses(self) -> dict[str, int]:
        return {name: parameter.data_ptr() for name, parameter in self._model.named_parameters()}

    def spoil(self) -> None:
        dict(self._model.named_parameters())["model.norm.weight"].data.view(torch.uint8)[5] ^= 1


def digests(model: torch.nn.Module) -> dict[str, str]:
    return {
        name: hashlib.sha256(tensor.data.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in model.named_parameters()
    }


if __name__ == "__main__":
    verdicts = run_checks(UnderTest(sys.argv[1:]))
    print(json.dumps({name: words for name, words in verdicts.items() if words}))
