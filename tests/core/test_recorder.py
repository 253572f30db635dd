"""The recorder against random loaders: whatever it claims to have traced must give the same bytes when replayed."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint_engine.contract.sink import TensorSpec
from checkpoint_engine.reload.plan import ReloadPlan, make_plan
from checkpoint_engine.reload.recorder import LoaderError, record
from checkpoint_engine.reload.replay import Replay

pytestmark = pytest.mark.pure

Tensors = Iterable[tuple[str, torch.Tensor]]
Shapes = dict[str, tuple[int, ...]]


def plan_of(
    load: Callable[[dict[str, torch.Tensor], Tensors], object], shapes: Shapes, sources: dict[str, torch.Tensor]
) -> ReloadPlan:
    """Records a loader that fills parameters of these shapes from these sources."""
    shadow = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in sources.items()}
    return make_plan(record(lambda tensors: load(shadow, tensors), shadow, specs), shadow)


def replayed(plan: ReloadPlan, shapes: Shapes, sources: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    targets = {name: torch.full(shape, math.nan) for name, shape in shapes.items()}
    replay = Replay(plan, targets)
    replay.load(list(sources.items()), {})
    replay.fill_fixed()
    return targets


def check(
    load: Callable[[dict[str, torch.Tensor], Tensors], object], shapes: Shapes, sources: dict[str, torch.Tensor]
) -> ReloadPlan:
    """Replays a loader's plan and compares it with the loader itself."""
    plan = plan_of(load, shapes, sources)
    assert not plan.flaws
    expected = {name: torch.full(shape, math.nan) for name, shape in shapes.items()}
    load(expected, sources.items())
    for name, tensor in replayed(plan, shapes, sources).items():
        assert torch.equal(tensor, expected[name]), name
    return plan


def numbered(*shape: int, dtype: torch.dtype = torch.float32, first: int = 0) -> torch.Tensor:
    return (torch.arange(math.prod(shape)) + first).to(dtype).reshape(shape)


# -- random loaders -------------------------------------------------------------------------------------------------


