"""The reference engine keeps the contract of a sink; and the checks find sinks that do not."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoint_engine.contract.figures import Figures
from checkpoint_engine.contract.sink import Update, WeightSink
from checkpoint_engine.reference.checkpoint import make_checkpoint
from checkpoint_engine.reference.engine import ReferenceEngine
from checkpoint_engine.reference.model import ModelSpec
from checkpoint_engine.reference.sink import ReferenceSink
from checkpoint_engine.sdk.testing import CHECKS, ContractBrokenError, EngineUnderTest

SPEC = ModelSpec(experts=4)


class ReferenceUnderTest(EngineUnderTest):
    def __init__(self, directory: Path, spec: ModelSpec) -> None:
        self._directories = [make_checkpoint(directory / str(seed), spec, seed=seed) for seed in (0, 1)]
        self._cold = [digests(ReferenceEngine.cold_start(directory).parameters) for directory in self._directories]
        self.engine = ReferenceEngine(spec)
        self._sink: WeightSink = ReferenceSink(self.engine)

    @property
    def sink(self) -> WeightSink:
        return self._sink

    def replace_sink(self, sink: WeightSink) -> None:
        self._sink = sink

    def checkpoint(self, number: int) -> dict[str, torch.Tensor]:
        files = sorted(self._directories[number].glob("*.safetensors"))
        return {name: tensor for file in files for name, tensor in load_file(file).items()}

    def cold(self, number: int) -> Mapping[str, str]:
        return self._cold[number]

    def state(self) -> Mapping[str, str]:
        return digests(self.engine.parameters)

    def addresses(self) -> Mapping[str, int]:
        return {name: parameter.data_ptr() for name, parameter in self.engine.parameters.items()}

    def spoil(self) -> None:
        self.engine.parameters["model.norm.weight"].view(torch.uint8)[5] ^= 1


def digests(parameters: Mapping[str, torch.Tensor]) -> dict[str, str]:
    return {
        name: hashlib.sha256(parameter.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, parameter in parameters.items()
    }


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> ReferenceUnderTest:
    return ReferenceUnderTest(tmp_path_factory.mktemp("reference"), SPEC)


@pytest.mark.parametrize("name", CHECKS)
def test_the_reference_keeps_the_contract(name: str, engine: EngineUnderTest) -> None:
    CHECKS[name](engine)


class Keeps(ReferenceSink):
    """Holds on to memory that is used again."""

    def load(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        self.held = [*getattr(self, "held", []), *tensors]
        super().load(tensors)

    def finish(self) -> Figures:
        self.engine.load_weights(iter(self.held))
        self.held = []
        return super().finish()


class Optimistic(ReferenceSink):
    """Always says that the old weights are whole."""

    def abort(self) -> bool:
        super().abort()
        return True


class Forgetful(ReferenceSink):
    """Leaves one parameter as it was."""

    def load(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        held = self.engine.parameters["model.norm.weight"].clone()
        super().load(tensors)
        self.engine.parameters["model.norm.weight"].copy_(held)


class Moving(ReferenceSink):
    """Gives parameters new memory."""

    def begin(self, update: Update) -> None:
        super().begin(replace(update, reload="loader"))

    def finish(self) -> Figures:
        done = super().finish()
        self.engine.parameters["model.norm.weight"] = self.engine.parameters["model.norm.weight"].clone()
        return done


@pytest.mark.parametrize(
    ("make", "name", "words"),
    [
        (Keeps, "updates_in_a_row", "something else than a cold start"),
        (Forgetful, "updates_in_a_row", "model.norm.weight"),
        (Optimistic, "given_up_anywhere", "abort returned True"),
        (Moving, "addresses_stay", "moved"),
    ],
)
def test_a_sink_that_breaks_the_contract_is_found(
    make: Callable[[ReferenceEngine], WeightSink], name: str, words: str, tmp_path: Path
) -> None:
    engine = ReferenceUnderTest(tmp_path, SPEC)
    engine.replace_sink(make(engine.engine))
    with pytest.raises(ContractBrokenError, match=words):
        CHECKS[name](engine)
