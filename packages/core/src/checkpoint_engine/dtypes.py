"""The tensor types that can be carried, by the names used in catalogs and on the link."""

from __future__ import annotations

import torch

from checkpoint_engine.errors import UnsupportedTensorError

# safetensors code -> name of the torch dtype. Types that an old torch lacks are left out at import.
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
    "F8_E8M0": "float8_e8m0fnu",
}

_TORCH_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name) for name in _SAFETENSORS_CODES.values() if hasattr(torch, name)
}
_NAMES = {dtype: name for name, dtype in _TORCH_DTYPES.items()}


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of that name.

    Raises:
        UnsupportedTensorError: this torch has no such dtype.
    """
    try:
        return _TORCH_DTYPES[name]
    except KeyError:
        raise UnsupportedTensorError(
            f"dtype {name!r} is unknown to torch {torch.__version__}; known are {', '.join(sorted(_TORCH_DTYPES))}"
        ) from None


def dtype_name(dtype: torch.dtype) -> str:
    """The name by which a torch dtype travels, such as `bfloat16`.

    Raises:
        UnsupportedTensorError: tensors of this dtype cannot be carried.
    """
    try:
        return _NAMES[dtype]
    except KeyError:
        raise UnsupportedTensorError(
            f"tensors of {dtype} cannot be carried; known are {', '.join(sorted(_TORCH_DTYPES))}"
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
    """Bytes of one element."""
    return torch_dtype(name).itemsize