@st.composite
def view_step(  # noqa: C901, PLR0911, PLR0912 - one branch for each kind of view
    draw: st.DrawFn, shape: tuple[int, ...]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """One thing that loaders do to a tensor of this shape."""
    rank = len(shape)
    kinds = ["clone", "contiguous", "flatten", "unsqueeze", "to"]
    if rank:
        kinds += ["narrow", "transpose", "permute", "unflatten", "slice", "chunk", "split", "squeeze"]
    if rank > 1:
        kinds += ["select", "reshape"]
    kind = draw(st.sampled_from(kinds))
    dim = draw(st.integers(0, max(rank - 1, 0)))
    if kind in {"clone", "contiguous"}:
        return lambda t: getattr(t, kind)()
    if kind == "to":
        return lambda t: t.to(torch.float64)
    if kind == "flatten":
        return lambda t: t.reshape(-1)
    if kind == "unsqueeze":
        return lambda t: t.unsqueeze(dim)
    if kind == "narrow":
        start = draw(st.integers(0, shape[dim] - 1))
        length = draw(st.integers(1, shape[dim] - start))
        return lambda t: t.narrow(dim, start, length)
    if kind == "slice":
        step = draw(st.integers(1, 3))
        return lambda t: t[(slice(None),) * dim + (slice(None, None, step),)]
    if kind == "transpose":
        other = draw(st.integers(0, rank - 1))
        return lambda t: t.transpose(dim, other)
    if kind == "permute":
        order = draw(st.permutations(range(rank)))
        return lambda t: t.permute(order)
    if kind == "select":
        index = draw(st.integers(0, shape[dim] - 1))
        return lambda t: t.select(dim, index)
    if kind == "squeeze":
        return lambda t: t.squeeze(dim)
    if kind == "chunk":
        pieces = draw(st.integers(1, 3))
        return lambda t: t.chunk(pieces, dim)[-1]
    if kind == "split":
        size = draw(st.integers(1, shape[dim]))
        return lambda t: t.split(size, dim)[0]
    if kind == "unflatten":
        inner = draw(st.sampled_from([n for n in range(1, shape[dim] + 1) if shape[dim] % n == 0]))
        return lambda t: t.unflatten(dim, (shape[dim] // inner, inner))
    return lambda t: t.reshape(math.prod(shape[:1]), -1)


@pytest.mark.thorough
@settings(max_examples=400, deadline=None)
@given(st.data(), st.booleans())
def test_random_chains_of_views_and_copies_are_traced_or_named(data: st.DataObject, inference: bool) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    source = numbered(*shape)
    steps, current = [], source
    for _ in range(data.draw(st.integers(0, 6))):
        step = data.draw(view_step(tuple(current.shape)))
        current = step(current)
        steps.append(step)

    def load(parameters: dict[str, torch.Tensor], tensors: Tensors) -> None:
        for _, tensor in tensors:
            for step in steps:
                tensor = step(tensor)  # noqa: PLW2901
            parameters["p"].copy_(tensor)

    shapes = {"p": tuple(current.shape)}
    with torch.inference_mode(mode=inference):
        plan = plan_of(load, shapes, {"t": source})
    expected = {"p": torch.full(shapes["p"], math.nan)}
    load(expected, [("t", source)])
    if plan.flaws:
        assert "p" in plan.flaws
        assert "t" in plan.recording.origins["p"]
    else:
        assert torch.equal(replayed(plan, shapes, {"t": source})["p"], expected["p"])


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_chains_without_copies_are_always_traced(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=2, max_size=4)))
    order = data.draw(st.permutations(range(len(shape))))
    dim = data.draw(st.integers(0, len(shape) - 1))

    def load(parameters: dict[str, torch.Tensor], tensors: Tensors) -> None:
        for _, tensor in tensors:
            rows = tensor.permute(order)
            for index in range(rows.shape[dim]):
                parameters["p"].transpose(0, 1).select(dim, index).copy_(rows.select(dim, index))

    permuted = [shape[i] for i in order]
    permuted[0], permuted[1] = permuted[1], permuted[0]
    check(load, {"p": tuple(permuted)}, {"t": numbered(*shape)})


# -- what engines do ------------------------------------------------------------------------------------------------


def test_fused_and_sliced() -> None:
    def load(parameters: dict[str, torch.Tensor], tensors: Tensors) -> None:
        for name, tensor in tensors:
            rows = {"q": (0, 4), "k": (4, 2), "v": (6, 2)}[name]
            parameters["qkv"].narrow(0, *rows).copy_(tensor.chunk(2)[1])

    sources = {"q": numbered(8, 3), "k": numbered(4, 3, first=100), "v": numbered(4, 3, first=200)}
    plan = check(load, {"qkv": (8, 3)}, sources)
    assert plan.recording.taken == {"q": 12, "k": 6, "v": 6}


def test_experts_stacked_interleaved_and_transposed() -> None:
    def load(parameters: dict[str, torch.Tensor], tensors: Tensors) -> None:
        for name, tensor in tensors:
            kind, expert = name.split(".")
            target = parameters["w13"][int(expert)]
            target[int(kind == "up") :: 2].copy_(tensor.t().contiguous())

    sources = {
        f"{kind}.{expert}": numbered(3, 4, first=100 * expert + first)
        for kind, first in (("gate", 0), ("up", 50))
        for expert in (0, 1)
    }
    check(load, {"w13": (2, 8, 3)}, sources)


@pytest.mark.parametrize("rank", [0, 1])
def test_tensors_side_by_side_and_then_sharded(rank: int) -> None:
    """Heads of a fused projection sorted by kind; pairs of gate and up in turn; two tensors in one."""

    def load(parameters: dict[str, torch.Tensor], tensors: Tensors) -> None:
        given = dict(tensors)
        heads = given["qkv"].view(2, 4, 2, 3)  # groups, of which each has two queries, a key and a value
        kinds = [heads.narrow(1, first, size).reshape(-1, 3) for first, size in ((0, 2), (2, 1), (3, 1))]
        parameters["qkv"].copy_(torch.cat(kinds, dim=0).narrow(0, 8 * rank, 8))
        gate, up = given["gate_up"][..., :4], given["gate_up"][..., 4:]
        pairs = torch.stack([gate, up], dim=-1).reshape(2, 8).contiguous()
        parameters["gate_up"].copy_(pairs.chunk(2, dim=-1)[rank].t())
        parameters["both"].copy_(torch.cat([given["a"], given["b"][:, 1:]], dim=-1))

    sources = {"qkv": numbered(16, 3), "gate_up": numbered(2, 8), "a": numbered(3, 2), "b": numbered(3, 4, first=50)}
    plan = check(load, {"qkv": (8, 3), "gate_up": (4, 2), "both": (3, 5)}, sources)
    assert plan.recording.joined == {"a": frozenset("ab"), "b": frozenset("ab")}
    assert plan.recording.computed_with == set()


@given(st.permutations(range(4)), st.permutations(range(4)), st.integers(0, 3), st.booleans(), st.data())
@settings(max_examples=60, deadline=None)
def test_tensors_side_by_side_copied_with_dimensions_in_another_order(
    first: list[int], second: list[int], dimension: int, stacked: bool, data: st.DataObject
) -> None:
    """As experts of which gate and up are put in turns, and that are then turned round and cut."""

    def made_of(given: dict[str, torch.Tensor]) -> torch.Tensor:
        parts = [given["a"].transpose(0, 1), given["b"].transpose(0, 1)]
        made = torch.stack(parts, dim=dimension) if stacked else torch.cat(parts, dim=min(dimension, 2))[None]
        whole = made.permute(first).contiguous().permute(second).contiguous()
        return whole.flatten(*pair).t() if whole.flatten(*pair).dim() == 2 else whole.flatten(*pair)

    def load(parameters: dict[str, torch.Tensor], tensors: Tensors) -> None:
        parameters["all"].copy_(made_of(dict(tensors)))

    pair = data.draw(st.sampled_from([(0, 1), (1, 2), (2, 3)]))
    sources = {"a": numbered(2, 3, 4), "b": numbered(2, 3, 4, first=100)}
    check(load, {"all": tuple(made_of(sources).shape)}, sources)


def test_a_part_of_tensors_side_by_side_that_is_copied_is_not_guessed() -> None:
    def load(parameters: dict[str, torch.Tensor], tensors: Tensors) -> None:
        given = dict(tensors)
        part = torch.cat([given["a"], given["b"]]).narrow(1, 0, 2).contiguous()
        parameters["part"].copy_(part)

    sources = {"a": numbered(2, 3), "b": numbered(2, 3, first=50)}
    assert "computed from" in plan_of(load, {"part": (4, 2)}, sources).flaws["part"]


def test_a_padded_vocabulary_is_filled_and_a_tied_head_shares_it() -> None:
    def load(parameters: dict[str, torch.Tensor], tensors: Tensors) -> None:
        for _, tensor in tensors:
            parameters["embed"][: tensor.shape[0]].copy_(tensor)
            parameters["embed"][tensor.shape[0] :].fill_(7)

    plan = check(load, {"embed": (10, 2)}, {"embed": numbered(7, 2)})
    assert plan.fills["embed"][0].value == 7


def test_a_cast_in_the_last_copy_is_kept() -> None:
    def load(parameters: dict[str, torch.Tensor], tensors: Tensors) -> None:
        for _, tensor in tensors:
            parameters["p"].copy_(tensor.t())

    check(load, {"p": (3, 2)}, {"t": numbered(2, 3, dtype=torch.bfloat16)})


def test_two_casts_are_not_one() -> None:
    def load(parameters: dict[str, torch.Tensor], tensors: Tensors) -> None:
        for _, tensor in tensors:
            parameters["p"].copy_(tensor.to(torch.float16))

    plan = plan_of(load, {"p": (4,)}, {"t": numbered(4)})
    assert "two casts" in plan.flaws["p"]


def test_copies_of_one_tensor_and_tensors_that_are_skipped() -> None:
    def load(parameters: dict[str, torch.Tensor], tensors: Tensors) -> None:
        for name, tensor in tensors:
            if name == "norm":
                for parameter in parameters.values():
                    parameter.copy_(tensor)

    plan = check(load, {"a": (3,), "b": (3,)}, {"norm": numbered(3), "rotary.inv_freq": numbered(5)})
    assert "rotary.inv_freq" not in plan.pieces


def test_a_tensor_replicated_to_a_larger_parameter() -> None:
    def load(parameters: dict[str, torch.Tensor], tensors: Tensors) -> None:
        for _, tensor in tensors:
            parameters["p"].copy_(tensor.unsqueeze(0))

    check(load, {"p": (4, 3)}, {"t": numbered(3)})


def test_bits_read_as_another_dtype() -> None:
    def load(parameters: dict[str, torch.Tensor], tensors: Tensors) -> None:
        for _, tensor in tensors:
            parameters["p"].view(torch.int32).copy_(tensor.view(torch.int32))

    check(load, {"p": (6,)}, {"t": numbered(6)})


# -- what is not movement -------------------------------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("compute", "says"),
    [
        (lambda t: -t.exp(), "neg"),
        (lambda t: torch.cat((t, t.exp()))[: t.shape[0]], "cat"),
        (lambda t: torch.cat((t.double(), t.double()))[: t.shape[0]], "cat"),
        (lambda t: t[torch.tensor([3, 2, 1, 0], device=t.device)], "index"),
        (lambda t: t.clone().add_(1), "a copy"),
    ],
)
def test_values_that_are_computed_are_named(compute: Callable[[torch.Tensor], torch.Tensor], says: str) -> None:
    def load(parameters: dict[str, torch.Tensor], tensors: Tensors) -> None:
        for name, tensor in tensors:
            parameters[name].copy_(compute(tensor) if name == "a" else tensor)

    plan = plan_of(load, {"a": (4,), "b": (4,)}, {"a": numbered(4), "b": numbered(4)})
    assert list(plan.flaws) == ["a"]
    assert "computed from a" in plan.flaws["a"]
    assert plan.recording.computed_with == {"a"}
    assert says in plan.flaws["a"] or "a copy" in plan.flaws["a"]
    assert plan.is_traced()


