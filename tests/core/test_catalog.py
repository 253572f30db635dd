from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint_engine.catalog import SCHEMA_VERSION, Catalog, Holding, SegmentEntry, ShardPlace, TensorEntry
from checkpoint_engine.errors import CheckpointFormatError, DuplicateTensorError, UnsupportedTensorError

pytestmark = pytest.mark.pure


def catalog_of(*tensors: TensorEntry, nbytes: int = 4096, rank: int = 0) -> Catalog:
    return Catalog("weights", (Holding(rank, "host", f"cpu:{rank}", (SegmentEntry(nbytes, tensors),)),))


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    catalog = Catalog(
        "weights",
        (
            Holding(0, "a", "GPU-1", (SegmentEntry(64, (TensorEntry("ünï", "float32", (2, 3), 8),), 1 << 47),)),
            Holding(1, "b", "GPU-2", (), p2p_address="b:1234", rdma_device="mlx5_0"),
        ),
    )
    catalog.save(tmp_path / "metas.json")
    assert Catalog.load(tmp_path / "metas.json") == catalog
    assert json.loads((tmp_path / "metas.json").read_bytes())["schema"] == SCHEMA_VERSION


@given(st.text(max_size=20).filter(lambda text: not any("\ud800" <= c <= "\udfff" for c in text)))
@settings(max_examples=50, deadline=None)
def test_any_name_survives_json(name: str) -> None:
    catalog = catalog_of(TensorEntry(name, "int8", (3,), 0))
    assert Catalog.from_json(catalog.to_json()) == catalog


def test_bytes_are_counted_without_padding() -> None:
    catalog = catalog_of(TensorEntry("a", "bfloat16", (3,), 0), TensorEntry("b", "float64", (), 256))
    assert catalog.nbytes == 6 + 8


def test_the_fingerprint_does_not_depend_on_who_holds_what() -> None:
    a, b = TensorEntry("a", "int8", (2,), 0), TensorEntry("b", "int8", (2,), 256)
    together = catalog_of(a, b)
    apart = Catalog("other", (*catalog_of(b).holdings, *catalog_of(a, rank=1).holdings))
    assert together.fingerprint() == apart.fingerprint()
    assert together.fingerprint() != catalog_of(a, TensorEntry("b", "uint8", (2,), 256)).fingerprint()
    assert together.fingerprint() != catalog_of(a, TensorEntry("b", "int8", (1, 2), 256)).fingerprint()


def shard(name: str, begin: tuple[int, ...], shape: tuple[int, ...], whole: tuple[int, ...] = (4, 6)) -> TensorEntry:
    return TensorEntry(name, "int8", shape, 0, ShardPlace(whole, begin))


def held(*by_rank: TensorEntry) -> Catalog:
    """Each of them on a rank of its own, the first on rank 2."""
    return Catalog("weights", tuple(catalog_of(entry, rank=2 + n).holdings[0] for n, entry in enumerate(by_rank)))


def test_a_tensor_may_lie_in_shards_and_in_copies_of_them() -> None:
    top, bottom, whole = shard("a", (0, 0), (3, 6)), shard("a", (3, 0), (1, 6)), TensorEntry("a", "int8", (4, 6), 0)
    cut = held(top, bottom, bottom).validate()
    assert Catalog.from_json(cut.to_json()) == cut
    assert cut.nbytes == held(whole, whole).validate().nbytes == 24
    assert cut.fingerprint() == held(whole).fingerprint()
    assert [t.shape for t in cut.wholes()] == [(4, 6)]
    assert cut.is_cut
    assert held(whole, whole).is_cut
    assert not held(whole).is_cut


@pytest.mark.parametrize(
    ("catalog", "message"),
    [
        (held(shard("a", (0, 0), (3, 6))), r"no rank has registered elements \[3:4, 0:6\] of \[4, 6\] of tensor 'a'"),
        (
            held(shard("a", (0, 0), (3, 6)), shard("a", (2, 0), (2, 6))),
            r"\[2:3, 0:6\] of \[4, 6\] of tensor 'a' .* rank 2 as \[0:3, 0:6\] and again on rank 3 as \[2:4, 0:6\]",
        ),
        (
            held(TensorEntry("a", "int8", (4, 6), 0), shard("a", (0, 0), (2, 6))),
            r"registered on rank 2 as \[0:4, 0:6\] and again on rank 3 as \[0:2, 0:6\]",
        ),
        (held(shard("a", (3, 0), (2, 6))), r"rank 2 holds \[3:5, 0:6\] of \[4, 6\] of tensor 'a': beyond"),
        (
            held(shard("a", (0, 0), (2, 6)), shard("a", (2, 0), (3, 6), (5, 6))),
            r"'a' is int8 \[4, 6\] on rank 2 and int8 \[5, 6\] on rank 3",
        ),
        (
            held(TensorEntry("a", "int8", (2,), 0), TensorEntry("a", "uint8", (2,), 0)),
            r"int8 \[2\] on rank 2 and uint8",
        ),
    ],
    ids=["hole", "overlap", "whole-and-shard", "outside", "other-shape", "other-dtype"],
)
def test_shards_that_do_not_make_up_their_tensor_are_named(catalog: Catalog, message: str) -> None:
    with pytest.raises((CheckpointFormatError, DuplicateTensorError), match=message):
        catalog.validate()


def test_a_tensor_twice_on_one_rank_is_named() -> None:
    first, second = (TensorEntry("layer.0", "int8", (2,), offset) for offset in (0, 256))
    with pytest.raises(DuplicateTensorError, match=r"'layer.0' is registered on rank 5 and again on rank 5"):
        catalog_of(first, second, rank=5).validate()


@pytest.mark.parametrize(
    "catalog",
    [
        pytest.param(catalog_of(TensorEntry("a", "int8", (4,), 0), TensorEntry("b", "int8", (4,), 3)), id="overlap"),
        pytest.param(catalog_of(TensorEntry("a", "int8", (4,), 8), TensorEntry("b", "int8", (4,), 0)), id="disorder"),
        pytest.param(catalog_of(TensorEntry("a", "int8", (4,), 4093)), id="beyond-the-end"),
        pytest.param(catalog_of(TensorEntry("a", "int8", (4,), -1)), id="before-the-start"),
        pytest.param(catalog_of(TensorEntry("a", "int8", (-2, -2), 0)), id="negative-shape"),
        pytest.param(catalog_of(nbytes=-1), id="negative-segment"),
        pytest.param(Catalog("weights", (), schema=SCHEMA_VERSION + 1), id="other-schema"),
    ],
)
def test_an_impossible_catalog_is_refused(catalog: Catalog) -> None:
    with pytest.raises(CheckpointFormatError):
        Catalog.from_json(catalog.to_json())


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(UnsupportedTensorError, match="float3"):
        catalog_of(TensorEntry("a", "float3", (4,), 0)).validate()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b'{"name": "\xff", "holdings": []}',
        b'{"name": 3, "holdings": []}',
        b'{"name": "weights"}',
        b'{"x":' + b"[" * 100_000,
        b'{"name": "w", "holdings": [{"rank": 0, "host": "h", "device": "d", "segments": [{"nbytes": 1e99}]}]}',
    ],
)
def test_what_is_no_catalog_is_refused_by_name(data: bytes) -> None:
    with pytest.raises(CheckpointFormatError, match=r"^metas\.json is not a catalog"):
        Catalog.from_json(data, source="metas.json")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointFormatError, match=rf"{tmp_path}/none\.json: {os.strerror(2)}"):
        Catalog.load(tmp_path / "none.json")
