"""Updates of a real `vllm serve` on a GPU: right, and how long they take.

    python benchmarks/vllm_update.py check A B     tiny checkpoints: A -> B -> A, compared with cold starts
    python benchmarks/vllm_update.py time moe30b   a model of that size, made in /dev/shm, from dummy weights

Needs vLLM and both packages in this environment. CUDA graphs are captured before the first update, as in production.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import httpx
import torch
from workloads import VOCABULARY, WORKLOADS, Tensor

from checkpoint_engine.deadline import Deadline
from checkpoint_engine.server import ParameterServer
from checkpoint_engine_vllm import VllmClient

HERE = Path(__file__).parent
PROMPTS = [[3, 17, 42, 99], [7] * 9, list(range(100, 130))]
START_SECONDS = 300.0
SHARD_BYTES = 4 << 30
WAYS = ["broadcast:loader", "broadcast:auto", "direct:auto"]


class Server:
    """A running `vllm serve`."""

    def __init__(self, model: Path, port: int, log: Path, *options: str) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--port", str(port)]
        command += ["--host", "127.0.0.1", "--served-model-name", "bench", "--dtype", "bfloat16"]
        command += ["--worker-extension-cls", "checksum_extension.ChecksumExtension", *options]
        environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1"}
        environment["PYTHONPATH"] = f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        self.client = VllmClient(self.url, timeout=60.0)

    def wait(self) -> None:
        """Waits until it serves; shows the end of its log if it ends instead."""
        deadline = Deadline(START_SECONDS)
        while not deadline.expired and self.process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health", timeout=5).is_success:
                    return
            time.sleep(0.5)
        raise SystemExit(f"vLLM did not start:\n{self.log.read_text()[-6000:]}")

    def rpc(self, method: str) -> list[object]:
        """Runs a method on all workers."""
        reply = httpx.post(f"{self.url}/collective_rpc", json={"method": method}, timeout=120)
        reply.raise_for_status()
        return reply.json()["results"]

    def tokens(self) -> list[str]:
        """Greedy continuations, with their token ids where this vLLM tells them."""
        texts = []
        for prompt in PROMPTS:
            body = {"model": "bench", "prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
            reply = httpx.post(f"{self.url}/v1/completions", json={**body, "return_token_ids": True}, timeout=120)
            reply.raise_for_status()
            choice = reply.json()["choices"][0]
            texts.append(str(choice.get("token_ids") or choice["text"]))
        return texts

    def state(self) -> dict[str, object]:
        """All that two engines with the same weights must have in common."""
        return {"checksum": self.rpc("checkpoint_engine_checksum"), "tokens": self.tokens()}

    def close(self) -> None:
        """Ends it."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)


@contextlib.contextmanager
def serving(models: list[Path], work: Path, *options: str) -> Iterator[list[Server]]:
    """Several servers, started side by side."""
    servers = [Server(m, 8100 + i, work / f"serve-{m.name}-{i}.log", *options) for i, m in enumerate(models)]
    try:
        for server in servers:
            server.wait()
        yield servers
    finally:
        for server in servers:
            server.close()


def update(ps: ParameterServer, server: Server, name: str, way: str = "broadcast:auto") -> None:
    """One update of one server; a way is a method and how vLLM takes tensors over."""
    method, reload = way.split(":")
    ps.update(
        name,
        lambda handles: server.client.update_weights(
            dict(handles), version=name, pause="keep", reset_caches=True, timeout=300
        ),
        method=method,
        reload=reload,
    )


