"""Buckets that come again are known, so that what was worked out for them serves the next update too."""

from __future__ import annotations

import pytest
import torch

from checkpoint_engine_vllm.transfer.layouts import BucketLayouts

DESCRIBED = (("a", "bfloat16", (4, 2)), ("b", "float32", (3,)))


def test_packed_tensors_lie_one_after_the_other() -> None:
    memory = torch.arange(40, dtype=torch.uint8)
    brought = BucketLayouts().packed(memory, DESCRIBED, (16, 12))
    found = dict(brought.tensors)
    assert torch.equal(found["a"].view(torch.uint8).flatten(), memory[:16])
    assert torch.equal(found["b"].view(torch.uint8).flatten(), memory[16:28])
    assert {name: (spec.dtype, spec.shape) for name, spec in brought.specs.items()} == {
        "a": (torch.bfloat16, (4, 2)),
        "b": (torch.float32, (3,)),
    }


def test_a_layout_that_comes_in_the_next_update_is_the_same_and_others_are_forgotten() -> None:
    layouts = BucketLayouts()
    first = layouts.packed(torch.zeros(28, dtype=torch.uint8), DESCRIBED, (16, 12))
    apart = layouts.apart(DESCRIBED[:1], [torch.zeros(4, 2, dtype=torch.bfloat16)])
    for _ in range(2):  # an update ends, and the next one begins with giving up whatever is open
        layouts.end_of_update()
    again = layouts.packed(torch.ones(28, dtype=torch.uint8), DESCRIBED, (16, 12))
    assert again.tensors.bucket is first.tensors.bucket
    assert again.specs is first.specs
    layouts.end_of_update()
    assert (
        layouts.apart(DESCRIBED[:1], [torch.zeros(4, 2, dtype=torch.bfloat16)]).tensors.bucket
        is not apart.tensors.bucket
    )


@pytest.mark.parametrize(
    ("nbytes", "sizes", "said"),
    [(28, (16, 13), "'b' is said to take 13 bytes"), (27, (16, 12), "lie in a buffer of 27")],
)
def test_sizes_that_contradict_each_other_are_refused(nbytes: int, sizes: tuple[int, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        BucketLayouts().packed(torch.zeros(nbytes, dtype=torch.uint8), DESCRIBED, sizes)


def test_a_tensor_of_another_shape_than_announced_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'a' is said to be torch.bfloat16 \(4, 2\), its handle is of .* \(2, 4\)"):
        BucketLayouts().apart(DESCRIBED[:1], [torch.zeros(2, 4, dtype=torch.bfloat16)])
