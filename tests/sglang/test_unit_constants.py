"""What a checkpoint has nothing for: it goes back to what a start would hold, or the checkpoint is refused."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from checkpoint_engine.contract.figures import details_of
from checkpoint_engine.contract.sink import TensorSpec, Update
from checkpoint_engine.errors import WeightsRejectedError
from checkpoint_engine_sglang import layouts
from checkpoint_engine_sglang.compat import Runner
from checkpoint_engine_sglang.sink import SGLangSink

pytestmark = pytest.mark.pure

Weights = Iterable[tuple[str, torch.Tensor]]


def sink_of(model: nn.Module, started_with: Path = Path("nowhere")) -> SGLangSink:
    config = SimpleNamespace(model_path=str(started_with), hf_config=SimpleNamespace())
    return SGLangSink([Runner("target", model, config, torch.device("cpu"))], 1)


def update(sink: Any, given: dict[str, torch.Tensor], reload: str = "auto") -> dict[str, Any]:
    specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in given.items()}
    sink.begin(Update("id", "checkpoint", "version", specs, reload))
    sink.load(list(given.items()))
    return details_of(sink.finish())


class Buffered(nn.Module):
    """Has a constant, as Gemma-2's normalizer, and a scale that checkpoints bring, as Gemma-4's; both are buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.norm = nn.LayerNorm(2, bias=False)
        self.inner.register_buffer("normalizer", torch.tensor(8.0))
        self.inner.register_buffer("scale", torch.ones(1))
        self.inner.register_buffer("table", torch.ones(1), persistent=False)
        layouts.remember(self)

    def load_weights(self, weights: Weights) -> None:
        known = dict(self.named_parameters()) | {"inner.scale": self.inner.scale}
        for name, tensor in weights:
            known["inner." + name.removeprefix("language_model.")].data.copy_(tensor)


def test_a_constant_goes_back_to_its_value_and_a_buffer_that_checkpoints_bring_must_come() -> None:
    model = Buffered()
    given = {"language_model.norm.weight": torch.rand(2), "language_model.scale": torch.rand(1)}
    sink = sink_of(model)
    for _ in range(3):
        model.inner.normalizer.fill_(0.001)
        update(sink, given)
        assert (model.inner.normalizer, model.inner.scale) == (8.0, given["language_model.scale"])
    assert update(sink.verifier(), given, "verify")["different"] == ""
    model.inner.normalizer.fill_(7.0)
    assert update(sink.verifier(), given, "verify")["different"] == "inner.normalizer"
    given.pop("language_model.scale")
    with pytest.raises(WeightsRejectedError, match=r"does not fill these parameters .*inner\.scale \(nothing\)"):
        update(sink, given)


class Unused(nn.Module):
    """Has a norm that no checkpoint has, as Falcon-H1, and takes no pooler, as BERT."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(2, bias=False)
        self.unused = nn.LayerNorm(2, bias=False)
        layouts.remember(self)

    def load_weights(self, weights: Weights) -> None:
        known = dict(self.named_parameters())
        for name, tensor in weights:
            if name in known:
                known[name].data.copy_(tensor)


def test_a_checkpoint_with_all_that_the_one_of_the_start_has_is_taken(tmp_path: Path) -> None:
    given = {"norm.weight": torch.rand(2), "pooler.weight": torch.rand(2)}
    save_file(given, tmp_path / "model.safetensors")
    model = Unused()
    sink = sink_of(model, tmp_path)
    for _ in range(3):
        model.unused.weight.data.fill_(0.001)  # as a start without weights does
        update(sink, given)
        assert torch.equal(model.unused.weight, torch.ones(2))
    model.unused.weight.data[1] = 3
    assert update(sink.verifier(), given, "verify")["different"] == "unused.weight"


@pytest.mark.parametrize(("without", "named"), [("norm.weight", "norm.weight"), ("pooler.weight", "unused.weight")])
def test_one_with_less_is_refused(tmp_path: Path, without: str, named: str) -> None:
    given = {"norm.weight": torch.rand(2), "pooler.weight": torch.rand(2)}
    save_file(given, tmp_path / "model.safetensors")
    given.pop(without)
    with pytest.raises(WeightsRejectedError, match=rf"does not fill these parameters of the model: {named}"):
        update(sink_of(Unused(), tmp_path), given)


def test_one_that_nothing_is_known_to_compare_with_is_refused() -> None:
    with pytest.raises(WeightsRejectedError, match=r"unused\.weight \(nothing\)"):
        update(sink_of(Unused()), {"norm.weight": torch.rand(2)})
