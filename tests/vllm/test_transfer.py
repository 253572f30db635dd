"""vLLM's own weight-transfer calls as a way in: backends of ours, offline, in a real engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.ports import free_port

Engine = Callable[..., dict[str, Any]]
Cold = Callable[..., dict[str, Any]]


def holds(engine: Engine, expected: dict[str, Any]) -> bool:
    state = engine("state")
    assert state["without_data"] == []
    return engine("tokens")["tokens"] == expected["tokens"] and state["served"] == expected["served"]


@pytest.fixture(scope="module")
def native(engine: Engine, cold: Cold, checkpoints: Path) -> Engine:
    """An engine with the backend `checkpoint_engine`, and dummy weights."""
    for name in ("qwen3", "qwen3-b"):
        cold(name)
    engine(
        "start",
        model=checkpoints / "qwen3",
        load_format="dummy",
        weight_transfer_config={"backend": "checkpoint_engine"},
    )
    return engine


def test_updates_by_proof_and_then_by_plan(native: Engine, cold: Cold, checkpoints: Path) -> None:
    ways = []
    for name in ("qwen3-b", "qwen3", "qwen3-b"):
        done = native("native", checkpoint=checkpoints / name)
        assert done["error"] is None, done
        assert (done["version"], done["dirty"], done["published"]) == (name, False, name)
        assert holds(native, cold(name))
        ways.append(done["last_update"]["reload"])
    assert ways == ["proof", "plan", "plan"]


def test_what_does_not_fit_changes_nothing_and_the_next_start_is_not_refused(
    native: Engine, cold: Cold, checkpoints: Path
) -> None:
    assert native("native", checkpoint=checkpoints / "qwen3")["error"] is None
    done = native("native", checkpoint=checkpoints / "qwen3-b", drop=["model.norm.weight"])
    assert "model.norm.weight" in done["message"]
    assert (done["version"], done["dirty"]) == ("qwen3", False)
    assert holds(native, cold("qwen3"))
    assert native("native", checkpoint=checkpoints / "qwen3-b", steps="suf")["error"] is None
    assert holds(native, cold("qwen3-b"))


def test_a_mixture_is_said_to_be_one_and_a_complete_update_heals_it(
    native: Engine, cold: Cold, checkpoints: Path
) -> None:
    done = native("native", checkpoint=checkpoints / "qwen3", break_after=20)
    assert "a fault made by the test" in done["message"]
    assert done["dirty"] is True
    healed = native("native", checkpoint=checkpoints / "qwen3", steps="suf")
    assert (healed["error"], healed["dirty"]) == (None, False)
    assert holds(native, cold("qwen3"))


def test_a_session_that_was_never_finished_keeps_nobody_from_starting(
    native: Engine, cold: Cold, checkpoints: Path
) -> None:
    assert native("native", checkpoint=checkpoints / "qwen3", steps="su")["error"] is None
    assert native("native", checkpoint=checkpoints / "qwen3-b", steps="suf")["error"] is None
    assert holds(native, cold("qwen3-b"))


def test_a_session_that_brings_nothing_is_an_error_once(native: Engine, checkpoints: Path) -> None:
    assert native("call", method="start_weight_update")["error"] is None
    assert "brought nothing" in native("call", method="finish_weight_update")["message"]
    assert native("native", checkpoint=checkpoints / "qwen3", steps="suf")["error"] is None


def test_a_loop_publishes_to_its_own_llm(native: Engine, cold: Cold, checkpoints: Path) -> None:
    """By `LlmClient`, which goes past vLLM's weight transfer."""
    for name in ("qwen3-b", "qwen3"):
        done = native("offline", checkpoint=checkpoints / name)
        assert done["error"] is None, done
        assert (done["version"], done["published"], done["door"]) == (name, name, "worker methods")
        assert not done["paused"]
        assert holds(native, cold(name))
    for name, equal in (("qwen3", True), ("qwen3-b", False)):
        compared = native("offline", checkpoint=checkpoints / name, what="verify")
        assert (compared["error"], compared["equal"], compared["version"]) == (None, equal, "qwen3")
    assert holds(native, cold("qwen3"))


def test_an_own_llm_serves_what_is_whole_and_stays_paused_with_a_mixture(
    native: Engine, cold: Cold, checkpoints: Path
) -> None:
    assert native("offline", checkpoint=checkpoints / "qwen3")["error"] is None
    refused = native("offline", checkpoint=checkpoints / "qwen3-b", drop=["model.norm.weight"])
    assert "it still holds its old weights (version 'qwen3'), and it serves them" in refused["message"]
    assert (refused["dirty"], refused["paused"], refused["published"]) == (False, False, "qwen3")
    assert holds(native, cold("qwen3"))
    broken = native("offline", checkpoint=checkpoints / "qwen3-b", break_after=20)
    assert "its weights are a mixture now; it was left paused: update again" in broken["message"]
    assert (broken["dirty"], broken["paused"], broken["published"]) == (True, True, "qwen3")
    healed = native("offline", checkpoint=checkpoints / "qwen3-b")
    assert (healed["error"], healed["dirty"], healed["paused"], healed["published"]) == (None, False, False, "qwen3-b")
    assert holds(native, cold("qwen3-b"))


@pytest.fixture(scope="module")
def ipc(native: Engine, checkpoints: Path) -> Engine:
    """An engine that vLLM's own `ipc` trainers send to; comes after the tests of the other one."""
    native(
        "start",
        model=checkpoints / "qwen3",
        load_format="dummy",
        weight_transfer_config={"backend": "checkpoint_engine_ipc"},
    )
    return native


