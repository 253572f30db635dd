"""Which quantised layers are updated, and which are refused by name; with classes called as SGLang's are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from checkpoint_engine_sglang import layouts
from checkpoint_engine_sglang.compat import Runner
from checkpoint_engine_sglang.quantised import QUANTISED, find_unsafe

pytestmark = pytest.mark.pure


def method(kind: str, **held: object) -> Any:
    """What processes weights."""
    made = type(kind, (), {"process_weights_after_loading": lambda *_: None})()
    vars(made).update(held)
    return made


def model(processing: object, scheme: object = None) -> nn.Module:
    made = nn.Sequential(nn.Linear(2, 2))
    vars(made[0])["quant_method"] = processing
    if scheme is not None:
        vars(made[0])["scheme"] = scheme
    layouts.remember(made)
    return made


def unsafe(made: nn.Module) -> str:
    return find_unsafe(Runner("target", made, SimpleNamespace(quantization=None), torch.device("cpu")))


@pytest.mark.parametrize(
    "kind",
    ["Fp8LinearMethod", "ModelOptFp4LinearMethod", "Mxfp4MoEMethod", "Fp8KVCacheMethod", "UnquantizedLinearMethod"],
)
def test_what_was_compared_with_a_start_is_updated(kind: str) -> None:
    assert unsafe(model(method(kind))) == ""


@pytest.mark.parametrize("kind", ["GPTQMarlinLinearMethod", "AWQMarlinMoEMethod", "PetitNvFp4LinearMethod"])
def test_what_never_was_is_refused_by_name(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = model(method(kind))
    assert unsafe(made) == f"updates of {kind} were never compared with a start: 0"
    monkeypatch.setenv(QUANTISED, "1")
    assert unsafe(made) == ""


def test_the_scheme_counts_where_there_is_one() -> None:
    processing = method("CompressedTensorsLinearMethod")
    assert unsafe(model(processing, method("CompressedTensorsW4A4Fp4"))) == ""
    assert "CompressedTensorsWNA16" in unsafe(model(processing, method("CompressedTensorsWNA16")))


def test_experts_of_mxfp8_share_a_class_with_those_of_fp8() -> None:
    assert unsafe(model(method("Fp8MoEMethod", use_mxfp8=False))) == ""
    assert "Fp8MoEMethod for MXFP8" in unsafe(model(method("Fp8MoEMethod", use_mxfp8=True)))


def test_switches_of_a_method_within_another_are_remembered_too() -> None:
    inner = method("Fp8MoEMethod", is_fp4_expert=True)
    made = model(method("Mxfp4FlashinferTrtllmMoEMethod", _fp8=inner))
    first = layouts.layouts_of(made)["0"].plain
    assert {"is_fp4_expert": True} in first
    vars(vars(made[0])["quant_method"])["_fp8"] = None
    assert "SGLang has exchanged what processes" in unsafe(made)


def test_a_value_that_all_elements_share_is_kept_however_large_the_parameter() -> None:
    """Padding keeps it: no tensor of a checkpoint fills that."""
    made = nn.Sequential(nn.Linear(2, 2))
    padded = torch.zeros(2, (1 << 21) + 8)
    made[0].weight = nn.Parameter(padded, requires_grad=False)
    kept = layouts.layout_of(made[0]).parameters["weight"]
    assert kept is not None
    assert kept.initial is not None
    assert torch.equal(kept.make("cpu"), padded)
    padded[1, -1] = 1
    other = layouts.layout_of(made[0]).parameters["weight"]
    assert other is not None
    assert other.initial is None
