from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint_engine.errors import DeviceMemoryError
from checkpoint_engine.planning.buckets import Bucket, BucketPlan
from checkpoint_engine.planning.staging import StagingLayout, choose_layout, place_buckets

pytestmark = pytest.mark.pure

plans = st.builds(
    lambda size, buckets: BucketPlan(
        bucket_size=size * 256,
        buckets=tuple(Bucket(owner=owner, segment=0, start=0, nbytes=nbytes, tensors=()) for owner, nbytes in buckets),
    ),
    st.integers(1, 8),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4000)), max_size=40),
)


@settings(max_examples=300)
@given(plan=plans, available=st.integers(0, 40_000), rank=st.integers(0, 2))
def test_places_never_overlap_while_in_use(plan: BucketPlan, available: int, rank: int) -> None:
    layout = choose_layout(plan, 3, available)
    if layout is None:
        assert plan.largest > available - 256
        return
    assert layout.nbytes <= available
    places = place_buckets(plan, layout, rank)
    assert len(places) == len(plan.buckets)
    for index, place in enumerate(places):
        assert place.nbytes == plan.buckets[index].nbytes
        assert 0 <= place.offset <= place.offset + place.nbytes <= layout.nbytes
        assert place.after is None or place.after < index
        for earlier in range(index):
            other = places[earlier]
            if other.offset < place.offset + place.nbytes and place.offset < other.offset + other.nbytes:
                assert place.after is not None
                assert place.after >= earlier


@given(plan=plans)
def test_plenty_of_memory_means_two_rings_of_the_least_useful_size(plan: BucketPlan) -> None:
    layout = choose_layout(plan, 3, 1 << 40)
    assert layout is not None
    assert not layout.shared or layout.nbytes == 0
    assert layout.nbytes <= 2 * (max(plan.largest, 2 * plan.bucket_size) + 256)


def test_memory_for_one_ring_only() -> None:
    plan = BucketPlan(1024, tuple(Bucket(i % 2, 0, 0, 1024, ()) for i in range(6)))
    layout = choose_layout(plan, 2, 1536)
    assert layout == StagingLayout(1536, 0)
    assert layout.shared
    assert [place.after for place in place_buckets(plan, layout, 0)] == [None, 0, 1, 2, 3, 4]


def test_a_single_rank_needs_one_ring() -> None:
    plan = BucketPlan(1024, tuple(Bucket(0, 0, 0, 1024, ()) for _ in range(6)))
    layout = choose_layout(plan, 1, 1 << 30)
    assert layout == StagingLayout(2048, 0)


def test_too_little_for_the_largest_bucket() -> None:
    plan = BucketPlan(1024, (Bucket(0, 0, 0, 4096, ()),))
    assert choose_layout(plan, 2, 4095) is None
    with pytest.raises(DeviceMemoryError, match="4096"):
        place_buckets(plan, StagingLayout(1024, 0), 0)