def check(arguments: argparse.Namespace) -> None:
    """A server that was brought to a checkpoint equals one that was started with it."""
    first, second = (Path(path) for path in arguments.checkpoints)
    arguments.work.mkdir(parents=True, exist_ok=True)
    # Servers that start side by side cannot measure how much memory is theirs.
    options = ["--kv-cache-memory-bytes", str(1 << 28), "--max-model-len", "256", "--max-num-seqs", "4"]
    with (
        serving([first, second, first], arguments.work, *options) as (updated, other, untouched),
        ParameterServer(rank=0, world_size=1, device="cuda") as ps,
    ):
        for path in (first, second):
            files = sorted(path.glob("*.safetensors"))
            ps.register_checkpoint(path.name, files=files, use_inplace_pin_memory=False)
            ps.gather_metas(path.name)
        cold = {first.name: untouched.state(), second.name: other.state()}
        if cold[first.name] == cold[second.name]:
            raise SystemExit("the two checkpoints generate the same; nothing could be shown with them")
        for way in arguments.ways:
            for path in (second, first, second):
                update(ps, updated, path.name, way)
                if updated.state() != cold[path.name]:
                    raise SystemExit(f"{path.name}: differs from a cold start: {updated.state()} {cold[path.name]}")
                report = ps.last_report
                print(f"{way} {path.name}: checksum and tokens equal to a cold start; {report.seconds}", flush=True)
                print(f"    {report.engine}", flush=True)


def measure(arguments: argparse.Namespace) -> None:
    """Dummy start, then the same checkpoint again and again; the first update brings everything."""
    arguments.work.mkdir(parents=True, exist_ok=True)
    model = make_model(arguments.workload, arguments.work / arguments.workload, holes=arguments.holes)
    nbytes = sum(tensor.nbytes for tensor in WORKLOADS[arguments.workload]())
    options = ["--load-format", "dummy", "--max-model-len", "256", "--max-num-seqs", "2"]
    options += ["--gpu-memory-utilization", "0.95", "--kv-cache-memory-bytes", str(1 << 30), *arguments.serve_options]
    started = time.perf_counter()
    with (
        serving([model], arguments.work, *options) as (server,),
        ParameterServer(rank=0, world_size=1, device="cuda") as ps,
    ):
        print(f"vLLM serves after {time.perf_counter() - started:.0f} s", flush=True)
        begin = time.perf_counter()
        in_place = not any(way.startswith("direct") for way in arguments.ways)
        files = sorted(model.glob("*.safetensors"))
        ps.register_checkpoint("bench", files=files, use_inplace_pin_memory=in_place)
        ps.gather_metas("bench")
        registered = time.perf_counter() - begin
        before = server.tokens()
        runs = []
        # One way after the other: what a worker keeps registered for direct updates goes with a broadcast.
        for way in (way for way in arguments.ways for _ in range(arguments.repeat)):
            free_before = server.rpc("checkpoint_engine_memory")
            begin = time.perf_counter()
            update(ps, server, "bench", way)
            wall = time.perf_counter() - begin
            report = ps.last_report
            runs.append({"way": way, "wall": wall, **report.seconds, "free_before": free_before, **report.engine})
            print(json.dumps(runs[-1]), flush=True)
        if server.tokens() == before:
            raise SystemExit("the update changed nothing")
        record = {
            "workload": arguments.workload,
            "ways": arguments.ways,
            "system": "checkpoint-engine-vllm",
            "device": torch.cuda.get_device_name(),
            "versions": {"torch": torch.__version__, "vllm": server.rpc("checkpoint_engine_status")[0]["vllm"]},
            "bytes": nbytes,
            "tensors": ps.last_report.tensors,
            "staging": ps.last_report.staging,
            "seconds": {"register": registered},
            "updates": runs,
        }
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"vllm-{arguments.workload}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    tensors, seconds = record["tensors"], record["seconds"]
    print(f"\n{arguments.workload}: {nbytes / 1e9:.1f} GB in {tensors} tensors into vLLM {record['versions']['vllm']}")
    for way in arguments.ways:
        # By plan, the first update of all is the proof and the second its check.
        of_way = [run for run in runs if run["way"] == way]
        print(f"{way}, first {of_way[0]['wall']:.3f} s; then, in medians:")
        for stage in ("copy", "load", "finish", "total", "wall"):
            values = [run[stage] for run in of_way[2:] or of_way if stage in run]
            if values and (value := statistics.median(values)):
                rate, each = nbytes / value / 1e9, value / tensors * 1e6
                print(f"{stage:10}{value:8.3f} s {rate:8.1f} GB/s {each:8.1f} µs a tensor")
    print(f"{'register':10}{seconds['register']:8.3f} s;  staging {record['staging']}")


