"""Whether a real SGLang on a GPU, brought to a checkpoint by updates, equals one that was started with it.

    python benchmarks/sglang_formats.py                       every format, tiny
    python benchmarks/sglang_formats.py dense fp8moe          two of them
    python benchmarks/sglang_formats.py dense-tp2 moe-ep2     two of those that need two GPUs
    python benchmarks/sglang_formats.py dense --device cpu    without a GPU, to see that this script works

Two or three servers for each format, CUDA graphs captured: one starts with A, one with B, and some formats have a third
one, which starts with dummy weights and must be closed until its first update; else the one with B is updated. It is
brought to A, B, A by broadcast (the plan's proof, its check, the plan), to B and A directly, by plan and by SGLang's
loader, to B by the loader and to A by what `auto` chooses. Each time SGLang's checksums of all parameters and greedy
tokens must be those of the server that was started so; then `checkpoint-engine verify` must find A and not B. Several
formats share the GPU. Needs SGLang and both packages in this environment; exits with 1 if anything is not so.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from senders import Senders
from sglang_server import PORTS, PROMPTS, Server, serving

from checkpoint_engine.errors import CheckpointEngineError

MAKER = Path(__file__).parent.parent / "tests" / "sglang" / "quantised_models.py"
STEPS = [
    ("a", "broadcast:auto"),
    ("b", "broadcast:auto"),
    ("a", "broadcast:auto"),
    ("b", "direct:auto"),
    ("a", "direct:loader"),
    ("b", "broadcast:loader"),
    ("a", "auto:auto"),
]
LIMIT_SECONDS = 400
TENSORS = ("--tp-size", "2")


class DifferenceError(Exception):
    """Something is not as in a server that was started with these weights."""


@dataclass(frozen=True)
class Format:
    """A kind of tiny checkpoint (see tests/sglang/quantised_models.py) and what SGLang is started with."""

    kind: str
    options: tuple[str, ...] = ()
    closed: bool = False
    """Whether it starts with dummy weights, closed until the first update; else it starts with B."""
    workers: int = 1
    """GPUs that it needs."""


FORMATS = {
    "dense": Format("wide", closed=True),
    "moe": Format("widemoe", closed=True),
    "mla": Format("mla", closed=True),
    "fp8block": Format("fp8block", closed=True),
    "fp8tensor": Format("fp8tensor"),
    "fp8channel": Format("fp8channel"),
    "fp8moe": Format("fp8moe"),
    "fp8tensormoe": Format("fp8tensormoe"),
    "fp8mla": Format("fp8mla"),
    "fp8online": Format("wide", ("--quantization", "fp8")),
    "fp8online-moe": Format("widemoe", ("--quantization", "fp8")),
    "int8": Format("int8"),
    "w8a8int8": Format("w8a8int8", ("--quantization", "w8a8_int8")),
    "nvfp4": Format("nvfp4"),
    "nvfp4-compressed": Format("nvfp4ct"),
    "nvfp4moe": Format("nvfp4moe"),
    "mxfp8": Format("mxfp8"),
    "mxfp4-gpt-oss": Format("gptoss"),
    "mxfp4moe": Format("fp8mxfp4moe"),
    "dense-tp2": Format("wide", TENSORS, closed=True, workers=2),
    "moe-tp2": Format("widemoe", TENSORS, closed=True, workers=2),
    "moe-ep2": Format("widemoe", (*TENSORS, "--ep-size", "2"), closed=True, workers=2),
    "dense-pp2": Format("wide", ("--pp-size", "2"), closed=True, workers=2),
    "mla-tp2": Format("mla", TENSORS, closed=True, workers=2),
    "fp8channel-tp2": Format("fp8channel", TENSORS, workers=2),
    "fp8tensor-tp2": Format("fp8tensor", TENSORS, workers=2),
    "int8-tp2": Format("int8", TENSORS, workers=2),
}


def main() -> None:
    """Checks formats side by side, each in a process of its own, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("formats", nargs="*", metavar="FORMAT", help=f"of {', '.join(FORMATS)}")
    parser.add_argument("--at-once", type=int, default=4, help="formats that share the GPU at a time")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--work", type=Path, default=Path("/dev/shm/checkpoint-engine-sglang-formats"))
    parser.add_argument("--serve-options", default="", help="more options of SGLang, in one string")
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := set(arguments.formats) - FORMATS.keys():
        parser.error(f"{', '.join(sorted(unknown))}: not one of {', '.join(FORMATS)}")
    if arguments.port is not None:
        signal.signal(signal.SIGALRM, give_up)
        signal.alarm(LIMIT_SECONDS)
        print(json.dumps(check(arguments.formats[0], arguments)), flush=True)
        return
    with ThreadPoolExecutor(arguments.at_once) as pool:
        gpus = torch.cuda.device_count() if arguments.device == "cuda" else 1
        names = arguments.formats or [name for name, form in FORMATS.items() if form.workers <= gpus]
        rows = list(pool.map(lambda item: apart(*item, arguments), enumerate(names)))
    width = max(len(name) for name in names)
    print()
    for name, row in zip(names, rows, strict=True):
        print(f"{name:{width}}  {row['result']:10} {row['seconds']:4.0f} s  {row['detail']}")
    sys.exit(any(row["result"] != "equal" for row in rows))


