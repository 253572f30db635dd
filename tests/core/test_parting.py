"""What comes at once is cut by the layers that wait for it: pure."""

from __future__ import annotations

import weakref

import pytest
import torch

from checkpoint_engine.contract.delivery import Delivery, Pairs
from checkpoint_engine.contract.sink import TensorSpec
from checkpoint_engine.reload import parting
from checkpoint_engine.reload.parting import Parting
from checkpoint_engine.reload.plan import make_plan
from checkpoint_engine.reload.recorder import record
from checkpoint_engine.reload.replay import Replay

pytestmark = pytest.mark.pure

SIZE = 16
NAMES = ("norm", "b.up", "a.up", "c.up", "b.down", "a.down", "shared")
LAYERS_OF = {"a.up": {"a"}, "a.down": {"a"}, "b.up": {"b"}, "b.down": {"b"}, "c.up": {"c"}, "shared": {"c", "a"}}


@pytest.fixture(autouse=True)
def two_layers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parting, "AT_ONCE", 2 * SIZE)


def delivery(names: tuple[str, ...] = NAMES, *, stays: bool = True) -> Delivery:
    """Every tensor in a block of its own, some way into it."""
    blocks = [torch.arange(3 * SIZE, dtype=torch.uint8) + number for number in range(len(names))]
    pairs = tuple((name, block[SIZE : 2 * SIZE]) for name, block in zip(names, blocks, strict=True))
    return Delivery(names, len(names) * SIZE, lambda: pairs, blocks, bucket=object() if stays else None, stays=stays)


def names(parts: list[Pairs]) -> list[tuple[str, ...]]:
    return [tuple(name for name, _ in part) for part in parts]


def test_layers_are_filled_one_after_the_other_some_at_a_time() -> None:
    cut = Parting(LAYERS_OF, {"a": SIZE, "b": SIZE, "c": 10 * SIZE})
    assert names(list(cut.of(delivery()))) == [("norm", "b.up", "b.down", "a.up", "a.down", "shared"), ("c.up",)]


def test_what_fits_stays_whole_and_so_does_what_lies_nowhere_in_particular() -> None:
    small, large = Parting(LAYERS_OF, dict.fromkeys("abc", 1)), Parting(LAYERS_OF, dict.fromkeys("abc", SIZE))
    whole = delivery()
    assert list(small.of(whole)) == [whole]
    pairs = list(whole)
    assert list(large.of(pairs)) == [pairs]


def test_a_part_is_what_it_was_a_part_of_and_comes_again_with_it() -> None:
    cut, whole = Parting(LAYERS_OF, dict.fromkeys("abc", SIZE)), delivery()
    parts = list(cut.of(whole))
    assert list(cut.of(whole)) == parts
    assert sorted(name for part in parts for name, _ in part) == sorted(NAMES)
    for part in parts:
        assert isinstance(part, Delivery)
        assert part.stays
        assert part.nbytes == len(part) * SIZE
        assert len(part.blocks) == len(part)  # no others
        for (name, tensor), (place,) in zip(part, part.places(), strict=True):
            assert tensor is whole[NAMES.index(name)][1]
            assert torch.equal(part.blocks[place.block][place.at : place.at + SIZE], tensor)


def test_nothing_is_kept_of_what_has_gone() -> None:
    cut, whole = Parting(LAYERS_OF, dict.fromkeys("abc", SIZE)), delivery()
    gone = weakref.ref(whole), weakref.ref(cut.of(whole)[0])
    del whole
    assert [each() for each in gone] == [None, None]


@pytest.mark.parametrize("stays", [True, False])
def test_copies_out_of_parts_are_those_out_of_the_whole(*, stays: bool) -> None:
    model = {name: torch.zeros(SIZE, dtype=torch.uint8, device="meta") for name in NAMES}

    def load(tensors: Pairs) -> None:
        for name, tensor in tensors:
            model[name].copy_(tensor)

    plan = make_plan(record(load, model, {name: TensorSpec(torch.uint8, (SIZE,)) for name in NAMES}), model)
    targets = {name: torch.zeros(SIZE, dtype=torch.uint8) for name in NAMES}
    replay, cut = Replay(plan, targets), Parting(LAYERS_OF, dict.fromkeys("abc", SIZE))
    whole = delivery(stays=stays)
    for _ in range(2):  # the second time out of what the first one has worked out
        for target in targets.values():
            target.zero_()
        for part in cut.of(whole):
            replay.load(part, {})
        for name, tensor in whole:
            assert torch.equal(targets[name], tensor)
