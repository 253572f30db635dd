"""Quantised layers in real SGLang: what its processing leaves, an update leaves as well, and at the same addresses.

The CPU has no kernels for most of these; plain_kernels.py has them in plain torch. SGLang processes the weights.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from checkpoint_engine.errors import CheckpointEngineError
from tests.sglang.sglang_push import InTreeAnswer, in_tree, push, read
from tests.sglang.sglang_server import Server

HERE = Path(__file__).parent
FORMATS = {
    "fp8block": "blocks, requantised to powers of two for DeepGEMM",
    "fp8tensor": "one scale a tensor, static activations",
    "fp8channel": "compressed-tensors, one scale a channel",
    "int8": "compressed-tensors, int8",
    "wide+fp8": "quantised by SGLang from bfloat16",
    "moe+fp8": "experts quantised by SGLang from bfloat16",
    "fp8moe": "experts in blocks",
    "fp8tensormoe": "experts with one scale a tensor",
    "fp8mla": "DeepSeek's attention, w_kc and w_vc derived",
    "mla": "the same in bfloat16",
    "nvfp4": "NVFP4 as ModelOpt writes it, scales interleaved for CUTLASS",
    "nvfp4moe": "experts likewise",
    "nvfp4ct": "NVFP4 as compressed-tensors writes it",
    "mxfp8": "MXFP8, exponents packed for DeepGEMM",
    "gptoss": "MXFP4 as gpt-oss is published, weights held by OpenAI's kernels",
    "fp8mxfp4moe": "experts in MXFP4 beside FP8, as DeepSeek-V4 has them",
}
UNDER_SGLANGS_OWN = ("mla", "nvfp4", "nvfp4moe")
"""What SGLang's own path does right."""


@pytest.fixture(scope="module")
def quantised(sglang_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("quantised")
    kinds = [name.partition("+")[0] for name in FORMATS]
    names = [f"{kind}{seed}" for kind in kinds for seed in ("", "-b")]
    subprocess.run([sglang_python, HERE / "quantised_models.py", directory, *names], check=True, timeout=120)
    return directory


@pytest.fixture(scope="module")
def results(in_sglang: Callable[..., Any], quantised: Path) -> dict[str, Any]:
    return in_sglang("quantised_process.py", quantised, *FORMATS)


@pytest.mark.parametrize("form", FORMATS)
def test_from_dummy_weights_to_b_a_b_like_a_fresh_model(results: dict[str, Any], form: str) -> None:
    """Bytes, strides, switches and numbers; by SGLang's loader, and by plan."""
    found = results[form]
    assert found["a is b"] is False
    assert found["differing"] == [[]] * 7
    assert found["ways"] == ["proof", "plan", "plan", "plan", "plan", "loader", "loader"]


@pytest.mark.parametrize("form", FORMATS)
def test_compared_with_a_checkpoint(results: dict[str, Any], form: str) -> None:
    equal, other = (results[form]["compared"][key] for key in ("a", "b"))
    assert equal["different_tensors"] == 0 < equal["compared_tensors"]
    assert other["compared_tensors"] == equal["compared_tensors"]
    assert other["different_tensors"] > equal["compared_tensors"] // 4
    assert results[form]["changed by comparing"] == []
    for name in ("derives", "only its loader can place it"):
        assert name not in equal["not_compared"]


@pytest.mark.parametrize(
    ("form", "kinds"),
    [
        ("mla", {"w_kc", "w_vc"}),
        ("fp8mla", {"w_kc", "w_vc", "w_scale"}),
        (
            "gptoss",
            {f"{part}_{what}" for part in ("w13", "w2") for what in ("weight_triton_tensor", "precision_config")},
        ),
    ],
)
def test_one_bit_of_what_is_made_of_weights_is_found(results: dict[str, Any], form: str, kinds: set[str]) -> None:
    """By name; none of these is among the model's parameters."""
    flipped = results[form]["flipped"]
    assert {name.rpartition(".")[2] for name in flipped} == kinds
    assert flipped == {name: name for name in flipped}


@pytest.mark.parametrize("form", FORMATS)
def test_nothing_has_moved(results: dict[str, Any], form: str) -> None:
    """Captured CUDA graphs read addresses; other parts of SGLang hold the parameters themselves."""
    assert results[form]["moved"] == results[form]["exchanged"] == []


@pytest.mark.parametrize("form", FORMATS)
def test_sglangs_own_path_fails_with_it(results: dict[str, Any], form: str) -> None:
    assert bool(results[form]["in tree"]) is (form not in UNDER_SGLANGS_OWN)


def test_what_no_plan_reaches(results: dict[str, Any]) -> None:
    """Tensors that a loader writes twice go through it, by name; those that DeepSeek's joins are copied."""
    for form in ("fp8tensormoe", "nvfp4moe"):
        assert "w13_input_scale" in results[form]["reasons"][1]
    assert "fused_qkv_a_proj_with_mqa" not in results["mla"]["reasons"][1]
    assert results["fp8block"]["reasons"][1] == ""


def test_a_served_fp8_model(
    serve: Callable[..., Server],
    quantised: Path,
    update_command: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    a, b = read(quantised / "fp8block"), read(quantised / "fp8block-b")
    without = serve(quantised / "fp8block", ours=False, extra_plugins="plain_kernels")
    state_a = without.state()
    answer = InTreeAnswer()
    try:
        push(without, b, ask=in_tree(without, answer), timeout=30)
        in_tree_tokens = without.tokens()
    except (CheckpointEngineError, httpx.HTTPError):
        in_tree_tokens = None
    without.close()

    server = serve(quantised / "fp8block-b", extra_plugins="plain_kernels")
    state_b = server.state()
    assert state_a["tokens"] != state_b["tokens"]
    assert in_tree_tokens != state_b["tokens"]
    push(server, a, "a")
    assert server.state() == state_a
    for directory, state, how in (
        ("fp8block-b", state_b, ("--reload", "auto")),
        ("fp8block", state_a, ("--method", "direct", "--reload", "plan")),
        ("fp8block-b", state_b, ("--method", "direct")),
        ("fp8block", state_a, ("--reload", "loader")),
    ):
        done = update_command(quantised / directory, server, "--engine", "sglang", *how)
        assert done.returncode == 0, done.stderr
        assert server.state() == state

    # Processing that fails in the middle.
    server.fault(process="quantised")
    with pytest.raises(CheckpointEngineError, match=r"layer model\.layers\.\d\.\S+ .*made by the test"):
        push(server, b, "b")
    server.fault()
    assert server.http.get("/health").status_code == 503
    push(server, b, "b")
    server.wait("/health")
    assert server.state() == state_b