def give_up(*_: object) -> None:
    """Ends a format that takes too long; its servers end with it."""
    raise TimeoutError(f"not done after {LIMIT_SECONDS} s")


def apart(index: int, name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One format in a process of its own, since a parameter server has the GPU to itself there."""
    directory = arguments.work / name
    directory.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, name, "--port", str(31000 + 4 * PORTS * index), "--work", str(arguments.work)]
    command += ["--device", arguments.device, f"--serve-options={arguments.serve_options}"]
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = f"{done.stdout}\n{done.stderr}"
        (directory / "check.log").write_text(said)
        lines = said.strip().splitlines()
        errors = [line for line in lines if "Error" in line]
        row = {"result": "failed", "detail": (errors or lines)[-1][-300:]}
    else:
        row = json.loads(done.stdout.splitlines()[-1])
    row["seconds"] = time.perf_counter() - begin
    print(f"{name}: {row['result']} after {row['seconds']:.0f} s {row['detail']}", flush=True)
    return row


def check(name: str, arguments: argparse.Namespace) -> dict[str, str]:
    """What became of one format."""
    form, directory, device = FORMATS[name], arguments.work / name, arguments.device
    a, b = directory / form.kind, directory / f"{form.kind}-b"
    for path in (a, b):
        shutil.rmtree(path, ignore_errors=True)
    subprocess.run([sys.executable, str(MAKER), str(directory), a.name, b.name], check=True, timeout=200)
    options = [*form.options, *arguments.serve_options.split()]
    closed = a if form.closed else None
    with (
        serving([a, b], directory, *options, closed=closed, port=arguments.port, device=device) as servers,
        Senders(form.workers, device=device, port=arguments.port + 3 * PORTS) as senders,
    ):
        for path in (a, b):
            senders.register(path, in_place=False)
        try:
            detail = takes_updates(senders, servers, a, b, device, form.workers)
        except (DifferenceError, CheckpointEngineError) as found:
            return {"result": "different", "detail": f"{type(found).__name__}: {found}"}
    return {"result": "equal", "detail": detail}


def takes_updates(senders: Senders, servers: list[Server], a: Path, b: Path, device: str, workers: int) -> str:
    """Brings the last server to both checkpoints by all ways; how it took them."""
    updated, cold = servers[-1], {a: servers[0].state(), b: servers[1].state()}
    if cold[a]["tokens"] == cold[b]["tokens"]:
        raise DifferenceError("none between A and B: they generate the same")
    graphs = updated.graphs()
    if device == "cuda" and not graphs:
        raise DifferenceError(f"no CUDA graphs were captured: {updated.log}")
    if updated.closed:
        refuses(updated)
    ways = [f"graphs captured {graphs} times"]
    for which, way in STEPS:
        path = {"a": a, "b": b}[which]
        senders.update(updated.client, path.name, way)
        compare(f"{way} {which}", updated, cold[path])
        figures = senders.last_report.figures
        ways.append(f"{figures.reload} {figures.loader_bytes}")
    verifies(updated, a, b, device, workers)
    compare("after verify", updated, cold[a])
    return "; ".join(ways)


def refuses(server: Server) -> None:
    """Before its first weights it answers nobody."""
    answers = [httpx.get(f"{server.url}{path}", timeout=20) for path in ("/health", "/v1/models")]
    answers.append(httpx.post(f"{server.url}/generate", json={"input_ids": PROMPTS[0]}, timeout=20))
    if open_ := [reply.url.path for reply in answers if reply.status_code != httpx.codes.SERVICE_UNAVAILABLE]:
        raise DifferenceError(f"open before the first update: {', '.join(open_)}")


def compare(step: str, server: Server, expected: dict[str, Any]) -> None:
    """Whether it computes with the same weights, and serves."""
    found, status = server.state(), server.status()
    pairs = list(zip(found["checksums"], expected["checksums"], strict=True))
    wrong = sorted(name for one, two in pairs for name in one.keys() | two.keys() if one.get(name) != two.get(name))
    if wrong:
        raise DifferenceError(f"{step}: {len(wrong)} tensors, {', '.join(wrong[:4])}")
    if found["tokens"] != expected["tokens"]:
        raise DifferenceError(f"{step}: tokens")
    if unsound := [key for key in ("closed", "dirty", "lost_hooks") if status[key]]:
        raise DifferenceError(f"{step}: the status says {', '.join(unsound)}")


def verifies(server: Server, same: Path, other: Path, device: str, workers: int) -> None:
    """Whether the command `verify` is right about both checkpoints."""
    for path, expected in ((same, 0), (other, 1)):
        command = [sys.executable, "-m", "checkpoint_engine", "verify", str(path), "--engine", "sglang"]
        command += ["--endpoint", server.url, "--tensor-parallel-size", str(workers), "--device", device]
        command += ["--timeout", "60", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode != expected:
            said = (done.stderr or done.stdout)[-300:]
            raise DifferenceError(f"verify {path.name}: exit code {done.returncode}: {said}")


if __name__ == "__main__":
    main()
