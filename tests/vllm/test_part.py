"""Some tensors of a checkpoint, asked for by name: exactly these change in a real vLLM engine, or none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Engine = Callable[..., dict[str, Any]]
Cold = Callable[..., dict[str, Any]]

LAYER = "model.layers.1."
Q = f"{LAYER}self_attn.q_proj.*"


def mixed(old: dict[str, Any], new: dict[str, Any], *parts: str) -> dict[str, str]:
    """What each module computes, where those whose names begin so are of `new`."""
    taken = {name: digest for name, digest in new["served"].items() if name.startswith(parts)}
    assert taken
    assert any(old["served"][name] != digest for name, digest in taken.items())
    return {**old["served"], **taken}


@pytest.mark.parametrize("kind", ["qwen3", pytest.param("moe", marks=pytest.mark.long)])
def test_what_is_named_changes_and_nothing_else(engine: Engine, cold: Cold, checkpoints: Path, kind: str) -> None:
    old, new = cold(kind), cold(f"{kind}-b")
    engine("start", model=checkpoints / kind)
    addresses = engine("state")["addresses"]
    ways, only = [], [f"{LAYER}*"]
    for name in (f"{kind}-b", kind, f"{kind}-b"):
        done = engine("update", checkpoint=checkpoints / name, only=only, bucket_bytes=5_000)
        assert done["error"] is None, done
        ways.append(done["details"]["reload"])
        assert (done["partial"], done["details"]["partial"], done["whole_version"]) == (True, 1, "")
        expected = mixed(old, new, LAYER) if name == f"{kind}-b" else old["served"]
        assert engine("state")["served"] == expected
        verified = engine("update", checkpoint=checkpoints / name, only=only, reload="verify")
        assert (verified["error"], verified["details"]["different_tensors"]) == (None, 0), verified
        assert verified["details"]["compared_tensors"] > 0
    assert ways == ["proof", "plan", "plan"]
    assert engine("state")["addresses"] == addresses
    other = engine("update", checkpoint=checkpoints / kind, only=only, reload="verify")
    assert other["details"]["different_tensors"] > 0
    assert engine("update", checkpoint=checkpoints / kind, only=only, reload="loader")["error"] is None
    assert engine("state")["served"] == old["served"]
    whole = engine("update", checkpoint=checkpoints / f"{kind}-b")
    assert (whole["partial"], whole["whole_version"]) == (False, f"{kind}-b")
    assert engine("tokens")["tokens"] == new["tokens"]


def test_a_part_of_what_is_one_is_refused_by_name(engine: Engine, cold: Cold, checkpoints: Path) -> None:
    old = cold("qwen3")
    engine("start", model=checkpoints / "qwen3")
    for only, named in (([Q], f"{LAYER}self_attn.qkv_proj.weight"), ([f"{LAYER}mlp.up*"], "gate_up_proj.weight")):
        for reload in ("auto", "loader", "verify"):
            done = engine("update", checkpoint=checkpoints / "qwen3-b", only=only, reload=reload)
            assert (done["error"], done["intact"], done["dirty"]) == ("WeightsRejectedError", True, False)
            assert named in done["message"]
    unknown = engine("update", checkpoint=checkpoints / "qwen3-b", only=["*"], without=["plan"])
    assert (unknown["error"], unknown["intact"]) == ("WeightsRejectedError", True)
    assert engine("state")["served"] == old["served"]


@pytest.mark.long
def test_one_expert_alone_and_a_tied_head_are_refused(engine: Engine, cold: Cold, checkpoints: Path) -> None:
    for kind, only, named in (
        ("moe", [f"{LAYER}mlp.experts.0.*"], "mlp.experts"),
        ("tied", ["lm_head.*"], ""),
    ):
        old = cold(kind)
        engine("start", model=checkpoints / kind)
        done = engine("update", checkpoint=checkpoints / f"{kind}-b", only=only)
        assert (done["error"], done["intact"], done["dirty"]) == ("WeightsRejectedError", True, False), done
        assert named in done["message"]
        assert engine("state")["served"] == old["served"]


@pytest.mark.long
def test_an_embedding_that_is_tied_takes_the_head_along(engine: Engine, cold: Cold, checkpoints: Path) -> None:
    old, new = cold("tied"), cold("tied-b")
    engine("start", model=checkpoints / "tied")
    for name in ("tied-b", "tied", "tied-b"):
        assert engine("update", checkpoint=checkpoints / name, only=["*embed_tokens*"])["error"] is None
    assert engine("state")["served"] == mixed(old, new, "model.embed_tokens", "lm_head")


@pytest.mark.long
def test_a_mixture_is_healed_by_a_whole_checkpoint_only(engine: Engine, cold: Cold, checkpoints: Path) -> None:
    cold("qwen3-b")
    engine("start", model=checkpoints / "qwen3")
    layers = ["model.layers.*"]
    failed = engine("update", checkpoint=checkpoints / "qwen3-b", only=layers, bucket_bytes=5_000, break_after=60)
    assert failed["dirty"], failed
    done = engine("update", checkpoint=checkpoints / "qwen3-b", only=layers)
    assert (done["error"], done["dirty"]) == ("CheckpointStateError", True)
    assert "bring a whole checkpoint" in done["message"]
    assert engine("update", checkpoint=checkpoints / "qwen3-b")["error"] is None
    assert engine("tokens")["tokens"] == cold("qwen3-b")["tokens"]


def test_a_loader_that_touches_more_is_found_out(engine: Engine, cold: Cold, checkpoints: Path) -> None:
    cold("qwen3-b")
    engine("start", model=checkpoints / "qwen3")
    done = engine("update", checkpoint=checkpoints / "qwen3-b", only=[f"{LAYER}*"], spill="model.norm.weight")
    assert (done["error"], done["dirty"]) == ("WorkerError", True)
    assert "model.norm.weight" in done["message"]
    assert engine("update", checkpoint=checkpoints / "qwen3-b")["error"] is None
    assert engine("tokens")["tokens"] == cold("qwen3-b")["tokens"]
