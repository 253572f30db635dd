from __future__ import annotations

from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint_engine.catalog import Catalog, Holding, SegmentEntry, TensorEntry
from checkpoint_engine.errors import TensorTooLargeError
from checkpoint_engine.planning.buckets import (
    ALIGNMENT,
    BucketPlan,
    align_down,
    align_up,
    largest_bucket_needed,
    plan_buckets,
)

pytestmark = pytest.mark.pure

DTYPES = ("bool", "bfloat16", "float32", "float8_e4m3fn", "complex64")


@st.composite
def segments(draw: st.DrawFn, prefix: str) -> SegmentEntry:
    """Tensors one after the other: aligned as we lay them out, or anyhow as in a file used in place."""
    aligned = draw(st.booleans())
    offset = draw(st.integers(0, 700))
    tensors: list[TensorEntry] = []
    for index in range(draw(st.integers(0, 12))):
        offset = align_up(offset) if aligned else offset + draw(st.integers(0, 5))
        shape = tuple(draw(st.lists(st.integers(0, 9), max_size=4)))
        tensor = TensorEntry(f"{prefix}.{index}", draw(st.sampled_from(DTYPES)), shape, offset)
        tensors.append(tensor)
        offset += tensor.nbytes
    return SegmentEntry(nbytes=offset + draw(st.integers(0, 600)), tensors=tuple(tensors))


@st.composite
def catalogs(draw: st.DrawFn) -> Catalog:
    holdings: list[Holding] = []
    for rank in range(draw(st.integers(0, 4))):
        count = draw(st.integers(0, 3))
        held = tuple(draw(segments(f"{rank}.{index}")) for index in range(count))
        holdings.append(Holding(rank, "host", f"cpu:{rank}", held))
    return Catalog("weights", tuple(holdings)).validate()


def carried_bytes(plan: BucketPlan) -> list[tuple[int, int, int]]:
    """(rank, segment, byte) of every tensor byte that travels, as often as it travels."""
    return [
        (bucket.owner, bucket.segment, byte)
        for bucket in plan.buckets
        for tensor in bucket.tensors
        for byte in range(tensor.offset, tensor.offset + tensor.nbytes)
    ]


@given(catalogs(), st.integers(0, 6000))
@settings(max_examples=150, deadline=None)
def test_every_byte_of_every_tensor_travels_exactly_once(catalog: Catalog, bucket_size: int) -> None:
    carried = carried_bytes(plan_buckets(catalog, bucket_size))
    held = [
        (holding.rank, index, byte)
        for holding in catalog.holdings
        for index, segment in enumerate(holding.segments)
        for tensor in segment.tensors
        for byte in range(tensor.offset, tensor.offset + tensor.nbytes)
    ]
    assert len(carried) == len(set(carried))
    assert sorted(carried) == sorted(held)


@given(catalogs(), st.integers(0, 6000))
@settings(max_examples=150, deadline=None)
def test_every_tensor_travels_whole_and_once_even_if_it_has_no_bytes(catalog: Catalog, bucket_size: int) -> None:
    plan = plan_buckets(catalog, bucket_size)
    assert sorted(t.name for b in plan.buckets for t in b.tensors) == sorted(t.name for t in catalog.tensors())
    for bucket in plan.buckets:
        for tensor in bucket.tensors:
            assert bucket.start <= tensor.offset
            assert tensor.offset + tensor.nbytes <= bucket.start + bucket.nbytes


@pytest.mark.thorough
@given(catalogs(), st.integers(0, 6000))
@settings(max_examples=150, deadline=None)
def test_buckets_keep_the_limit_and_their_segment(catalog: Catalog, bucket_size: int) -> None:
    plan = plan_buckets(catalog, bucket_size)
    segments_of = {holding.rank: holding.segments for holding in catalog.holdings}
    for bucket in plan.buckets:
        assert bucket.start % ALIGNMENT == 0
        assert bucket.start + bucket.nbytes <= segments_of[bucket.owner][bucket.segment].nbytes
        if len(bucket.tensors) > 1:
            assert bucket.nbytes <= plan.bucket_size
    assert plan.largest <= max(plan.bucket_size, largest_bucket_needed(catalog))
    assert plan.bucket_size - bucket_size < ALIGNMENT