@pytest.mark.thorough
@pytest.mark.parametrize("make", [lambda: torch.arange(4.0), lambda: torch.tensor([1.0, 2.0, 3.0, 4.0])])
def test_what_a_loader_makes_itself_has_no_data_either(make: Callable[[], torch.Tensor]) -> None:
    """Nor does it fail beside tensors without data; it is only not movement."""
    devices = []

    def load(parameters: dict[str, torch.Tensor], tensors: Tensors) -> None:
        for name, tensor in tensors:
            own = make()
            devices.append(own.device.type)
            parameters[name].copy_(tensor + own if name == "a" else own)

    with torch.device("cpu"):
        plan = plan_of(load, {"a": (4,), "b": (4,)}, {"a": numbered(4), "b": numbered(4)})
    assert devices == ["meta", "meta"]
    assert plan.is_traced()
    assert "computed from a" in plan.flaws["a"]
    assert "computed from nothing" in plan.flaws["b"]


def test_garbage_is_collected_again_even_after_a_loader_that_fails() -> None:
    seen = []

    def load(parameters: dict[str, torch.Tensor], tensors: Tensors) -> None:
        seen.append(gc.isenabled())
        raise KeyError(next(iter(tensors))[0])

    with pytest.raises(LoaderError):
        plan_of(load, {"a": (4,)}, {"a": numbered(4)})
    assert (seen, gc.isenabled()) == ([False], True)


