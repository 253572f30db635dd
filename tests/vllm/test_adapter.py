"""`VllmSink` in a real vLLM engine: what it holds after an update is what a cold start of that checkpoint holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Engine = Callable[..., dict[str, Any]]
Cold = Callable[..., dict[str, Any]]

Q = "model.layers.0.self_attn.q_proj.weight"
SELF_DRAFT = {"method": "draft_model", "num_speculative_tokens": 3}
MTP = {"method": "mtp", "num_speculative_tokens": 1}
WHOLE, SMALLER_THAN_A_LAYER = 8 << 20, 5_000


def holds(engine: Engine, expected: dict[str, Any]) -> bool:
    state = engine("state")
    assert state["without_data"] == []
    same_tokens = engine("tokens")["tokens"] == expected["tokens"]
    assert same_tokens == (state["served"] == expected["served"])
    return same_tokens and state["draft"] == expected["draft"]


@pytest.mark.parametrize("kind", ["qwen3", "tied", "moe"])
def test_from_dummy_weights_to_a_to_b_and_back(engine: Engine, cold: Cold, checkpoints: Path, kind: str) -> None:
    expected = {name: cold(name) for name in (kind, f"{kind}-b")}
    assert expected[kind]["tokens"] != expected[f"{kind}-b"]["tokens"]
    engine("start", model=checkpoints / kind, load_format="dummy")
    assert not holds(engine, expected[kind])
    addresses = engine("state")["addresses"]
    for name in (kind, f"{kind}-b", kind):
        for bucket_bytes in (WHOLE, SMALLER_THAN_A_LAYER):
            done = engine("update", checkpoint=checkpoints / name, bucket_bytes=bucket_bytes)
            assert done["error"] is None, done
            assert done["version"] == name
            assert holds(engine, expected[name])
    assert engine("state")["addresses"] == addresses


@pytest.fixture
def serving_a(engine: Engine, cold: Cold, checkpoints: Path) -> Engine:
    cold("qwen3-b")
    cold("qwen3")
    engine("start", model=checkpoints / "qwen3")
    return engine


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rename": {Q: "nonsense.weight"}}, "nonsense.weight"),
        ({"rename": {Q: Q.replace("q_proj", "nonsense")}}, "self_attn.nonsense"),
        ({"shorten": [Q]}, Q),
        ({"double": [Q]}, Q),
        ({"drop": [Q]}, "qkv_proj.weight (16384 of 32768 elements"),
        ({"drop": ["model.norm.weight"]}, "model.norm.weight (nothing)"),
    ],
    ids=["unknown", "unknown-in-a-layer", "too-short", "too-long", "part-missing", "missing"],
)
def test_what_does_not_fit_is_refused_before_anything_changes(
    serving_a: Engine, cold: Cold, checkpoints: Path, change: dict[str, Any], named: str
) -> None:
    done = serving_a("update", checkpoint=checkpoints / "qwen3-b", **change)
    assert done["error"] == "WeightsRejectedError"
    assert named in done["message"]
    assert (done["intact"], done["dirty"]) == (True, False)
    assert holds(serving_a, cold("qwen3"))


@pytest.mark.parametrize(
    ("change", "named"),
    [({"drop": [Q]}, "qkv_proj.weight (some parts)"), ({"drop": ["model.norm.weight"]}, "model.norm.weight")],
    ids=["part-missing", "missing"],
)
def test_what_is_missing_is_found_at_the_end_where_no_check_beforehand_is_possible(
    serving_a: Engine, cold: Cold, checkpoints: Path, change: dict[str, Any], named: str
) -> None:
    done = serving_a("update", checkpoint=checkpoints / "qwen3-b", without=["plan"], **change)
    assert done["error"] == "WeightsRejectedError"
    assert named in done["message"]
    assert (done["intact"], done["dirty"]) == (False, True)
    assert serving_a("update", checkpoint=checkpoints / "qwen3-b", without=["plan"])["error"] is None
    assert holds(serving_a, cold("qwen3-b"))


@pytest.mark.parametrize("without", [(), ("plan",)], ids=["planned", "unplanned"])
def test_who_accepts_what_is_missing_gets_no_torn_layer(
    serving_a: Engine, cold: Cold, checkpoints: Path, without: tuple[str, ...]
) -> None:
    """Of a fused layer the rest would be memory that nobody has written."""
    how = {"checkpoint": checkpoints / "qwen3-b", "without": without, "lenient": True}
    done = serving_a("update", drop=[Q], **how)
    assert done["error"] == "WeightsRejectedError"
    assert "a layer is updated whole or not at all" in done["message"]
    assert serving_a("update", drop=["model.norm.weight"], **how)["error"] is None
    state = serving_a("state")["served"]
    # Unplanned, the first attempt has brought b's before it was refused.
    kept = cold("qwen3-b" if without else "qwen3")["served"]["model.norm"]
    assert state == cold("qwen3-b")["served"] | {"model.norm": kept}


def test_a_fault_before_any_layer_is_complete_leaves_the_old_weights(
    serving_a: Engine, cold: Cold, checkpoints: Path
) -> None:
    done = serving_a("update", checkpoint=checkpoints / "qwen3-b", fail_after=0)
    assert (done["error"], done["intact"], done["dirty"]) == ("WorkerError", True, False)
    assert "model.embed_tokens.weight" in done["message"]
    assert holds(serving_a, cold("qwen3"))


@pytest.mark.parametrize("kind", ["qwen3", "moe", "mtp"])
def test_a_fault_in_the_middle_leaves_a_usable_mixture_that_a_full_update_heals(
    engine: Engine, cold: Cold, checkpoints: Path, kind: str
) -> None:
    expected = cold(f"{kind}-b")
    engine("start", model=checkpoints / kind)
    done = engine("update", checkpoint=checkpoints / f"{kind}-b", fail_after=12, bucket_bytes=1)
    assert (done["error"], done["intact"], done["dirty"]) == ("WorkerError", False, True)
    assert not holds(engine, expected)
    refused = engine("update", checkpoint=checkpoints / f"{kind}-b", drop=["model.norm.weight"])
    assert (refused["error"], refused["dirty"]) == ("WeightsRejectedError", True)
    healed = engine("update", checkpoint=checkpoints / f"{kind}-b")
    assert (healed["error"], healed["dirty"]) == (None, False)
    assert holds(engine, expected)


def test_biases_that_vllm_overwrites_in_place_come_back(engine: Engine, cold: Cold, checkpoints: Path) -> None:
    expected = cold("mtp")
    engine("start", model=checkpoints / "mtp")
    names = ["model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.k_proj.bias"]
    # Nothing but biases, so that no layer is complete when the loader breaks.
    others = engine("update", checkpoint=checkpoints / "mtp-b", without=["plan"], only=names)
    assert (others["error"], others["intact"], others["dirty"]) == ("WeightsRejectedError", True, False)
    assert holds(engine, expected)


@pytest.mark.parametrize("bucket_bytes", [WHOLE, SMALLER_THAN_A_LAYER])
def test_a_draft_model_of_the_same_checkpoint_follows(
    engine: Engine, cold: Cold, checkpoints: Path, bucket_bytes: int
) -> None:
    expected = {name: cold(name) for name in ("qwen3", "qwen3-b")}
    draft = SELF_DRAFT | {"model": str(checkpoints / "qwen3")}
    engine("start", model=checkpoints / "qwen3", speculative_config=draft)
    for name in ("qwen3-b", "qwen3"):
        done = engine("update", checkpoint=checkpoints / name, bucket_bytes=bucket_bytes)
        assert done["error"] is None, done
        assert done["details"]["draft_tensors"] == done["details"]["tensors"]
        generated = engine("tokens")
        assert generated["tokens"] == expected[name]["tokens"]
        # The same model as draft guesses every token: unless one of the two was left behind.
        assert generated["num_accepted_tokens"] == generated["num_draft_tokens"] > 0


def test_a_draft_model_of_another_checkpoint_is_left_alone_and_can_be_addressed(
    engine: Engine, cold: Cold, checkpoints: Path
) -> None:
    expected = cold("qwen3-b")
    draft = SELF_DRAFT | {"model": str(checkpoints / "qwen3-b")}
    engine("start", model=checkpoints / "qwen3", speculative_config=draft)
    before = engine("state")["draft"]
    done = engine("update", checkpoint=checkpoints / "qwen3-b")
    assert (done["error"], done["details"]["draft_tensors"]) == (None, 0)
    assert engine("state")["draft"] == before
    assert engine("tokens")["tokens"] == expected["tokens"]
    done = engine("update", checkpoint=checkpoints / "qwen3", draft=str(checkpoints / "qwen3"))
    assert done["error"] is None, done
    generated = engine("tokens")
    assert generated["tokens"] == cold("qwen3")["tokens"]
    assert generated["num_accepted_tokens"] == generated["num_draft_tokens"] > 0


@pytest.mark.parametrize("without", [[], ["switch"], ["plan"]], ids=["in-buckets", "at-once", "all-kept"])
def test_mtp_layers_that_share_embedding_and_output_follow(
    engine: Engine, cold: Cold, checkpoints: Path, without: list[str]
) -> None:
    expected = {name: cold(name, speculative_config=MTP) for name in ("mtp", "mtp-b")}
    assert expected["mtp"]["draft"] != expected["mtp-b"]["draft"]
    engine("start", model=checkpoints / "mtp", speculative_config=MTP)
    for name in ("mtp-b", "mtp"):
        for bucket_bytes in (WHOLE, SMALLER_THAN_A_LAYER):
            done = engine("update", checkpoint=checkpoints / name, bucket_bytes=bucket_bytes, without=without)
            assert done["error"] is None, done
            assert holds(engine, expected[name])


def test_missing_mtp_weights_are_refused(engine: Engine, cold: Cold, checkpoints: Path) -> None:
    expected = cold("mtp", speculative_config=MTP)
    engine("start", model=checkpoints / "mtp", speculative_config=MTP)
    missing = ["model.mtp_layers.0.input_proj.weight"]
    done = engine("update", checkpoint=checkpoints / "mtp-b", drop=missing)
    assert (done["error"], done["intact"]) == ("WeightsRejectedError", True)
    assert "input_proj.weight (nothing) of the draft model" in done["message"]
    assert holds(engine, expected)
