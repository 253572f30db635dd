"""Quantised weights in a real vLLM engine: after each update it is what a cold start of that checkpoint is.

vLLM's own CPU kernels where it has some (int8, int4, latent attention); plain-torch mocks of the CUDA kernels for FP8.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Engine = Callable[..., dict[str, Any]]
Cold = Callable[..., dict[str, Any]]

HERE = Path(__file__).parent
MTP = {"method": "mtp", "num_speculative_tokens": 1}
LATENT = {"attention_backend": "CPU_MLA"}
"""With AMX, vLLM would take kernels that it cannot reload."""
LATENT_MTP = LATENT | {"speculative_config": MTP | LATENT}
CACHE_SCALES = 16
"""Bytes of the scales for keys and values, which are vLLM's loader's in every update."""
FORMATS = [
    pytest.param("int8", {}, 0, id="int8"),
    pytest.param("wna16", {}, 0, id="int4-packed"),
    pytest.param("fp8block", {}, 0, id="fp8-block"),
    pytest.param("fp8tensor", {}, 0, id="fp8-tensor"),
    pytest.param("fp8channel", {}, 0, id="fp8-channel"),
    pytest.param("wide", {"quantization": "fp8"}, 0, id="fp8-while-loading"),
    pytest.param("fp8moe", {}, 0, id="fp8-experts"),
    pytest.param("moe", {"quantization": "fp8"}, 0, id="fp8-experts-while-loading"),
    pytest.param("nvfp4", {}, 0, id="nvfp4"),
    pytest.param("nvfp4ct", {}, 0, id="nvfp4-compressed", marks=pytest.mark.endurance),
    pytest.param("nvfp4moe", {}, 0, id="nvfp4-experts"),
    pytest.param("mxfp8", {}, 0, id="mxfp8"),
    pytest.param("mxfp8moe", {}, 0, id="mxfp8-experts", marks=pytest.mark.endurance),
    pytest.param("mxfp4moe", {}, 0, id="mxfp4-experts", marks=pytest.mark.endurance),
    pytest.param("gptoss", {}, 0, id="mxfp4-gpt-oss"),
    pytest.param("fp8kv", {"kv_cache_dtype": "fp8"}, CACHE_SCALES, id="fp8-cache-scales"),
    pytest.param("mla", LATENT_MTP, 0, id="latent-attention-mtp"),
    pytest.param("fp8mla", LATENT, 0, id="fp8-latent-attention"),
]


@pytest.fixture(scope="module")
def quantised(vllm_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoints of FORMATS, each from two seeds."""
    directory = tmp_path_factory.mktemp("quantised")
    names = [f"{form.values[0]}{variant}" for form in FORMATS for variant in ("", "-b")]
    subprocess.run([vllm_bin / "python", HERE / "models.py", directory, *names], check=True, timeout=120)
    return directory


def with_kernels(engine: Engine, kind: str, options: dict[str, Any] | None = None) -> None:
    """Mocks of CUDA's kernels; skips where vLLM's own for the CPU are not made for this processor."""
    missing = engine("mock_kernels")["missing"]
    for needed, wanted in (("int4 weights", kind == "wna16"), ("FP8 caches", "kv_cache_dtype" in (options or {}))):
        if wanted and needed in missing:
            pytest.skip(f"vLLM has no kernel for {needed} on this processor: it needs AVX-512")


def holds(engine: Engine, expected: dict[str, Any]) -> bool:
    state = engine("state")
    assert state["without_data"] == []
    return (
        engine("tokens")["tokens"] == expected["tokens"]
        and state["served"] == expected["served"]
        and state["draft"] == expected["draft"]
    )


def started(engine: Engine, checkpoint: str, **options: Any) -> dict[str, Any]:
    """Starts an engine; returns what it generates and computes."""
    engine("start", model=checkpoint, **options)
    return engine("tokens") | engine("state")


@pytest.mark.parametrize(("kind", "options", "by_loader"), FORMATS)
def test_from_a_to_b_and_back(
    engine: Engine, cold: Cold, quantised: Path, kind: str, options: dict[str, Any], by_loader: int
) -> None:
    with_kernels(engine, kind, options)
    a, b = str(quantised / kind), str(quantised / f"{kind}-b")
    expected = {b: cold(b, **options), a: started(engine, a, **options)}
    assert expected[a]["tokens"] != expected[b]["tokens"]
    ways = []
    for path, bucket_bytes, reload in ((b, 100_000, "auto"), (a, 8 << 20, "auto"), (b, 1, "auto"), (a, 1, "loader")):
        done = engine("update", checkpoint=path, bucket_bytes=bucket_bytes, reload=reload)
        assert done["error"] is None, done
        ways.append(done["details"]["reload"])
        assert holds(engine, expected[path]), (path, ways)
        if ways[-1] == "plan":
            assert done["details"]["loader_bytes"] == by_loader, done["details"]
    assert ways == ["proof", "plan", "plan", "loader"]
    assert engine("state")["addresses"] == expected[a]["addresses"]
    compared = {path: engine("update", checkpoint=path, reload="verify")["details"] for path in (a, b)}
    assert (compared[a]["different_tensors"], compared[a]["different"]) == (0, "")
    assert compared[b]["different_tensors"] > 0
    assert holds(engine, expected[a])
    assert engine("state")["addresses"] == expected[a]["addresses"]