def test_a_parameter_that_is_changed_after_its_copy() -> None:
    def load(parameters: dict[str, torch.Tensor], tensors: Tensors) -> None:
        for _, tensor in tensors:
            parameters["p"].copy_(tensor)
            parameters["p"].mul_(2)

    assert "computed" in plan_of(load, {"p": (4,)}, {"t": numbered(4)}).flaws["p"]


def test_a_parameter_filled_in_part_and_one_written_twice() -> None:
    def load(parameters: dict[str, torch.Tensor], tensors: Tensors) -> None:
        for name, tensor in tensors:
            parameters[name][:3].copy_(tensor)
            if name == "b":
                parameters[name][1:].copy_(tensor)

    plan = plan_of(load, {"a": (4,), "b": (4,)}, {"a": numbered(3), "b": numbered(3)})
    assert plan.flaws == {"a": "3 of 4 elements", "b": "2 elements written twice"}


def test_overlapping_pieces_of_the_right_total_size() -> None:
    def load(parameters: dict[str, torch.Tensor], tensors: Tensors) -> None:
        for _, tensor in tensors:
            parameters["p"][:4].copy_(tensor)
            parameters["p"][2:6].copy_(tensor)

    plan = plan_of(load, {"p": (8,)}, {"t": numbered(4)})
    assert "written twice" in plan.flaws["p"]


def test_the_same_copy_done_twice_counts_once() -> None:
    def load(parameters: dict[str, torch.Tensor], tensors: Tensors) -> None:
        for _, tensor in tensors:
            parameters["p"].copy_(tensor)
            parameters["p"].copy_(tensor)

    check(load, {"p": (4,)}, {"t": numbered(4)})


