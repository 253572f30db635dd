"""SGLang's sink keeps the contract that every sink keeps, on models as SGLang loads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize("kind", ["qwen3", "moe"])
def test_the_contract_and_what_the_next_engine_need_not_prove(
    in_sglang: Callable[..., Any], checkpoints: Path, kind: str
) -> None:
    told = in_sglang("contract_process.py", checkpoints, kind)
    assert told["failed"] == {}
    assert told["firsts"] == [["proof", []], ["plan", []], ["proof", []]]