@pytest.mark.parametrize(
    ("kind", "options"),
    [("fp8channel", {"kv_cache_dtype": "fp8"}), ("mla", LATENT_MTP)],
    ids=["fp8-channel-default-cache-scales", "latent-attention-mtp"],
)
def test_from_dummy_weights(engine: Engine, cold: Cold, quantised: Path, kind: str, options: dict[str, Any]) -> None:
    """VLLM makes scales up as well when it makes weights up, and a checkpoint need not bring any."""
    with_kernels(engine, kind, options)
    b = str(quantised / f"{kind}-b")
    expected = cold(b, **options)
    engine("start", model=quantised / kind, load_format="dummy", **options)
    done = engine("update", checkpoint=b)
    assert done["error"] is None, done
    assert holds(engine, expected)


def test_a_scale_that_vllm_would_not_find_again_is_missed(engine: Engine, quantised: Path) -> None:
    """A start has a value for it; loading anew, vLLM has none."""
    engine("mock_kernels")
    engine("start", model=quantised / "fp8tensor")
    scale = "model.layers.0.self_attn.k_proj.input_scale"
    done = engine("update", checkpoint=quantised / "fp8tensor-b", drop=[scale])
    assert (done["error"], done["intact"]) == ("WeightsRejectedError", True)
    assert "model.layers.0.self_attn.qkv_proj.input_scale (2 of 3 elements" in done["message"]


def test_what_kernels_keep_is_found_in_vllms_own_experts(engine: Engine, quantised: Path) -> None:
    engine("mock_kernels")
    engine("start", model=quantised / "fp8moe")
    assert engine("unreloadable")["found"] == []
    engine("hold_cutlass_experts")
    (found,) = engine("unreloadable")["found"]
    assert found.startswith("layer 'model.layers.0.mlp.experts")
    assert "the strides of CUTLASS experts" in found


def test_latent_attention_packed_for_amx_is_refused_beforehand(engine: Engine, quantised: Path) -> None:
    engine("start", model=quantised / "mla")
    expected = engine("tokens")["tokens"]
    if not engine("unreloadable", graphs=False)["found"]:
        pytest.skip("this CPU has no AMX")
    done = engine("update", checkpoint=quantised / "mla-b")
    assert (done["error"], done["intact"]) == ("WeightsRejectedError", True)
    assert "--attention-backend CPU_MLA" in done["message"]
    assert engine("tokens")["tokens"] == expected


@pytest.mark.parametrize("kind", ["fp8block", "fp8tensor", "wna16"])
def test_the_loader_alone_would_be_wrong(engine: Engine, cold: Cold, quantised: Path, kind: str) -> None:
    """What makes the test above worth something: these kernels do not keep what a checkpoint has."""
    with_kernels(engine, kind)
    expected = cold(str(quantised / f"{kind}-b"))
    engine("start", model=quantised / kind)
    assert engine("load_plainly", checkpoint=quantised / f"{kind}-b")["error"] or not holds(engine, expected)


def test_an_update_that_breaks_off_leaves_the_old_weights_or_is_healed(
    engine: Engine, cold: Cold, quantised: Path
) -> None:
    engine("mock_kernels")
    a, b = str(quantised / "fp8block"), str(quantised / "fp8block-b")
    expected = {b: cold(b), a: started(engine, a)}
    for path in (b, a):
        assert engine("update", checkpoint=path)["error"] is None
    weight = "model.layers.0.self_attn.q_proj.weight"
    done = engine("update", checkpoint=b, bucket_bytes=1, first=weight, break_after=1)
    assert (done["error"], done["intact"]) == ("RuntimeError", True)
    assert holds(engine, expected[a])
    done = engine("update", checkpoint=b, drop=[weight.replace("weight", "weight_scale_inv")])
    assert (done["error"], done["intact"]) == ("WeightsRejectedError", True)
    assert "qkv_proj.weight_scale_inv" in done["message"]
    assert holds(engine, expected[a])
    done = engine("update", checkpoint=b, bucket_bytes=1, break_after=20)
    assert (done["error"], done["dirty"]) == ("RuntimeError", True)
    assert engine("update", checkpoint=b)["error"] is None
    assert holds(engine, expected[b])


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("fp8block", marks=pytest.mark.endurance),
        "fp8moe",
        pytest.param("int8", marks=pytest.mark.endurance),
        "wna16",
    ],
)
def test_direct(
    serve: Callable[..., Any],
    update: Callable[..., subprocess.CompletedProcess[str]],
    engine: Engine,
    cold: Cold,
    quantised: Path,
    kind: str,
) -> None:
    with_kernels(engine, kind)
    names = (f"{kind}-b", kind)
    expected = {name: cold(str(quantised / name))["tokens"] for name in names}
    options = ("--load-format", "dummy", "--worker-extension-cls", "mock_kernels.MockedExtension")
    server = serve(quantised / kind, *options, PYTHONPATH=HERE)
    for way in ("broadcast", "direct"):
        for name in names:
            done = update(quantised / name, server, "--method", way, "--json")
            assert done.returncode == 0, done.stderr
            assert server.tokens() == expected[name]
    said = json.loads(done.stdout)
    assert (said["method"], said["engine"][0]["reload"], said["engine"][0]["loader_bytes"]) == ("direct", "plan", 0)
    server.close()