def test_a_loader_that_reads_values_is_left_out_and_the_rest_recorded() -> None:
    def load(parameters: dict[str, torch.Tensor], tensors: Tensors) -> None:
        for name, tensor in tensors:
            if name == "b":
                parameters[name][int(tensor[0]) :].copy_(tensor)
            parameters[name].copy_(tensor)

    plan = plan_of(load, {"a": (4,), "b": (4,), "c": (4,)}, {name: numbered(4) for name in "abc"})
    assert set(plan.loader_only) == {"b"}
    assert set(plan.pieces) == {"a", "c"}
    assert not plan.is_traced(), "nobody knows where b would have gone"


def test_a_loader_that_refuses_a_tensor() -> None:
    def load(parameters: dict[str, torch.Tensor], tensors: Tensors) -> None:
        for name, tensor in tensors:
            parameters[name].copy_(tensor)

    with pytest.raises(LoaderError, match="b: KeyError") as caught:
        plan_of(load, {"a": (4,)}, {"a": numbered(4), "b": numbered(4)})
    assert caught.value.name == "b"


def test_a_loader_that_reads_everything_is_given_up() -> None:
    calls = 0

    def load(parameters: dict[str, torch.Tensor], tensors: Tensors) -> None:
        nonlocal calls
        calls += 1
        for name, tensor in tensors:
            parameters["p"][int(tensor[0]) :].copy_(tensor)
            raise AssertionError(name)

    plan = plan_of(load, {"p": (4,)}, {f"t{i}": numbered(4) for i in range(1000)})
    assert not plan.is_traced()
    assert calls < 150


def test_lone_values_that_are_read_are_left_to_the_loader_and_nothing_else_is() -> None:
    """A scale that is filled in by its value; and one by which the loader decides what to do."""

    def load(parameters: dict[str, torch.Tensor], tensors: Tensors) -> None:
        for name, tensor in tensors:
            if name == "scale":
                parameters["scale"].fill_(tensor.item())
            elif name == "switch":
                parameters["switch"].copy_(tensor if tensor.item() > 0 else -tensor)
            else:
                parameters[name].copy_(tensor)

    shapes: Shapes = {"scale": (3,), "switch": (1,), "weight": (4,)}
    plan = plan_of(load, shapes, {"scale": numbered(), "switch": numbered(1), "weight": numbered(4)})
    assert plan.is_traced()
    assert plan.flaws.keys() == plan.loader_only.keys() == {"scale", "switch"}
    assert plan.recording.written["scale"] == 3
    assert plan.covered(plan.targets) == ({"weight"}, {"weight"})


@pytest.mark.thorough
def test_tensors_that_are_put_together_are_known_to_belong_together() -> None:
    def load(parameters: dict[str, torch.Tensor], tensors: Tensors) -> None:
        given = dict(tensors)
        parameters["both"].copy_(torch.cat([given["a"], given["b"]]))
        parameters["c"].copy_(given["c"])

    recording = plan_of(load, {"both": (4,), "c": (2,)}, {name: numbered(2) for name in "abc"}).recording
    assert recording.joined == {"a": frozenset("ab"), "b": frozenset("ab")}


def test_what_is_computed_from_a_parameter_comes_from_what_filled_that_one() -> None:
    """As a weight that its loader also keeps with 1 added, and a head that is tied when everything else is loaded."""

    def load(parameters: dict[str, torch.Tensor], tensors: Tensors) -> None:
        for name, tensor in tensors:
            parameters[name].copy_(tensor)
        parameters["plus one"].copy_(parameters["norm"]).add_(1)
        parameters["head"].copy_(parameters["embed"] * 1)

    shapes: Shapes = {"norm": (4,), "plus one": (4,), "embed": (3, 2), "head": (3, 2), "other": (2,)}
    sources = {"norm": numbered(4), "embed": numbered(3, 2), "other": numbered(2)}
    plan = plan_of(load, shapes, sources)
    assert plan.flaws.keys() == {"plus one", "head"}
    assert "computed from norm (" in plan.flaws["plus one"]
    assert plan.recording.origins["head"] == {"embed"}
    assert plan.covered(plan.targets - plan.flaws.keys()) == ({"other"}, {"other"}), "the loader must do the rest"


def test_a_value_that_is_read_in_inference_mode() -> None:
    def load(parameters: dict[str, torch.Tensor], tensors: Tensors) -> None:
        for _, tensor in tensors:
            parameters["scale"].fill_(tensor.item())

    with torch.inference_mode():
        plan = plan_of(load, {"scale": (3,)}, {"scale": numbered()})
    assert plan.loader_only == {"scale": "its loader reads its value"}
    assert plan.is_traced()