@given(catalogs(), st.integers(0, 6000))
@settings(max_examples=60, deadline=None)
def test_the_plan_is_a_function_of_catalog_and_size(catalog: Catalog, bucket_size: int) -> None:
    again = Catalog.from_json(catalog.to_json())
    assert plan_buckets(catalog, bucket_size) == plan_buckets(again, bucket_size)


@pytest.mark.thorough
@given(catalogs(), st.integers(0, 4000), st.integers(0, 8000))
@settings(max_examples=150, deadline=None)
def test_the_largest_allowed_is_kept_or_refused(catalog: Catalog, bucket_size: int, largest: int) -> None:
    needed = largest_bucket_needed(catalog)
    if needed > largest:
        with pytest.raises(TensorTooLargeError):
            plan_buckets(catalog, bucket_size, largest_allowed=largest)
    else:
        plan = plan_buckets(catalog, bucket_size, largest_allowed=largest)
        assert plan.largest <= max(largest, plan.bucket_size)


def one_rank(*tensors: TensorEntry) -> Catalog:
    end = max((t.offset + t.nbytes for t in tensors), default=0)
    return Catalog("weights", (Holding(0, "host", "cpu:0", (SegmentEntry(end, tensors),)),))


def test_a_large_tensor_has_a_bucket_of_its_own() -> None:
    catalog = one_rank(
        TensorEntry("small", "uint8", (100,), 0),
        TensorEntry("large", "uint8", (5000,), 256),
        TensorEntry("last", "uint8", (10,), align_up(5256)),
    )
    plan = plan_buckets(catalog, 512)
    assert [[t.name for t in bucket.tensors] for bucket in plan.buckets] == [["small"], ["large"], ["last"]]
    assert plan.largest == align_up(5000)


MIB = 1 << 20


@pytest.mark.parametrize(("kind", "count"), [("device", 3), ("host", 10)])
def test_what_lies_between_allocations_of_a_device_cuts_no_bucket(kind: Literal["host", "device"], count: int) -> None:
    """Torch puts six tensors of 3 MiB into an allocation of 20; of host memory, gaps would travel."""
    tensors = tuple(TensorEntry(str(i), "uint8", (3 * MIB,), i // 6 * 20 * MIB + i % 6 * 3 * MIB) for i in range(60))
    segment = SegmentEntry(200 * MIB, tensors, kind=kind)
    plan = plan_buckets(Catalog("x", (Holding(0, "h", "d", (segment,)),)), 80 * MIB)
    assert len(plan.buckets) == count


def test_a_tensor_that_is_too_large_is_refused_with_the_numbers() -> None:
    catalog = one_rank(TensorEntry("experts", "uint8", (5000,), 0))
    with pytest.raises(TensorTooLargeError, match=r"'experts' needs a bucket of 5120 bytes, at most 4096 .*PS_MAX"):
        plan_buckets(catalog, 512, largest_allowed=4096)


def test_owners_take_turns() -> None:
    holdings = tuple(
        Holding(
            rank,
            "host",
            f"cpu:{rank}",
            (SegmentEntry(1024, tuple(TensorEntry(f"{rank}.{i}", "uint8", (256,), 256 * i) for i in range(count))),),
        )
        for rank, count in enumerate((3, 1, 2))
    )
    plan = plan_buckets(Catalog("weights", holdings), 256)
    assert [bucket.owner for bucket in plan.buckets] == [0, 1, 2, 0, 2, 0]


def test_an_empty_checkpoint_has_no_buckets() -> None:
    for catalog in (Catalog("weights", ()), one_rank()):
        plan = plan_buckets(catalog, 1024)
        assert plan.buckets == ()
        assert (plan.nbytes, plan.largest) == (0, 0)


@given(st.integers(0, 1 << 50))
def test_aligning(nbytes: int) -> None:
    assert align_down(nbytes) <= nbytes <= align_up(nbytes)
    assert align_down(nbytes) % ALIGNMENT == align_up(nbytes) % ALIGNMENT == 0
    assert align_up(nbytes) - align_down(nbytes) in (0, ALIGNMENT)