def ways_of(engine: Engine, cold: Cold, checkpoints: Path, buffer: int | None) -> list[str]:
    ways = []
    for name in ("qwen3-b", "qwen3", "qwen3-b", "qwen3"):
        done = engine("ipc", checkpoint=checkpoints / name, buffer=buffer)
        assert (done["error"], done["dirty"]) == (None, False), done
        assert (done["calls"] > 1) == (buffer is not None)
        assert holds(engine, cold(name))
        ways.append(done["last_update"]["reload"])
    return ways


def test_vllms_ipc_trainer_not_packed_sends_all_at_once(ipc: Engine, cold: Cold, checkpoints: Path) -> None:
    assert ways_of(ipc, cold, checkpoints, None) == ["proof", "plan", "plan", "plan"]


def test_vllms_ipc_trainer_packed_sends_bucket_by_bucket(ipc: Engine, cold: Cold, checkpoints: Path) -> None:
    """What comes is known from the update before; a trainer that died leaves nothing to go by."""
    gone = ipc("ipc", checkpoint=checkpoints / "qwen3-b", buffer=300_000, stop_after=0)
    assert "the trainer is gone" in gone["message"]
    assert ways_of(ipc, cold, checkpoints, 300_000) == ["plan", "plan", "plan", "plan"]


def test_a_trainer_that_dies_half_way_leaves_a_mixture_that_the_next_heals(
    ipc: Engine, cold: Cold, checkpoints: Path
) -> None:
    gone = ipc("ipc", checkpoint=checkpoints / "qwen3-b", buffer=300_000, stop_after=2)
    assert "the trainer is gone" in gone["message"]
    assert (gone["updating"], gone["dirty"]) == (True, True)
    ways = []
    for name in ("qwen3-b", "qwen3", "qwen3-b"):
        done = ipc("ipc", checkpoint=checkpoints / name, buffer=300_000)
        assert (done["error"], done["dirty"], done["updating"]) == (None, False, False), done
        assert holds(ipc, cold(name))
        ways.append(done["last_update"]["reload"])
    assert ways == ["loader", "proof", "plan"]


def test_a_trainer_that_leaves_tensors_out_is_told_and_the_next_one_heals(
    ipc: Engine, cold: Cold, checkpoints: Path
) -> None:
    assert ipc("ipc", checkpoint=checkpoints / "qwen3", buffer=300_000)["error"] is None
    lacking = ipc("ipc", checkpoint=checkpoints / "qwen3-b", buffer=300_000, drop=["model.norm.weight"])
    assert "model.norm.weight" in lacking["message"]
    assert lacking["dirty"] is True
    strange = ipc("ipc", checkpoint=checkpoints / "qwen3-b", rename={"model.norm.weight": "nonsense.weight"})
    assert "nonsense.weight" in strange["message"]
    assert ipc("ipc", checkpoint=checkpoints / "qwen3-b", buffer=300_000)["error"] is None
    assert holds(ipc, cold("qwen3-b"))


@pytest.fixture(scope="module")
def nccl(ipc: Engine, checkpoints: Path) -> Engine:
    """An engine that vLLM's own `nccl` trainers send to; comes after the tests of the other ones."""
    ipc(
        "start",
        model=checkpoints / "qwen3",
        load_format="dummy",
        weight_transfer_config={"backend": "checkpoint_engine_nccl"},
    )
    return ipc


@pytest.mark.parametrize(("buffer", "first"), [(None, "proof"), (300_000, "plan")], ids=["not packed", "packed"])
def test_vllms_nccl_trainer(nccl: Engine, cold: Cold, checkpoints: Path, buffer: int | None, first: str) -> None:
    ways, port = [], free_port()
    for name in ("qwen3-b", "qwen3", "qwen3-b"):
        done = nccl("nccl", checkpoint=checkpoints / name, buffer=buffer, port=None if ways else port)
        assert (done["error"], done["dirty"], done["door"]) == (None, False, "checkpoint_engine_nccl"), done
        assert holds(nccl, cold(name))
        ways.append(done["last_update"]["reload"])
    assert ways == [first, "plan", "plan"]


def test_an_nccl_trainer_that_is_refused_hears_why_and_goes_on(nccl: Engine, cold: Cold, checkpoints: Path) -> None:
    """It sends on until the end, which it cannot be kept from; the group is in step for the next update."""
    assert nccl("nccl", checkpoint=checkpoints / "qwen3", buffer=300_000, port=free_port())["error"] is None
    refused = nccl("nccl", checkpoint=checkpoints / "qwen3-b", rename={"model.norm.weight": "nonsense.weight"})
    assert "nonsense.weight" in refused["message"]
    assert (refused["dirty"], refused["updating"]) == (False, False)
    assert holds(nccl, cold("qwen3"))
    assert nccl("nccl", checkpoint=checkpoints / "qwen3-b")["error"] is None
    assert holds(nccl, cold("qwen3-b"))


def test_an_nccl_trainer_that_dies_leaves_a_mixture_that_the_next_one_heals(
    nccl: Engine, cold: Cold, checkpoints: Path
) -> None:
    gone = nccl("nccl", checkpoint=checkpoints / "qwen3", buffer=300_000, port=free_port(), leave_after=2)
    assert "the trainer is gone" in gone["message"]
    healed = nccl("nccl", checkpoint=checkpoints / "qwen3", buffer=300_000, port=free_port())
    assert (healed["error"], healed["dirty"], healed["updating"]) == (None, False, False), healed
    assert holds(nccl, cold("qwen3"))
