"""Runs in vLLM's environment: makes tiny checkpoints with random weights and a tokenizer, without any download.

models.py DIR NAME... [--large]     NAME: one of KINDS, or with -b the same model from another seed, as in qwen3-b
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import gpt_oss
import torch
from quantise import FORMATS, quantise, with_cache_scales
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY, LAYERS = 512, 2
SPREAD = 0.08
"""Standard deviation of weights; with the usual 0.02 the logits of so small a model are all but flat."""

Shapes = Iterator[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Size:
    hidden: int = 128
    heads: int = 4
    key_heads: int = 2
    head: int = 32
    intermediate: int = 256
    experts: int = 8
    expert_intermediate: int = 64


SMALL = Size()
WIDE = Size(hidden=256, head=64, experts=4, expert_intermediate=128)
"""Whatever is quantised in blocks, also each part of a fused layer, is a multiple of 128 here; kernels ask for it."""

LARGE = Size(hidden=4096, heads=32, key_heads=8, head=128, intermediate=12288, expert_intermediate=1536)
"""Layers as wide as those of a model of 8 billion parameters."""


@dataclass(frozen=True)
class Kind:
    model: str
    """What the architecture is called here: qwen3, tied, moe, mtp, deepseek or gptoss."""
    form: str = ""
    """How weights are stored; empty: bfloat16."""
    size: Size = SMALL
    cache_scales: bool = False


KINDS = {
    "qwen3": Kind("qwen3"),
    "tied": Kind("tied"),
    "moe": Kind("moe"),
    "mtp": Kind("mtp"),
    "wide": Kind("qwen3", size=WIDE),
    "fp8block": Kind("qwen3", "fp8-block", WIDE),
    "fp8tensor": Kind("qwen3", "fp8-tensor", WIDE),
    "fp8channel": Kind("qwen3", "fp8-channel", WIDE),
    "int8": Kind("qwen3", "int8-channel", WIDE),
    "wna16": Kind("qwen3", "int4-packed", WIDE),
    "fp8moe": Kind("moe", "fp8-block", WIDE),
    "fp8experts": Kind("moe", "fp8-channel", WIDE),
    "fp8kv": Kind("qwen3", "fp8-tensor", WIDE, cache_scales=True),
    "nvfp4": Kind("qwen3", "nvfp4", WIDE),
    "nvfp4ct": Kind("qwen3", "nvfp4-compressed", WIDE),
    "nvfp4moe": Kind("moe", "nvfp4-moe", WIDE),
    "mxfp8": Kind("qwen3", "mxfp8", WIDE),
    "mxfp8moe": Kind("moe", "mxfp8-moe", WIDE),
    "mxfp4moe": Kind("moe", "mxfp4-experts", WIDE),
    "fp8mxfp4moe": Kind("moe", "mxfp4-experts-beside-fp8", WIDE),
    "gptoss": Kind("gptoss", "gpt-oss", WIDE),
    "mla": Kind("deepseek", size=WIDE),
    "fp8mla": Kind("deepseek", "fp8-block", WIDE),
}

# DeepSeek's own: kernels for its attention take no other sizes.
QUERY_RANK, KEY_RANK, NOPE, ROPE, VALUE = 128, 512, 128, 64, 128


def attention(prefix: str, size: Size, *, norms: bool, biases: bool) -> Shapes:
    for part, heads in (("q", size.heads), ("k", size.key_heads), ("v", size.key_heads)):
        yield f"{prefix}.self_attn.{part}_proj.weight", (heads * size.head, size.hidden)
        if biases:
            yield f"{prefix}.self_attn.{part}_proj.bias", (heads * size.head,)
    yield f"{prefix}.self_attn.o_proj.weight", (size.hidden, size.heads * size.head)
    if norms:
        yield f"{prefix}.self_attn.q_norm.weight", (size.head,)
        yield f"{prefix}.self_attn.k_norm.weight", (size.head,)


def latent_attention(prefix: str, size: Size) -> Shapes:
    yield f"{prefix}.self_attn.q_a_proj.weight", (QUERY_RANK, size.hidden)
    yield f"{prefix}.self_attn.q_a_layernorm.weight", (QUERY_RANK,)
    yield f"{prefix}.self_attn.q_b_proj.weight", (size.heads * (NOPE + ROPE), QUERY_RANK)
    yield f"{prefix}.self_attn.kv_a_proj_with_mqa.weight", (KEY_RANK + ROPE, size.hidden)
    yield f"{prefix}.self_attn.kv_a_layernorm.weight", (KEY_RANK,)
    yield f"{prefix}.self_attn.kv_b_proj.weight", (size.heads * (NOPE + VALUE), KEY_RANK)
    yield f"{prefix}.self_attn.o_proj.weight", (size.hidden, size.heads * VALUE)


def mlp(prefix: str, size: Size, intermediate: int) -> Shapes:
    yield f"{prefix}.gate_proj.weight", (intermediate, size.hidden)
    yield f"{prefix}.up_proj.weight", (intermediate, size.hidden)
    yield f"{prefix}.down_proj.weight", (size.hidden, intermediate)


def layer(prefix: str, model: str, size: Size, *, dense: bool) -> Shapes:
    if model == "gptoss":
        yield from gpt_oss.layer(prefix, size)
    elif model == "deepseek":
        yield from latent_attention(prefix, size)
    else:
        yield from attention(prefix, size, norms=model != "mtp", biases=model == "mtp")
    if dense:
        yield from mlp(f"{prefix}.mlp", size, size.intermediate)
    elif model != "gptoss":
        yield f"{prefix}.mlp.gate.weight", (size.experts, size.hidden)
        for expert in range(size.experts):
            yield from mlp(f"{prefix}.mlp.experts.{expert}", size, size.expert_intermediate)
        if model == "deepseek":
            yield f"{prefix}.mlp.gate.e_score_correction_bias", (size.experts,)
            yield from mlp(f"{prefix}.mlp.shared_experts", size, size.expert_intermediate)
    yield f"{prefix}.input_layernorm.weight", (size.hidden,)
    yield f"{prefix}.post_attention_layernorm.weight", (size.hidden,)


def shapes(kind: Kind) -> Shapes:
    size, model = kind.size, kind.model
    yield "model.embed_tokens.weight", (VOCABULARY, size.hidden)
    for index in range(LAYERS):
        dense = model not in ("moe", "gptoss") and (model != "deepseek" or index == 0)
        yield from layer(f"model.layers.{index}", model, size, dense=dense)
    yield "model.norm.weight", (size.hidden,)
    if model != "tied":
        yield "lm_head.weight", (VOCABULARY, size.hidden)
    if model == "mtp":
        yield from layer("model.mtp_layers.0", model, size, dense=True)
        yield "model.mtp_layers.0.input_proj.weight", (size.hidden, 2 * size.hidden)
        for norm in ("token", "hidden", "final"):
            yield f"model.mtp_layers.0.{norm}_layernorm.weight", (size.hidden,)
    if model == "deepseek":
        prefix = f"model.layers.{LAYERS}"
        yield f"{prefix}.embed_tokens.weight", (VOCABULARY, size.hidden)
        yield f"{prefix}.enorm.weight", (size.hidden,)
        yield f"{prefix}.hnorm.weight", (size.hidden,)
        yield f"{prefix}.eh_proj.weight", (size.hidden, 2 * size.hidden)
        yield from layer(prefix, model, size, dense=False)
        yield f"{prefix}.shared_head.norm.weight", (size.hidden,)
        yield f"{prefix}.shared_head.head.weight", (VOCABULARY, size.hidden)


def config(kind: Kind) -> dict[str, object]:
    size = kind.size
    architecture, model_type = {
        "moe": ("Qwen3MoeForCausalLM", "qwen3_moe"),
        "mtp": ("MiMoForCausalLM", "qwen2"),
        "deepseek": ("DeepseekV3ForCausalLM", "deepseek_v3"),
        "gptoss": ("GptOssForCausalLM", "gpt_oss"),
    }.get(kind.model, ("Qwen3ForCausalLM", "qwen3"))
    found = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": VOCABULARY,
        "hidden_size": size.hidden,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.key_heads,
        "head_dim": size.head,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": LAYERS,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": kind.model == "tied",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
    } | {
        "moe": {
            "num_experts": size.experts,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": size.expert_intermediate,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
        "mtp": {"num_nextn_predict_layers": 1},
        "gptoss": gpt_oss.config(size),
        "deepseek": {
            "num_key_value_heads": size.heads,
            "head_dim": ROPE,
            "q_lora_rank": QUERY_RANK,
            "kv_lora_rank": KEY_RANK,
            "qk_nope_head_dim": NOPE,
            "qk_rope_head_dim": ROPE,
            "v_head_dim": VALUE,
            "n_routed_experts": size.experts,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": size.expert_intermediate,
            "moe_layer_freq": 1,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.0,
            "num_nextn_predict_layers": 1,
        },
    }.get(kind.model, {})
    return found | ({"quantization_config": _how_stored(kind)} if kind.form else {})


def _how_stored(kind: Kind) -> Mapping[str, object]:
    return gpt_oss.CONFIG if kind.model == "gptoss" else FORMATS[kind.form].config


def weights(kind: Kind, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes(kind):
        tensor = torch.randn(shape, generator=generator) * SPREAD + (1.0 if "norm" in name else 0.0)
        tensors[name] = tensor if name.endswith("correction_bias") else tensor.to(torch.bfloat16)
    if kind.model == "gptoss":
        tensors = gpt_oss.store(tensors)
    elif kind.form:
        tensors = quantise(tensors, FORMATS[kind.form])
    return with_cache_scales(tensors, seed) if kind.cache_scales else tensors


def save_tokenizer(directory: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["The quick brown fox jumps over the lazy dog.", "Hello, my name is", "The capital of France is Paris."] * 20,
        trainer,
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "pad_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(described))


def save_weights(directory: Path, tensors: dict[str, torch.Tensor], files: int = 3) -> None:
    """Several files, so that ranks have something to share out."""
    names, index = list(tensors), {}
    share = -(-len(names) // files)
    for number in range(files):
        file = f"model-{number + 1:05}-of-{files:05}.safetensors"
        part = names[number * share : (number + 1) * share]
        save_file({name: tensors[name] for name in part}, directory / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(part, file))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def make(parent: Path, name: str, *, large: bool = False) -> None:
    key, _, variant = name.partition("-")
    kind = replace(KINDS[key], size=LARGE) if large else KINDS[key]
    directory = parent / name
    directory.mkdir(parents=True)
    save_tokenizer(directory)
    (directory / "config.json").write_text(json.dumps(config(kind), indent=1))
    save_weights(directory, weights(kind, seed=2 if variant else 1))


if __name__ == "__main__":
    for checkpoint in sys.argv[2:]:
        if checkpoint != "--large":
            make(Path(sys.argv[1]), checkpoint, large="--large" in sys.argv)
