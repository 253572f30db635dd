"""The tensor types that can be carried, by the names used in catalogs and on the link."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from checkpoint_engine.errors import UnsupportedTensorError

if TYPE_CHECKING:
    import torch

__all__ = ["dtype_name", "dtype_of_code", "item_size", "torch_dtype"]

_SAFETENSORS_CODES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F4": "float4_e2m1fn_x2",
}
_BYTES = (
    *("bool", "uint8", "int8", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"),
    *("float8_e8m0fnu", "float4_e2m1fn_x2"),
)
_ITEM_SIZES = {
    **dict.fromkeys(_BYTES, 1),
    **dict.fromkeys(("uint16", "int16", "float16", "bfloat16"), 2),
    **dict.fromkeys(("uint32", "int32", "float32"), 4),
    **dict.fromkeys(("uint64", "int64", "float64", "complex64"), 8),
}
"""Written down, so that who reads a catalog need not wait for torch."""


@functools.cache
def _torch_dtypes() -> dict[str, torch.dtype]:
    """By name; types that an old torch lacks are left out."""
    import torch  # noqa: PLC0415 - seconds

    return {name: getattr(torch, name) for name in _ITEM_SIZES if hasattr(torch, name)}


@functools.cache
def _names() -> dict[torch.dtype, str]:
    return {dtype: name for name, dtype in _torch_dtypes().items()}


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of that name.

    Raises:
        UnsupportedTensorError: this torch has no such dtype.
    """
    try:
        return _torch_dtypes()[name]
    except KeyError:
        raise UnsupportedTensorError(
            f"dtype {name!r} is unknown to this torch; known are {', '.join(sorted(_torch_dtypes()))}"
        ) from None


def dtype_name(dtype: torch.dtype) -> str:
    """The name by which a torch dtype travels, such as `bfloat16`.

    Raises:
        UnsupportedTensorError: tensors of this dtype cannot be carried.
    """
    try:
        return _names()[dtype]
    except KeyError:
        raise UnsupportedTensorError(
            f"tensors of {dtype} cannot be carried; known are {', '.join(sorted(_torch_dtypes()))}"
        ) from None


def dtype_of_code(code: str) -> str:
    """The dtype name of a safetensors code such as `BF16`.

    Raises:
        UnsupportedTensorError: the code is unknown here.
    """
    try:
        return _SAFETENSORS_CODES[code]
    except KeyError:
        raise UnsupportedTensorError(
            f"safetensors dtype {code!r} is unknown here; known are {', '.join(sorted(_SAFETENSORS_CODES))}"
        ) from None


def item_size(name: str) -> int:
    """Bytes of one element.

    Raises:
        UnsupportedTensorError: there is no such dtype.
    """
    try:
        return _ITEM_SIZES[name]
    except KeyError:
        raise UnsupportedTensorError(f"dtype {name!r} is unknown; known are {', '.join(sorted(_ITEM_SIZES))}") from None
