from __future__ import annotations

import pytest
import torch

from checkpoint_engine import dtypes
from checkpoint_engine.errors import UnsupportedTensorError

pytestmark = pytest.mark.pure

CODES = {
    "BOOL": (torch.bool, 1),
    "U8": (torch.uint8, 1),
    "I8": (torch.int8, 1),
    "U16": (torch.uint16, 2),
    "I16": (torch.int16, 2),
    "F16": (torch.float16, 2),
    "BF16": (torch.bfloat16, 2),
    "U32": (torch.uint32, 4),
    "I32": (torch.int32, 4),
    "F32": (torch.float32, 4),
    "U64": (torch.uint64, 8),
    "I64": (torch.int64, 8),
    "F64": (torch.float64, 8),
    "C64": (torch.complex64, 8),
    "F8_E4M3": (torch.float8_e4m3fn, 1),
    "F8_E5M2": (torch.float8_e5m2, 1),
    "F8_E4M3FNUZ": (torch.float8_e4m3fnuz, 1),
    "F8_E5M2FNUZ": (torch.float8_e5m2fnuz, 1),
    "F8_E8M0": (torch.float8_e8m0fnu, 1),
    "F4": (torch.float4_e2m1fn_x2, 1),
}


@pytest.mark.parametrize(("code", "dtype", "size"), [(code, *facts) for code, facts in CODES.items()])
def test_a_safetensors_code_leads_to_its_torch_dtype_and_back(code: str, dtype: torch.dtype, size: int) -> None:
    name = dtypes.dtype_of_code(code)
    assert dtypes.torch_dtype(name) is dtype
    assert dtypes.dtype_name(dtype) == name
    assert dtypes.item_size(name) == size


def test_unknown_names_are_refused_with_what_is_known() -> None:
    with pytest.raises(UnsupportedTensorError, match=r"'float3'.*bfloat16"):
        dtypes.torch_dtype("float3")
    with pytest.raises(UnsupportedTensorError, match=r"'F6_E2M3'.*BF16"):
        dtypes.dtype_of_code("F6_E2M3")
    with pytest.raises(UnsupportedTensorError, match=r"torch\.quint8.*bfloat16"):
        dtypes.dtype_name(torch.quint8)
