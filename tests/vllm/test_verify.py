"""A comparison with a checkpoint sees every bit that a cold start would have otherwise, and changes none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Engine = Callable[..., dict[str, Any]]
Cold = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("kind", ["qwen3", "tied", "moe"])
def test_equal_different_and_spoiled(engine: Engine, cold: Cold, checkpoints: Path, kind: str) -> None:
    expected = cold(kind)
    engine("start", model=checkpoints / f"{kind}-b")
    before = engine("state"), engine("tokens")

    equal = engine("update", checkpoint=checkpoints / f"{kind}-b", reload="verify")
    assert equal["error"] is None, equal
    assert equal["details"]["different_tensors"] == 0, equal
    assert equal["details"]["compared_tensors"] > 10
    assert not equal["details"]["not_compared"]

    # Buckets smaller than a layer, and a checkpoint in which every matrix differs: embedding, output, four in each of
    # two layers. (Packed ones are compared too, so there is one more where the output layer has both.)
    other = engine("update", checkpoint=checkpoints / kind, reload="verify", bucket_bytes=1)
    assert other["details"]["different_tensors"] >= 10
    assert "embed_tokens" in other["details"]["different"]
    assert (engine("state"), engine("tokens")) == before

    assert engine("update", checkpoint=checkpoints / kind, reload="verify", break_after=3)["intact"]
    assert (engine("state"), engine("tokens")) == before

    engine("spoil", parameter="model.layers.1.input_layernorm.weight")
    spoiled = engine("update", checkpoint=checkpoints / f"{kind}-b", reload="verify")["details"]
    assert (spoiled["different_tensors"], spoiled["different"]) == (1, "model.layers.1.input_layernorm.weight")
    assert engine("update", checkpoint=checkpoints / kind)["error"] is None
    assert engine("update", checkpoint=checkpoints / kind, reload="verify")["details"]["different_tensors"] == 0
    assert engine("tokens")["tokens"] == expected["tokens"]


def test_updates_after_it_reach_every_layer(fresh_engine: Engine, cold: Cold, checkpoints: Path) -> None:
    expected = cold("qwen3")
    fresh_engine("start", model=checkpoints / "qwen3-b")
    assert fresh_engine("update", checkpoint=checkpoints / "qwen3-b", reload="verify")["error"] is None
    for _ in range(3):
        assert fresh_engine("update", checkpoint=checkpoints / "qwen3")["error"] is None
        assert fresh_engine("state")["served"] == expected["served"]


def test_an_engine_that_moves_its_experts_is_neither_updated_nor_compared(engine: Engine, checkpoints: Path) -> None:
    """Loaders know where experts were at the start, inference where they are now: both would be wrong, and agree."""
    engine("start", model=checkpoints / "moe")
    engine("move_experts", moves=True)
    for reload in ("auto", "loader", "plan", "verify"):
        refused = engine("update", checkpoint=checkpoints / "moe-b", reload=reload)
        assert (refused["error"], refused["intact"], refused["dirty"]) == ("WeightsRejectedError", True, False)
        assert "--enable-eplb" in refused["message"]
    engine("move_experts", moves=False)
    assert engine("update", checkpoint=checkpoints / "moe-b")["error"] is None