def test_casts_in_inference_mode_are_part_of_the_plan() -> None:
    def load(parameters: dict[str, torch.Tensor], tensors: Tensors) -> None:
        for name, tensor in tensors:
            parameters[name].copy_(tensor.t().contiguous().to(torch.float32))

    shapes: Shapes = {"bias": (4, 2)}
    sources = {"bias": numbered(2, 4, dtype=torch.bfloat16)}
    with torch.inference_mode():
        plan = plan_of(load, shapes, sources)
    assert not plan.flaws
    assert torch.equal(replayed(plan, shapes, sources)["bias"], sources["bias"].t().float())


@pytest.mark.parametrize(
    "make",
    [
        torch.zeros_like,
        lambda like: torch.zeros(like.shape[0]),
        lambda like: torch.ones(like.shape).to(torch.float64).clone(),
        lambda like: torch.full((4,), 2.5)[1:],
        lambda like: like.new_zeros(3),
    ],
    ids=["zeros like", "zeros", "ones, cast and cloned", "part of a full", "new zeros"],
)
def test_constants_that_a_loader_makes_are_filled_in(make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    def load(parameters: dict[str, torch.Tensor], tensors: Tensors) -> None:
        for _, tensor in tensors:
            parameters["qkv"][:3].copy_(tensor)
            parameters["qkv"][3:6].copy_(make(tensor))
            parameters["qkv"][6:].copy_(tensor)

    check(load, {"qkv": (9,)}, {"q": numbered(3, first=1)})


@pytest.mark.parametrize(
    "change",
    [lambda t: t.fill_(3.0), lambda t: t.add_(1.0), lambda t: t[:1].fill_(3.0), lambda t: t.uniform_()],
    ids=["filled", "added to", "filled in part", "noise"],
)
def test_a_constant_that_was_changed_is_none(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    def load(parameters: dict[str, torch.Tensor], tensors: Tensors) -> None:
        for _, tensor in tensors:
            made = torch.zeros(3)
            change(made)
            parameters["bias"].copy_(made)
            parameters["weight"].copy_(tensor)

    plan = plan_of(load, {"bias": (3,), "weight": (3,)}, {"w": numbered(3)})
    assert plan.flaws == {"bias": "computed from nothing (a copy)"}


def test_a_constant_with_tensors_put_into_it_is_computed() -> None:
    def load(parameters: dict[str, torch.Tensor], tensors: Tensors) -> None:
        for _, tensor in tensors:
            made = torch.zeros(4)
            made[:3].copy_(tensor)
            parameters["bias"].copy_(made)

    assert plan_of(load, {"bias": (4,)}, {"w": numbered(3)}).flaws == {"bias": "computed from w (a copy)"}


def test_a_copy_out_of_a_parameter_is_traced_through_it() -> None:
    def load(parameters: dict[str, torch.Tensor], tensors: Tensors) -> None:
        for _, tensor in tensors:
            parameters["embedding"][:4].copy_(tensor)
            parameters["embedding"][4:].fill_(0)
        parameters["head"].copy_(parameters["embedding"][:4])

    plan = check(load, {"embedding": (6, 2), "head": (4, 2)}, {"w": numbered(4, 2)})
    assert plan.recording.origins["head"] == {"w"}


def test_what_was_written_to_a_parameter_twice_is_not_traced_through_it() -> None:
    def load(parameters: dict[str, torch.Tensor], tensors: Tensors) -> None:
        for _, tensor in tensors:
            parameters["embedding"].copy_(tensor)
        parameters["head"].copy_(parameters["embedding"])

    plan = plan_of(load, {"embedding": (4,), "head": (4,)}, {"a": numbered(4), "b": numbered(4, first=9)})
    assert plan.flaws.keys() == {"embedding", "head"}
    assert plan.recording.origins["head"] == {"a", "b"}


def test_padding_belongs_to_the_tensor_that_it_pads_and_not_to_one_that_was_taken_since() -> None:
    def load(parameters: dict[str, torch.Tensor], tensors: Tensors) -> None:
        taken = dict(tensors)
        parameters["embedding"][:4].copy_(taken["w"])
        parameters["embedding"][4:].fill_(0)

    plan = check(load, {"embedding": (6,)}, {"w": numbered(4), "unused": numbered(1)})
    assert plan.recording.taken == {"w": 6}