def make_model(workload: str, directory: Path, *, holes: bool) -> Path:
    """A checkpoint of that size with random weights, or of zeros that take no room on disk, and a configuration."""
    directory.mkdir(parents=True, exist_ok=True)
    experts = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True}
    shape = {
        "moe30b": {"num_hidden_layers": 48, "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4},
        "moe15b": {"num_hidden_layers": 24, "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4},
        "dense32b": {"num_hidden_layers": 64, "hidden_size": 5120, "num_attention_heads": 64, "num_key_value_heads": 8},
    }[workload]
    dense = workload.startswith("dense")
    config = {
        "architectures": ["Qwen3ForCausalLM" if dense else "Qwen3MoeForCausalLM"],
        "model_type": "qwen3" if dense else "qwen3_moe",
        **shape,
        **({} if dense else experts | {"decoder_sparse_step": 1, "mlp_only_layers": []}),
        "vocab_size": VOCABULARY,
        "head_dim": 128,
        "intermediate_size": 25600 if dense else 6144,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    (directory / "config.json").write_text(json.dumps(config))
    make_tokenizer(directory)
    shards: list[list[Tensor]] = [[]]
    for tensor in WORKLOADS[workload]():
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(tensor)
    begin = time.perf_counter()
    with ProcessPoolExecutor(8) as pool:
        files = [directory / f"model-{i:05}.safetensors" for i in range(len(shards))]
        list(pool.map(write_shard, files, shards, [holes] * len(shards)))
    print(f"made {workload} in {time.perf_counter() - begin:.0f} s", flush=True)
    return directory


def write_shard(path: Path, tensors: list[Tensor], holes: bool) -> None:  # noqa: FBT001 - a pool calls it
    """Random weights written through a mapping of the file, without a second copy in memory; or nothing at all."""
    header, offset = {}, 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": "BF16",
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 256 + 248)  # the data then begins at a multiple of 256
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    if holes:
        return
    torch.set_num_threads(2)
    data = torch.from_file(str(path), shared=True, size=8 + len(text) + offset, dtype=torch.uint8)
    # Drawing every number would take minutes; a megabyte of them, again and again, copies just as well.
    weights = data[8 + len(text) :].view(torch.bfloat16)
    block = torch.randn(1 << 19).mul_(0.02).to(torch.bfloat16)
    for start in range(0, weights.numel(), block.numel()):
        weights[start : start + block.numel()] = block[: weights.numel() - start]


def make_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer without any merge."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: PLC0415 - this mode only

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(["<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/dev/shm/checkpoint-engine-bench"))
    parser.add_argument("--output", type=Path, default=HERE / "results")
    commands = parser.add_subparsers(required=True)
    checking = commands.add_parser("check")
    checking.add_argument("checkpoints", nargs=2)
    checking.add_argument("--ways", nargs="+", default=WAYS, help="METHOD:RELOAD each")
    checking.set_defaults(run=check)
    timing = commands.add_parser("time")
    timing.add_argument("workload", choices=["moe30b", "moe15b", "dense32b"])
    timing.add_argument("--ways", nargs="+", default=WAYS, help="METHOD:RELOAD each")
    timing.add_argument("--holes", action="store_true", help="weights of zeros, which take no room in /dev/shm")
    timing.add_argument("--repeat", type=int, default=5)
    timing.add_argument("--serve-options", nargs="*", default=[])
    timing.set_defaults(run=measure)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
