"""Whether a real `vllm serve` on a GPU, brought to a checkpoint by updates, equals one that was started with it.

    python benchmarks/vllm_formats.py                          every format, tiny
    python benchmarks/vllm_formats.py fp8tensor wna16 --large  two of them, in layers of a realistic shape
    python benchmarks/vllm_formats.py moe-tp2 moe-ep2          two of those that need two GPUs
    python benchmarks/vllm_formats.py --families --plain       a dozen and more architectures, tiny

Two servers for each format, CUDA graphs captured: one starts with A and is brought to B, A, B by broadcast (the plan's
proof, its check, the plan), to A by vLLM's loader, and to B and A directly; the other starts with B. Each time hashes
of all parameters and of what attention derives, and greedy tokens, must be those of the start, and addresses those of
before; then `checkpoint-engine verify` must find A and not B. What vLLM cannot reload beside its graphs must be
refused, and change nothing. *Alike* means that all hashes are those of the other server, and tokens always those that
this one had with the same checkpoint, but not the other's: what torch compiled differs between the two (`--plain`
compiles nothing). Several formats share the GPU. Needs vLLM and both packages in this environment; exits with 1 if
anything is not so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from senders import Senders
from vllm_server import HERE, Server, serving

from checkpoint_engine.errors import CheckpointEngineError

MAKER = HERE.parent / "tests" / "vllm" / "models.py"
ZOO = "tests.zoo.vllm_process"
MTP = '{"method": "mtp", "num_speculative_tokens": 1}'
STEPS = [
    ("b", "broadcast:auto"),
    ("a", "broadcast:auto"),
    ("b", "broadcast:auto"),
    ("a", "broadcast:loader"),
    ("b", "direct:auto"),
    ("a", "direct:auto"),
]
LIMIT_SECONDS = 400.0
TENSORS = ("--tensor-parallel-size", "2")
EXPERTS = (*TENSORS, "--enable-expert-parallel")
PLAIN = ("--compilation-config", '{"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}')


@dataclass(frozen=True)
class Format:
    """A kind of tiny checkpoint and what `vllm serve` is started with."""

    kind: str
    """Of tests/vllm/models.py, or a family of tests/zoo/vllm_families.py."""
    options: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    expected: str = "equal"
    asleep: bool = False
    """Whether weights are thrown away (sleep level 2) before each update, as some trainers do."""
    workers: int = 1
    """GPUs that it needs."""


FORMATS = {
    "dense": Format("qwen3"),
    "dense-runner1": Format("qwen3", environment=(("VLLM_USE_V2_MODEL_RUNNER", "0"),)),
    "dense-runner2": Format("qwen3", environment=(("VLLM_USE_V2_MODEL_RUNNER", "1"),)),
    "dense-asleep": Format("qwen3", ("--enable-sleep-mode",), asleep=True),
    "tied": Format("tied"),
    "moe": Format("moe"),
    "fp8block": Format("fp8block"),
    "fp8tensor": Format("fp8tensor"),
    "fp8channel": Format("fp8channel"),
    "fp8online": Format("wide", ("--quantization", "fp8")),
    "fp8moe": Format("fp8moe"),
    "fp8moe-triton": Format("fp8moe", ("--moe-backend", "triton")),
    "fp8online-moe": Format("moe", ("--quantization", "fp8")),
    "fp8kv": Format("fp8kv", ("--kv-cache-dtype", "fp8")),
    "int8": Format("int8"),
    "wna16": Format("wna16"),
    "wna16-marlin": Format(
        "wna16", environment=(("VLLM_DISABLED_KERNELS", "MacheteLinearKernel"),), expected="refused"
    ),
    "fp8experts-cutlass": Format("fp8experts", ("--moe-backend", "cutlass"), expected="refused"),
    "fp8experts-eager": Format("fp8experts", ("--moe-backend", "cutlass", "--enforce-eager")),
    "nvfp4": Format("nvfp4"),
    "nvfp4-compressed": Format("nvfp4ct"),
    "nvfp4moe": Format("nvfp4moe"),
    "mxfp8": Format("mxfp8"),
    "mxfp8moe": Format("mxfp8moe"),
    "mxfp4moe": Format("mxfp4moe"),
    "mxfp4-gpt-oss": Format("gptoss", ("--moe-backend", "marlin")),
    "mxfp4-gpt-oss-triton": Format("gptoss", ("--moe-backend", "triton"), expected="refused"),
    "mla": Format("mla"),
    "mla-mtp": Format("mla", ("--speculative-config", MTP)),
    "fp8mla": Format("fp8mla"),
    "dense-tp2": Format("qwen3", TENSORS, workers=2),
    "dense-pp2": Format("qwen3", ("--pipeline-parallel-size", "2"), workers=2),
    "moe-tp2": Format("moe", TENSORS, workers=2),
    "moe-ep2": Format("moe", EXPERTS, workers=2),
    "mla-tp2": Format("mla", TENSORS, workers=2),
    # Blocks of 128 must not be cut: for --large.
    "fp8block-tp2": Format("fp8block", TENSORS, workers=2),
    "fp8tensor-tp2": Format("fp8tensor", TENSORS, workers=2),
    "fp8moe-ep2": Format("fp8moe", EXPERTS, workers=2),
    "fp8mla-tp2": Format("fp8mla", TENSORS, workers=2),
    "wna16-tp2": Format("wna16", TENSORS, workers=2),
}
FAMILIES = {
    name: Format(name)
    for name in (
        *("LlamaForCausalLM", "MixtralForCausalLM", "GptOssForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM"),
        *("Qwen3NextForCausalLM", "Qwen3_5ForCausalLM", "Glm4MoeForCausalLM", "GraniteMoeHybridForCausalLM"),
        *("FalconH1ForCausalLM", "Mamba2ForCausalLM", "JambaForCausalLM", "Olmo2ForCausalLM", "Phi3ForCausalLM"),
        *("Cohere2ForCausalLM", "BloomForCausalLM", "GPTNeoXForCausalLM", "OPTForCausalLM"),
    )
}
"""Architectures that generate, of every kind of layer: their other formats are those of FORMATS."""


def main() -> None:
    """Checks formats side by side, each in a process of its own, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("formats", nargs="*", metavar="FORMAT", help=f"of {', '.join(FORMATS)}")
    parser.add_argument("--families", action="store_true", help="architectures in place of formats")
    parser.add_argument("--large", action="store_true", help="layers as wide as an 8B model's")
    parser.add_argument("--plain", action="store_true", help="graphs of the model as it is, without torch.compile")
    parser.add_argument("--at-once", type=int, default=4, help="formats that share the GPU at a time")
    parser.add_argument("--work", type=Path, default=Path("/dev/shm/checkpoint-engine-formats"))
    parser.add_argument("--serve-options", default="", help="more options of vllm serve, in one string")
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    known = FORMATS | FAMILIES
    if unknown := set(arguments.formats) - known.keys():
        parser.error(f"{', '.join(sorted(unknown))}: not one of {', '.join(known)}")
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.port is not None:
        print(json.dumps(check(arguments.formats[0], arguments)), flush=True)
        return
    with ThreadPoolExecutor(arguments.at_once) as pool:
        here = [name for name, form in FORMATS.items() if form.workers <= torch.cuda.device_count()]
        names = arguments.formats or (list(FAMILIES) if arguments.families else here)
        rows = list(pool.map(lambda item: apart(*item, arguments), enumerate(names)))
    width = max(len(name) for name in names)
    print()
    for name, row in zip(names, rows, strict=True):
        print(f"{name:{width}}  {row['result']:10} {row['seconds']:4.0f} s  {row['kernels']}  {row['detail']}")
    sys.exit(any(row["result"] != known[name].expected for name, row in zip(names, rows, strict=True)))


