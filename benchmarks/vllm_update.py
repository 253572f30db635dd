"""How long updates of a real `vllm serve` on a GPU take, from dummy weights and with CUDA graphs captured.

    python benchmarks/vllm_update.py moe30b --holes     a model of that size, made in /dev/shm

Needs vLLM and both packages in this environment. `vllm_formats.py` beside this shows that updates are right.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from vllm_server import serving, update
from workloads import VOCABULARY, WORKLOADS, Tensor

from checkpoint_engine.server import ParameterServer

HERE = Path(__file__).parent
SHARD_BYTES = 4 << 30
WAYS = ["broadcast:loader", "broadcast:auto", "direct:auto"]


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
            asked = {path: seconds for path, seconds in server.timed.seconds.items() if path != "/health"}
            runs.append({"way": way, "wall": wall, **report.seconds, **asked, "free_before": free_before})
            runs[-1] |= report.engine
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
        for stage in ("connect", "copy", "load", "finish", "/pause", "/resume", "total", "wall"):
            values = [run[stage] for run in of_way[2:] or of_way if stage in run]
            if values and (value := statistics.median(values)):
                rate, each = nbytes / value / 1e9, value / tensors * 1e6
                print(f"{stage:12}{value:8.3f} s {rate:8.1f} GB/s {each:8.1f} µs a tensor")
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
    parser.add_argument("workload", choices=["moe30b", "moe15b", "dense32b"])
    parser.add_argument("--ways", nargs="+", default=WAYS, help="METHOD:RELOAD each")
    parser.add_argument("--holes", action="store_true", help="weights of zeros, which take no room in /dev/shm")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--serve-options", nargs="*", default=[])
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
