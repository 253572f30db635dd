"""Checkpoints of the workloads on disk, with what an engine needs beside them to serve them."""

from __future__ import annotations

import json
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from workloads import HEAD_DIM, WORKLOADS, Tensor

SHARD_BYTES = 4 << 30


def make_model(workload: str, directory: Path, *, holes: bool) -> Path:
    """A checkpoint of that size with random weights, or of zeros that take no room on disk, and a configuration."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = WORKLOADS[workload]()
    (directory / "config.json").write_text(json.dumps(configuration(tensors)))
    make_tokenizer(directory)
    shards: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(tensor)
    begin = time.perf_counter()
    with ProcessPoolExecutor(8) as pool:
        files = [directory / f"model-{i:05}.safetensors" for i in range(len(shards))]
        list(pool.map(write_shard, files, shards, [holes] * len(shards)))
    print(f"made {workload} in {time.perf_counter() - begin:.0f} s", flush=True)
    return directory


def configuration(tensors: list[Tensor]) -> dict[str, object]:
    """What config.json says of a Qwen3 model with these tensors."""
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    layers = {name.split(".")[2] for name in shapes if name.startswith("model.layers.")}
    vocabulary, hidden = shapes["model.embed_tokens.weight"]
    attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
    router, dense = shapes.get(f"{mlp}.gate.weight"), shapes.get(f"{mlp}.gate_proj.weight")
    config: dict[str, object] = {
        "architectures": ["Qwen3MoeForCausalLM" if router else "Qwen3ForCausalLM"],
        "model_type": "qwen3_moe" if router else "qwen3",
        "num_hidden_layers": len(layers),
        "hidden_size": hidden,
        "num_attention_heads": shapes[f"{attention}.q_proj.weight"][0] // HEAD_DIM,
        "num_key_value_heads": shapes[f"{attention}.k_proj.weight"][0] // HEAD_DIM,
        "vocab_size": vocabulary,
        "head_dim": HEAD_DIM,
        "intermediate_size": dense[0] if dense else 6144,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    if router:
        config |= {"num_experts": router[0], "num_experts_per_tok": 8, "norm_topk_prob": True}
        config |= {"moe_intermediate_size": shapes[f"{mlp}.experts.0.gate_proj.weight"][0]}
        config |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
    return config


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
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(["<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