def apart(index: int, name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One format in a process of its own, since a parameter server has the GPU to itself there."""
    command = [sys.executable, __file__, name, "--port", str(8100 + 2 * index), "--work", str(arguments.work)]
    command += ["--large"] * arguments.large + ["--plain"] * arguments.plain
    command += [f"--serve-options={arguments.serve_options}"]
    begin = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
        failed = f"{done.stdout}\n{done.stderr}" if done.returncode else ""
        row = {"result": "failed"} if failed else json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired as late:
        failed, row = f"{late.stdout}\n{late.stderr}", {"result": "late"}
    if failed:
        (arguments.work / f"{name}.log").write_text(failed)
        row["detail"] = failed.strip().splitlines()[-1][-300:]
    row = {"kernels": "", "detail": "", **row, "seconds": time.perf_counter() - begin}
    print(f"{name}: {row['result']} after {row['seconds']:.0f} s {row['detail']}", flush=True)
    return row


def check(name: str, arguments: argparse.Namespace) -> dict[str, str]:
    """What became of one format."""
    form = (FORMATS | FAMILIES)[name]
    directory = arguments.work / name
    a, b = make(name, directory, large=arguments.large)
    # Servers that start side by side cannot measure how much memory is theirs.
    options = ["--kv-cache-memory-bytes", str(1 << 28), "--max-model-len", "256", "--max-num-seqs", "4"]
    options += ["--gpu-memory-utilization", "0.1", *form.options, *arguments.serve_options.split()]
    options += PLAIN if arguments.plain else ()
    with (
        serving([a, b], directory, *options, port=arguments.port, **dict(form.environment)) as (updated, other),
        Senders(form.workers, port=arguments.port + 500) as senders,
    ):
        for path in (a, b):
            senders.register(path, in_place=False)
        kernels = ", ".join(updated.rpc("checkpoint_engine_kernels")[0])
        addresses = updated.rpc("checkpoint_engine_addresses")
        cold = {a: updated.state(), b: other.state()}
        if cold[a]["tokens"] == cold[b]["tokens"]:
            return {"result": "useless", "kernels": kernels, "detail": "A and B generate the same"}
        row = {"kernels": kernels, "detail": ""}
        wrong, detail = updates(senders, updated, cold, asleep=form.asleep)
        whole = wrong in ("", "alike")
        if whole and updated.rpc("checkpoint_engine_addresses") != addresses:
            wrong, detail = "moved", "parameters lie elsewhere"
        elif whole and (found := verified(updated, a, b, form.workers) or differences(updated.state(), cold[a])):
            wrong, detail = "verify", found
        return row | {"result": wrong or "equal", "detail": detail}


def make(name: str, directory: Path, *, large: bool) -> tuple[Path, Path]:
    """Writes both checkpoints."""
    if name in FAMILIES:
        environment = {**os.environ, "ZOO_TOKENIZERS": "1"}
        command = [sys.executable, "-m", ZOO, "make", str(directory), "cpu", name]
        subprocess.run(command, check=True, timeout=200, cwd=HERE.parent, env=environment)
        return directory / name / "A", directory / name / "B"
    kind = FORMATS[name].kind
    made = [sys.executable, str(MAKER), str(directory), kind, f"{kind}-b", *["--large"] * large]
    subprocess.run(made, check=True, timeout=200)
    return directory / kind, directory / f"{kind}-b"


def updates(senders: Senders, server: Server, cold: dict[Path, dict[str, Any]], *, asleep: bool) -> tuple[str, str]:
    """Takes all steps; what went wrong, if anything did, and the details."""
    a, b = cold
    ways: list[str] = []
    own = {a: cold[a]}
    for which, way in STEPS:
        path = {"a": a, "b": b}[which]
        try:
            if asleep:
                server.post("/sleep?level=2")
                server.post("/wake_up?tags=weights")
            senders.update(server.client, path.name, way)
            if asleep:
                server.post("/wake_up?tags=kv_cache")
        except CheckpointEngineError as error:
            refused = not ways and server.state() == cold[a]
            return "refused" if refused else "failed", f"{way} {which}: {error}"
        state = server.state()
        if state["checksum"] == cold[path]["checksum"]:
            own.setdefault(path, state)
        if difference := differences(state, own.get(path, cold[path])):
            return "different", f"{way} {which}: {difference}"
        figures = senders.last_report.figures
        ways.append(f"{figures.reload} {figures.loader_bytes}")
    return "" if own[b] == cold[b] else "alike", "; ".join(ways)


def differences(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """What is not the same, in words; empty if all is."""
    if found == expected:
        return ""
    sums = [(one, two) for one, two in zip(found["checksum"], expected["checksum"], strict=True)]
    names = [name for one, two in sums for name in one.keys() | two.keys() if one.get(name) != two.get(name)]
    tokens = "" if found["tokens"] == expected["tokens"] else "tokens; "
    return f"{tokens}{len(names)} modules, {', '.join(sorted(names)[:4])}"


def verified(server: Server, same: Path, other: Path, workers: int) -> str:
    """What the command `verify` says wrongly; empty if it is right about both checkpoints."""
    for path, expected in ((same, 0), (other, 1)):
        command = [sys.executable, "-m", "checkpoint_engine", "verify", str(path), "--engine", "vllm"]
        command += ["--endpoint", server.url, "--tensor-parallel-size", str(workers), "--timeout", "60", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode != expected:
            return f"verify {path.name}: exit code {done.returncode}: {(done.stderr or done.stdout)[-300:]}"
    # The tokens of a prompt whose beginning is cached may differ by rounding; nothing was updated to drop the cache.
    server.post("/reset_prefix_cache")
    return ""


if __name__ == "__main__":
    main()
