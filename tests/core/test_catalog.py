from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint_engine.catalog import SCHEMA_VERSION, Catalog, Holding, SegmentEntry, TensorEntry
from checkpoint_engine.errors import CheckpointFormatError, DuplicateTensorError, UnsupportedTensorError


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


def test_a_tensor_on_two_ranks_is_named_with_both() -> None:
    tensor = TensorEntry("layer.0", "int8", (2,), 0)
    twice = Catalog("weights", (*catalog_of(tensor, rank=2).holdings, *catalog_of(tensor, rank=5).holdings))
    with pytest.raises(DuplicateTensorError, match=r"'layer.0' .* rank 2 .* rank 5"):
        twice.validate()


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
