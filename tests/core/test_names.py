"""Which tensors are sent, under which names; and which hold no numbers."""

from __future__ import annotations

import pytest
import torch

from checkpoint_engine.deadline import Deadline
from checkpoint_engine.errors import SettingError, WeightsRejectedError
from checkpoint_engine.server.not_a_number import refuse_nan
from checkpoint_engine.source.loader import load_tensors
from checkpoint_engine.source.names import NameRules, common_wrapper
from checkpoint_engine.source.store import Registered

pytestmark = pytest.mark.pure


def test_prefixes_are_cut_in_front_and_the_compilers_everywhere() -> None:
    rules = NameRules(strip=("module.", "_orig_mod."))
    assert rules.apply(["module.a", "module.module.b", "c.module.d", "e._orig_mod.f", "module._orig_mod.g"]) == {
        "module.a": "a",
        "module.module.b": "module.b",
        "c.module.d": "c.module.d",
        "e._orig_mod.f": "e.f",
        "module._orig_mod.g": "g",
    }


def test_what_would_be_wrong_is_refused() -> None:
    with pytest.raises(SettingError, match=r"'a' and 'module\.a' would both be sent as 'a'"):
        NameRules(strip=("module.",)).apply(["a", "module.a"])
    with pytest.raises(SettingError, match="leaves no tensor"):
        NameRules(ignore=("a", "b*")).apply(["a", "bc"])


def test_some_names_only() -> None:
    rules = NameRules(ignore=("*.bias",), strip=("module.",), only=("a.*", "b"))
    assert rules.apply(["module.a.x", "module.a.bias", "b", "c"]) == {"module.a.x": "a.x", "b": "b"}
    with pytest.raises(SettingError, match=r"--only 'z\*' fits no tensor"):
        NameRules(only=("a", "z*")).apply(["a", "b"])


def test_rules_that_fit_nothing_are_known() -> None:
    rules = NameRules(ignore=("x.*", "a"), strip=("module.", "nosuch."))
    assert rules.unused(["module.a", "module.b"]) == ["x.*", "nosuch."]


@pytest.mark.parametrize(
    ("names", "wrapper"),
    [(["module.a", "module.b"], "module."), (["base_model.model.a"], "base_model.model."), (["module.a", "b"], "")],
)
def test_a_wrapper_that_all_names_carry(names: list[str], wrapper: str) -> None:
    assert common_wrapper(names) == wrapper
    assert not common_wrapper([])


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_nan_is_found_in_every_float(dtype: torch.dtype) -> None:
    bad = torch.ones(1000)
    bad[-1] = torch.nan
    tensors = {"good": torch.full((10,), 3.0).to(dtype), "bad": bad.to(dtype), "ids": torch.full((4,), -1)}
    filled = load_tensors(tensors)
    try:
        held = Registered("a", [one.segment for one in filled], [one.entry for one in filled])
        with pytest.raises(WeightsRejectedError, match="hold NaN: bad"):
            refuse_nan(held, Deadline(5))
    finally:
        for one in filled:
            one.segment.discard()
