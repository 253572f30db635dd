"""Reload plans in a real vLLM engine: proved by its loader, then used in its place, and never silently wrong."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Engine = Callable[..., dict[str, Any]]
Cold = Callable[..., dict[str, Any]]

GATE_UP = "model.layers.0.mlp.gate_up_proj.weight"
Q = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"


def holds(engine: Engine, expected: dict[str, Any]) -> bool:
    state = engine("state")
    assert state["without_data"] == []
    same_tokens = engine("tokens")["tokens"] == expected["tokens"]
    assert same_tokens == (state["served"] == expected["served"])
    return same_tokens


@pytest.fixture
def by_plan(engine: Engine, cold: Cold, checkpoints: Path) -> Engine:
    """Holds qwen3 and goes by plan from now on."""
    cold("qwen3-b")
    cold("qwen3")
    engine("start", model=checkpoints / "qwen3", load_format="dummy")
    for name in ("qwen3-b", "qwen3"):
        assert engine("update", checkpoint=checkpoints / name)["error"] is None
    return engine


@pytest.mark.parametrize("kind", ["qwen3", "tied", "moe"])
def test_three_updates_by_plan(engine: Engine, cold: Cold, checkpoints: Path, kind: str) -> None:
    expected = {name: cold(name) for name in (kind, f"{kind}-b")}
    engine("start", model=checkpoints / kind, load_format="dummy")
    addresses = engine("state")["addresses"]
    ways = []
    for name, bucket_bytes in ((f"{kind}-b", 100_000), (kind, 8 << 20), (f"{kind}-b", 5_000), (kind, 1)):
        done = engine("update", checkpoint=checkpoints / name, bucket_bytes=bucket_bytes)
        assert done["error"] is None, done
        ways.append(done["details"]["reload"])
        assert done["details"]["cloned_bytes"] == 0, "the loader was given memory to fill before the tensors came"
        assert holds(engine, expected[name])
    assert ways == ["proof", "plan", "plan", "plan"]
    assert done["details"]["loader_bytes"] == 0
    assert engine("state")["addresses"] == addresses


def test_tensors_in_shards_come_as_whole_ones_do(engine: Engine, cold: Cold, checkpoints: Path) -> None:
    expected = {name: cold(name) for name in ("moe", "moe-b")}
    engine("start", model=checkpoints / "moe", load_format="dummy")
    ways = []
    for name, shards in (("moe-b", 2), ("moe", 3), ("moe-b", 2)):
        done = engine("update", checkpoint=checkpoints / name, shards=shards)
        assert done["error"] is None, done
        ways.append(done["details"]["reload"])
        assert holds(engine, expected[name])
    assert ways == ["proof", "plan", "plan"]
    assert done["details"]["loader_bytes"] == 0
    together, alone = (
        engine("update", checkpoint=checkpoints / "moe", shards=2, bucket_bytes=1 << 24, at_once=at_once)
        for at_once in (None, 1)
    )
    assert alone["error"] is None, alone
    assert holds(engine, expected["moe"])
    assert 0 < 3 * alone["opened"] < together["opened"], "a layer that is rebuilt waits for the others"


def test_layers_keep_the_memory_that_they_were_given(engine: Engine, cold: Cold, checkpoints: Path) -> None:
    """Before 0.24, vLLM gave a layer that it processes new memory, whatever it had."""
    expected = {name: cold(name) for name in ("qwen3", "qwen3-b")}
    engine("start", model=checkpoints / "qwen3", load_format="dummy")
    for name in ("qwen3-b", "qwen3", "qwen3-b"):
        done = engine("update", checkpoint=checkpoints / name, without=["kept memory"])
        assert done["error"] is None, done
        assert holds(engine, expected[name])


def test_one_altered_entry_is_found_and_its_layer_left_to_the_loader(
    engine: Engine, cold: Cold, checkpoints: Path
) -> None:
    expected = {name: cold(name) for name in ("qwen3", "qwen3-b")}
    engine("start", model=checkpoints / "qwen3", load_format="dummy")
    proof = engine("update", checkpoint=checkpoints / "qwen3-b", alter=GATE_UP)
    assert proof["details"]["reload"] == "proof"
    assert holds(engine, expected["qwen3-b"]), "the loader did this update"
    for name in ("qwen3", "qwen3-b", "qwen3"):
        done = engine("update", checkpoint=checkpoints / name, bucket_bytes=5_000)
        assert done["error"] is None, done
        assert done["details"]["reload"] == "plan"
        assert done["details"]["plan_bytes"] > done["details"]["loader_bytes"] > 0
        assert "mlp.gate_up_proj: vLLM's loader put something else than" in done["details"]["loader_reason"]
        assert holds(engine, expected[name]), "planned and loaded layers side by side"


def test_an_update_by_plan_that_breaks_off_is_dirty_and_a_full_one_heals(
    by_plan: Engine, cold: Cold, checkpoints: Path
) -> None:
    done = by_plan("update", checkpoint=checkpoints / "qwen3-b", bucket_bytes=1, break_after=12)
    assert (done["error"], done["intact"], done["dirty"]) == ("RuntimeError", False, True)
    assert not holds(by_plan, cold("qwen3-b"))
    healed = by_plan("update", checkpoint=checkpoints / "qwen3-b")
    assert (healed["error"], healed["dirty"], healed["details"]["reload"]) == (None, False, "proof")
    assert holds(by_plan, cold("qwen3-b"))


def test_an_update_that_has_only_copied_is_healed_by_plan(by_plan: Engine, cold: Cold, checkpoints: Path) -> None:
    done = by_plan("update", checkpoint=checkpoints / "qwen3-b", bucket_bytes=1, first=NORM, break_after=1)
    assert (done["error"], done["intact"], done["dirty"]) == ("RuntimeError", False, True)
    assert not holds(by_plan, cold("qwen3"))
    healed = by_plan("update", checkpoint=checkpoints / "qwen3")
    assert (healed["error"], healed["dirty"], healed["details"]["reload"]) == (None, False, "plan")
    assert holds(by_plan, cold("qwen3"))


def test_a_layer_that_was_only_begun_gets_its_old_weights_back(by_plan: Engine, cold: Cold, checkpoints: Path) -> None:
    done = by_plan("update", checkpoint=checkpoints / "qwen3-b", bucket_bytes=1, first=Q, break_after=1)
    assert (done["error"], done["intact"], done["dirty"]) == ("RuntimeError", True, False)
    assert holds(by_plan, cold("qwen3"))


def test_biases_of_a_layer_that_was_only_begun_come_back_as_well(engine: Engine, cold: Cold, checkpoints: Path) -> None:
    expected = cold("mtp")
    engine("start", model=checkpoints / "mtp")
    for name in ("mtp-b", "mtp"):
        assert engine("update", checkpoint=checkpoints / name)["error"] is None
    bias = Q.replace("weight", "bias")
    done = engine("update", checkpoint=checkpoints / "mtp-b", bucket_bytes=1, first=bias, break_after=1)
    assert (done["error"], done["intact"], done["dirty"]) == ("RuntimeError", True, False)
    assert holds(engine, expected)


def test_layers_that_the_first_update_only_began_get_their_old_weights_back(
    engine: Engine, cold: Cold, checkpoints: Path
) -> None:
    expected = cold("mtp")
    engine("start", model=checkpoints / "mtp")
    for first in (Q, Q.replace("weight", "bias")):
        done = engine("update", checkpoint=checkpoints / "mtp-b", bucket_bytes=1, first=first, break_after=1)
        assert (done["error"], done["intact"], done["dirty"]) == ("RuntimeError", True, False)
        assert holds(engine, expected)


def test_a_missing_tensor_is_refused_before_anything_changes(by_plan: Engine, cold: Cold, checkpoints: Path) -> None:
    done = by_plan("update", checkpoint=checkpoints / "qwen3-b", drop=[NORM])
    assert (done["error"], done["intact"]) == ("WeightsRejectedError", True)
    assert holds(by_plan, cold("qwen3"))
    done = by_plan("update", checkpoint=checkpoints / "qwen3-b")
    assert done["error"] is None
    assert holds(by_plan, cold("qwen3-b"))


def test_another_dtype_is_another_plan_and_the_cast_is_the_loaders(
    by_plan: Engine, cold: Cold, checkpoints: Path
) -> None:
    ways = []
    for name in ("qwen3-b", "qwen3", "qwen3-b"):
        done = by_plan("update", checkpoint=checkpoints / name, as_dtype="float32")
        assert done["error"] is None, done
        ways.append(done["details"]["reload"])
        assert holds(by_plan, cold(name))
    assert ways == ["proof", "plan", "plan"]


def test_the_way_can_be_chosen(by_plan: Engine, cold: Cold, checkpoints: Path) -> None:
    done = by_plan("update", checkpoint=checkpoints / "qwen3-b", reload="loader")
    assert (done["details"]["reload"], done["details"]["plan_bytes"]) == ("loader", 0)
    assert holds(by_plan, cold("qwen3-b"))
    done = by_plan("update", checkpoint=checkpoints / "qwen3", reload="plan")
    assert (done["details"]["reload"], done["details"]["loader_bytes"]) == ("plan", 0)
    assert holds(by_plan, cold("qwen3"))


def test_nothing_but_the_plan_is_refused_where_it_does_not_reach(engine: Engine, cold: Cold, checkpoints: Path) -> None:
    cold("qwen3")
    engine("start", model=checkpoints / "qwen3")
    done = engine("update", checkpoint=checkpoints / "qwen3-b", reload="plan", without=["plan"])
    assert (done["error"], done["intact"]) == ("WeightsRejectedError", True)
    assert "--reload auto" in done["message"]
    assert holds(engine, cold("qwen3"))


def test_adapters_stay_as_they_are_when_their_base_is_updated(
    engine: Engine, cold: Cold, checkpoints: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    engine("make_adapter", checkpoint=checkpoints / "qwen3", directory=adapter)
    plain = {name: cold(name) for name in ("qwen3", "qwen3-b")}
    adapted = {}
    for name in ("qwen3-b", "qwen3"):
        engine("start", model=checkpoints / name, enable_lora=True, max_lora_rank=8)
        adapted[name] = engine("tokens", adapter=adapter)["tokens"]
    shutil.rmtree(adapter)  # from now on vLLM has it in memory alone
    for name, reload, way in (
        ("qwen3-b", "auto", "proof"),
        ("qwen3", "auto", "plan"),
        ("qwen3-b", "loader", "loader"),
        ("qwen3", "plan", "plan"),
    ):
        done = engine("update", checkpoint=checkpoints / name, reload=reload)
        assert (done["error"], done["details"]["reload"]) == (None, way), done
        assert engine("tokens", adapter=adapter)["tokens"] == adapted[name]
        assert holds(engine, plain[name])
    assert len({str(tokens) for tokens in (*adapted.values(), *(each["tokens"] for each in plain.values()))}) == 4
    compared = engine("update", checkpoint=checkpoints / "qwen3", reload="verify")
    assert compared["error"] is None, compared
    assert compared["details"]["different_tensors"] == compared["details"]["unseen_tensors"] == 0
    broken = engine("update", checkpoint=checkpoints / "qwen3-b", fail_after=12, reload="loader", bucket_bytes=1)
    assert (broken["intact"], broken["dirty"]) == (False, True)
    assert engine("update", checkpoint=checkpoints / "qwen3-b")["error"] is None
    assert engine("tokens", adapter=adapter)["tokens"] == adapted["qwen3-b"]
    engine("wrap_experts")
    refused = engine("update", checkpoint=checkpoints / "qwen3")
    assert (refused["error"], refused["intact"], refused["dirty"]) == ("WeightsRejectedError", True, False)
    assert "--lora-target-modules" in refused["message"]
    assert "model.layers.0.mlp.experts" in refused["message"]
