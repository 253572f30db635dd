"""What a model would derive from its weights, found without a change of what it holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from checkpoint_engine.errors import WorkerError
from checkpoint_engine_sglang.compat import Runner
from checkpoint_engine_sglang.derived import Derived, OverwritesWeightsError, derive, derive_apart


class Attention(nn.Module):
    """Holds whatever models are known to derive, in every way in which they keep it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(6.0).reshape(2, 3), requires_grad=False)
        self.register_buffer("table", torch.zeros(3))
        self.made_anew: torch.Tensor | None = None
        self.written = torch.zeros(2)
        self.listed = [torch.zeros(2), torch.zeros(2)]
        self.number = 1.0
        self.untouched = torch.full((2,), 7.0)
        self.also_untouched = {"the weight": self.weight, "another": torch.ones(1)}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def post_load_weights(self) -> None:
        own, weight = self.attention, self.attention.weight
        own.made_anew = weight.t().contiguous().t()
        own.written.copy_(weight[:, 0])
        own.listed[1].copy_(weight[:, 1])
        own.table.copy_(weight[1])
        own.number = float(weight.sum())
        own.scale = nn.Parameter(weight[0, :1].clone(), requires_grad=False)


class Outer(nn.Module):
    """Has nothing to derive itself; the models that it holds have."""

    def __init__(self) -> None:
        super().__init__()
        self.language = Model()
        self.draft = Model()


def runner(model: nn.Module) -> Runner:
    return Runner("target", model, None, torch.device("cpu"))


def derived_model() -> Model:
    model = Model()
    model.post_load_weights()
    return model


def everything(module: nn.Module) -> dict[str, Any]:
    return {f"{name}.{key}": value for name, one in module.named_modules() for key, value in vars(one).items()}


def values(module: nn.Module) -> dict[str, str]:
    return {key: str(value) for key, value in everything(module).items()}


def differing(found: list[Derived]) -> set[str]:
    return {
        one.name for one in found if one.held is None or one.expected is None or not torch.equal(one.held, one.expected)
    }


ALL = {"made_anew", "written", "listed", "table", "number", "scale"}


def test_all_that_is_derived_is_told_and_nothing_else() -> None:
    found = derive_apart(runner(derived_model()), ())
    assert {one.name for one in found} == {f"attention.{own}" for own in ALL}
    assert differing(found) == set()


@pytest.mark.parametrize("inference", [False, True])
def test_other_weights_would_give_something_else_and_the_model_stays_as_it_is(inference: bool) -> None:
    with torch.inference_mode(mode=inference):
        model = derived_model()
        model.attention.weight += 1
        before, said = everything(model), values(model)
        found = derive_apart(runner(model), ())
    assert differing(found) == {f"attention.{own}" for own in ALL}
    assert values(model) == said
    assert all(value is before[key] for key, value in everything(model).items())


CHANGES: dict[str, Callable[[Attention], object]] = {
    "made_anew": lambda own: own.made_anew[0, 0].add_(1),
    "written": lambda own: own.written[0].add_(1),
    "listed": lambda own: own.listed[1][0].add_(1),
    "table": lambda own: own.table[0].add_(1),
    "number": lambda own: setattr(own, "number", 3.0),
    "scale": lambda own: own.scale[0].add_(1),
}


@pytest.mark.parametrize("own", CHANGES)
def test_one_value_that_is_another_is_found(own: str) -> None:
    model = derived_model()
    CHANGES[own](model.attention)
    assert differing(derive_apart(runner(model), ())) == {f"attention.{own}"}


def test_what_the_model_has_never_derived() -> None:
    found = {one.name: one for one in derive_apart(runner(Model()), ())}
    assert found["attention.made_anew"].held is None
    assert found["attention.scale"].held is None


def test_modules_that_are_compared_otherwise() -> None:
    model = derived_model()
    assert derive_apart(runner(model), {model.attention}) == []


class Overwriting(Model):
    def post_load_weights(self) -> None:
        super().post_load_weights()
        self.attention.weight.mul_(2)


class Failing(Model):
    def post_load_weights(self) -> None:
        super().post_load_weights()
        raise RuntimeError("made by the test")


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (Overwriting(), OverwritesWeightsError, "mul_"),
        (Failing(), WorkerError, "the target model failed to derive .* made by the test"),
    ],
)
def test_a_model_that_cannot_be_left_as_it_is(model: Model, error: type[Exception], message: str) -> None:
    said, before = values(model), everything(model)
    with pytest.raises(error, match=message):
        derive_apart(runner(model), ())
    assert values(model) == said
    assert all(value is before[key] for key, value in everything(model).items())


def test_models_within_a_model() -> None:
    """As in Kimi-VL, whose own loader has its language model derive what it needs."""
    model = Outer()
    derive(runner(model))
    assert model.language.attention.number == model.draft.attention.number == 15.0
    found = {one.name for one in derive_apart(runner(model), ())}
    assert {"language.attention.made_anew", "draft.attention.made_anew"} <= found
