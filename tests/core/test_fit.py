"""Whether a checkpoint fits a model: what would stay empty, and what would be cut by all workers together."""

from __future__ import annotations

import logging

import pytest
import torch

from checkpoint_engine.contract.fit import Coverage, fingerprint, missing, refuse, too_large, torn
from checkpoint_engine.contract.sink import TensorSpec
from checkpoint_engine.errors import WeightsRejectedError

pytestmark = pytest.mark.pure


def spec(*shape: int) -> TensorSpec:
    return TensorSpec(torch.float32, shape)


def test_what_stays_empty_is_named_with_what_it_would_get_unless_the_engine_does_without() -> None:
    parameters = {
        "whole": Coverage(4, 4, frozenset({"a"})),
        "half": Coverage(4, 2, frozenset({"b", "c"})),
        "none": Coverage(4, 0, frozenset()),
        "scale": Coverage(1, 0, frozenset()),
    }
    found = missing(parameters, lambda name: name == "scale")
    assert found == ["half (2 of 4 elements, from b, c)", "none (nothing)"]


def test_what_nobody_can_accept_is_a_layer_of_which_some_would_stay_empty(caplog: pytest.LogCaptureFixture) -> None:
    parameters = {
        "qkv.weight": Coverage(4, 2, frozenset({"q"})),
        "o.weight": Coverage(4, 4, frozenset({"o"})),
        "o.bias": Coverage(4, 0, frozenset()),
        "norm.weight": Coverage(4, 0, frozenset()),
    }
    found, halves = (find(parameters, lambda _: False) for find in (missing, torn))
    assert halves == ["qkv.weight (2 of 4 elements, from q)", "o.bias (nothing)"]
    assert found == [*halves, "norm.weight (nothing)"]
    with pytest.raises(WeightsRejectedError, match=r"o\.bias \(nothing\); a layer is updated whole or not at all"):
        refuse("wrong", found, engine="vLLM", variable="LENIENT", lenient=True, halves=halves)
    refuse("wrong", found[-1:], engine="vLLM", variable="LENIENT", lenient=True, halves=[])
    assert "norm.weight (nothing) (accepted" in caplog.text


@pytest.mark.parametrize(
    ("taken", "shared_by", "fits"),
    [
        (1024 * 64, 1, False),  # one worker takes the upper half
        (1024 * 64, 2, True),  # and the other one the lower
        (512 * 64, 2, False),
        (512 * 64, 4, True),
        (2048 * 64, 1, True),
        (1024 * 64, 3, True),  # the last of them is filled up
    ],
)
def test_a_tensor_is_too_large_if_those_who_share_it_take_less_than_all(taken: int, shared_by: int, fits: bool) -> None:
    found = too_large({"q": spec(2048, 64)}, {("q", "qkv"): taken}, lambda *_: shared_by)
    assert found == ([] if fits else [f"q (shape [2048, 64], {taken} elements taken)"])


def test_the_divisor_is_that_of_each_parameter() -> None:
    """Experts are spread over more workers than the rest: what is true of them must not let others be cut."""
    tensors = {"experts": spec(64, 8), "norm": spec(16), "q": spec(16, 8)}
    taken = {("experts", "w13"): 8 * 8, ("norm", "norm"): 8, ("q", "qkv"): 8 * 8}
    found = too_large(tensors, taken, lambda _, name: {"w13": 8, "norm": 1, "qkv": 2}[name])
    assert found == ["norm (shape [16], 8 elements taken)"]


def test_a_tensor_that_several_parameters_divide_is_not_too_large_for_each_of_them() -> None:
    assert too_large({"fused": spec(8)}, {("fused", "a"): 4, ("fused", "b"): 4}, lambda *_: 1) == []
    assert too_large({"fused": spec(9)}, {("fused", "a"): 4, ("fused", "b"): 4}, lambda *_: 1) != []


def test_the_user_may_accept_what_does_not_fit(caplog: pytest.LogCaptureFixture) -> None:
    names = [f"p{number}" for number in range(9)]
    refuse("nothing is wrong with", [], engine="vLLM", variable="LENIENT", lenient=False)
    with pytest.raises(WeightsRejectedError, match=r"wrong: p0, .*p7 and 1 more; is the check.*LENIENT=1"):
        refuse("wrong", names, engine="vLLM", variable="LENIENT", lenient=False)
    with pytest.raises(WeightsRejectedError, match="leave them out"):
        refuse("wrong", names, engine="vLLM", variable="LENIENT", lenient=False, hint="leave them out")
    with caplog.at_level(logging.WARNING):
        refuse("wrong", names, engine="vLLM", variable="LENIENT", lenient=True)
    assert "accepted, LENIENT=1" in caplog.text


def test_a_fingerprint_is_of_names_shapes_and_dtypes_in_any_order() -> None:
    one = {"a": spec(2), "b": spec(3)}
    assert fingerprint(one) == fingerprint(dict(reversed(one.items())))
    others = [{"a": spec(2)}, {"a": spec(2), "c": spec(3)}, {"a": spec(2), "b": spec(3, 1)}]
    others.append({"a": spec(2), "b": TensorSpec(torch.int32, (3,))})
    assert len({fingerprint(each) for each in (one, *others)}) == 5
