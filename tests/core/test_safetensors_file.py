from __future__ import annotations

import contextlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from checkpoint_engine.catalog import TensorEntry
from checkpoint_engine.errors import CheckpointFormatError, UnsupportedTensorError
from checkpoint_engine.source.safetensors_file import read_header

pytestmark = pytest.mark.pure


def raw(header: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + data


def described(dtype: object = "U8", shape: object = (4,), begin: object = 0, end: object = 4) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    return path


@given(
    st.dictionaries(
        st.text(max_size=8).filter(lambda name: name.isascii() and name != "__metadata__"),
        st.tuples(
            st.sampled_from([torch.bfloat16, torch.float32, torch.bool, torch.int64, torch.float8_e4m3fn]),
            st.lists(st.integers(0, 5), max_size=4),
        ),
        max_size=8,
    )
)
@settings(max_examples=60, deadline=None)
def test_what_safetensors_writes_is_read(tmp_path_factory: pytest.TempPathFactory, described: dict[str, Any]) -> None:
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in described.items()}
    path = tmp_path_factory.getbasetemp() / "written.safetensors"
    content = save(tensors)
    path.write_bytes(content)
    file = read_header(path)
    assert {t.name: (t.dtype, t.shape) for t in file.tensors} == {
        name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for name, tensor in tensors.items()
    }
    assert file.data_start + file.data_nbytes == len(content)
    assert sum(t.nbytes for t in file.tensors) == file.data_nbytes
    assert [t.offset for t in file.tensors] == sorted(t.offset for t in file.tensors)


def test_offsets_lead_to_the_data(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6, dtype=torch.int16), "a": torch.tensor(1.5), "empty": torch.empty(0, 3)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    file = read_header(tmp_path / "model.safetensors")
    content = file.path.read_bytes()[file.data_start :]
    for entry in file.tensors:
        expected = tensors[entry.name].contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        assert content[entry.offset : entry.offset + entry.nbytes] == expected


@pytest.mark.parametrize("header", [{}, {"__metadata__": {"format": "pt"}}])
def test_a_file_without_tensors_is_read(tmp_path: Path, header: dict[str, Any]) -> None:
    assert read_header(write(tmp_path, raw(header))).tensors == ()


def test_zero_size_tensors_share_their_place(tmp_path: Path) -> None:
    header = {"x": described(), "y": described(shape=[0, 3], begin=0, end=0), "z": described("F32", [0], 4, 4)}
    file = read_header(write(tmp_path, raw(header, bytes(4))))
    assert file.tensors == (
        TensorEntry("y", "uint8", (0, 3), 0),
        TensorEntry("x", "uint8", (4,), 0),
        TensorEntry("z", "float32", (0,), 4),
    )


def test_padding_behind_the_header_is_allowed(tmp_path: Path) -> None:
    header = json.dumps({"x": described()}).encode() + b"     "
    assert read_header(write(tmp_path, raw(header, bytes(4)))).data_nbytes == 4


TWICE = b'{"x":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"x":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'

BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "has 0 bytes, too few"),
    "seven-bytes": (bytes(7), "has 7 bytes, too few"),
    "header-truncated": (raw(b"{}", length=50), "header has 50 bytes, 2 are there"),
    "header-too-long": (raw(b"{}", length=100_000_001), "announces a header of 100000001 bytes, at most 100000000"),
    "header-of-2-to-64": (raw(b"{}", length=(1 << 64) - 1), "announces a header"),
    "no-header": (raw(b""), "not a safetensors file"),
    "pickle": (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", "announces a header"),
    "list": (raw(b"[]"), "not a safetensors file"),
    "blank-in-front": (raw(b" {}"), "not a safetensors file"),
    "half-json": (raw(b'{"x":'), "is broken"),
    "more-than-json": (raw(b"{}{}"), "is broken"),
    "not-utf-8": (raw(b'{"\xff":1}'), "is broken"),
    "nan": (raw(b'{"x":NaN}'), "NaN is no JSON"),
    "deep": (raw(b'{"x":' + b"[" * 200_000), "is broken"),
    "huge-number": (raw(b'{"x":' + b"9" * 10_000 + b"}"), "is broken"),
    "key-twice": (raw(TWICE, bytes(4)), "'x' occurs twice"),
    "field-twice": (raw(b'{"x":{"dtype":"U8","dtype":"I8"}}'), "'dtype' occurs twice"),
    "metadata-number": (raw({"__metadata__": {"a": 1}}), "does not map text to text"),
    "metadata-list": (raw({"__metadata__": []}), "does not map text to text"),
    "lone-surrogate": (raw(b'{"\\ud800":{}}'), "name is not text"),
    "not-described": (raw({"x": 3}), "not described by dtype, shape and data_offsets"),
    "field-missing": (raw({"x": {"dtype": "U8", "shape": [4]}}), "not described by"),
    "field-unknown": (raw({"x": described() | {"pickle": ""}}, bytes(4)), "not described by"),
    "dtype-number": (raw({"x": described(dtype=8)}, bytes(4)), "dtype 8 is not text"),
    "shape-negative": (raw({"x": described(shape=[-2, -2])}, bytes(4)), r"shape \[-2, -2\] is impossible"),
    "shape-float": (raw({"x": described(shape=[4.0])}, bytes(4)), "is impossible"),
    "shape-bool": (raw({"x": described(shape=[True, 4])}, bytes(4)), "is impossible"),
    "shape-text": (raw({"x": described(shape="4")}, bytes(4)), "is impossible"),
    "shape-overflow": (raw({"x": described(shape=[1 << 32, 1 << 32], end=0)}), "is impossible"),
    "shape-overflow-of-nothing": (raw({"x": described(shape=[1 << 62, 1 << 62, 0], end=0)}), "is impossible"),
    "shape-disagrees": (raw({"x": described(shape=[3])}, bytes(4)), r"\[3\] of U8 needs 3 bytes, .*\[0, 4\] span 4"),
    "offsets-backwards": (raw({"x": described(begin=4, end=0)}, bytes(4)), "offsets .* are impossible"),
    "offsets-negative": (raw({"x": described(begin=-4, end=0)}, bytes(4)), "offsets .* are impossible"),
    "offsets-three": (raw({"x": described() | {"data_offsets": [0, 4, 8]}}, bytes(4)), "offsets .* are impossible"),
    "overlap": (
        raw({"x": described(), "y": described(begin=2, end=6)}, bytes(6)),
        "'y' .* overlaps the tensor before it: it begins at byte 2, not 4",
    ),
    "same-place": (raw({"x": described(), "y": described()}, bytes(4)), "overlaps"),
    "hole": (
        raw({"x": described(), "y": described(begin=5, end=9)}, bytes(9)),
        "'y' .* leaves a hole .* byte 5, not 4",
    ),
    "hole-in-front": (raw({"x": described(begin=1, end=5)}, bytes(5)), "leaves a hole"),
    "data-truncated": (raw({"x": described()}, bytes(3)), "need 4 bytes of data, 3 are there"),
    "data-unclaimed": (raw({"x": described()}, bytes(6)), "2 bytes of data that no tensor claims"),
}


@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_file_is_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(CheckpointFormatError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("code", ["F6_E3M2", "F6_E2M3", "bfloat16", ""])
def test_an_unknown_dtype_is_refused_with_tensor_and_file(tmp_path: Path, code: str) -> None:
    path = write(tmp_path, raw({"x": described(code)}, bytes(4)))
    with pytest.raises(UnsupportedTensorError, match=rf"tensor 'x' in {path}: safetensors dtype '{code}' is unknown"):
        read_header(path)


def test_too_many_dimensions_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, raw({"x": described(shape=[1] * 65, end=1)}, bytes(1)))
    with pytest.raises(UnsupportedTensorError, match="65 dimensions"):
        read_header(path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "directory").mkdir()
    for name in ("fifo", "directory"):
        with pytest.raises(CheckpointFormatError, match="is not a file"):
            read_header(tmp_path / name)
    for path in (tmp_path / "none", Path("a\0b")):
        with pytest.raises(CheckpointFormatError, match="cannot read"):
            read_header(path)


@given(st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_random_headers_raise_nothing_else(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "random.safetensors"
    for candidate in (content, raw(content), raw(b"{" + content)):
        path.write_bytes(candidate)
        with contextlib.suppress(CheckpointFormatError, UnsupportedTensorError):
            read_header(path)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_damaged_file_raises_nothing_else_and_never_lies(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(save({"a": torch.zeros(3, 2), "b": torch.zeros(5, dtype=torch.int8)}))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(content)
    try:
        file = read_header(path)
    except (CheckpointFormatError, UnsupportedTensorError):
        return
    assert sum(t.nbytes for t in file.tensors) == file.data_nbytes == len(content) - file.data_start


def test_a_file_that_changes_after_its_header_was_read_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, raw({"x": described()}, bytes(4)))
    file = read_header(path)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CheckpointFormatError, match="changed while it was being read"), file.open():
        pass


def test_a_file_that_changes_while_it_is_open_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, raw({"x": described()}, bytes(4)))
    with pytest.raises(CheckpointFormatError, match="changed while"), read_header(path).open():
        path.write_bytes(path.read_bytes() + b"!")


def test_a_file_that_was_replaced_is_refused(tmp_path: Path) -> None:
    content = raw({"x": described()}, bytes(4))
    file = read_header(write(tmp_path, content))
    (tmp_path / "new").write_bytes(content)
    (tmp_path / "new").rename(file.path)
    with pytest.raises(CheckpointFormatError, match="changed"), file.open():
        pass
