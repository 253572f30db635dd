"""What a check of `doctor` found."""

from __future__ import annotations

from typing import Literal

import msgspec

__all__ = ["Finding", "Status"]

Status = Literal["ok", "note", "problem"]


class Finding(msgspec.Struct, frozen=True):
    """One thing that was looked at. `advice` is there unless all is well."""

    area: str
    name: str
    status: Status
    value: str
    advice: str = ""
