"""Runs in vLLM's environment: makes tiny checkpoints with random weights and a tokenizer, without any download.

models.py DIR NAME...       NAME: qwen3, qwen3-b (the same model from another seed), tied, moe, mtp
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

HIDDEN, HEADS, KEY_HEADS, HEAD, INTERMEDIATE, LAYERS, VOCABULARY = 128, 4, 2, 32, 256, 2, 512
EXPERTS, EXPERT_INTERMEDIATE = 8, 64
SPREAD = 0.08
"""Standard deviation of weights; with the usual 0.02 the logits of so small a model are all but flat."""

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def attention(prefix: str, *, norms: bool, biases: bool) -> Shapes:
    for part, heads in (("q", HEADS), ("k", KEY_HEADS), ("v", KEY_HEADS)):
        yield f"{prefix}.self_attn.{part}_proj.weight", (heads * HEAD, HIDDEN)
        if biases:
            yield f"{prefix}.self_attn.{part}_proj.bias", (heads * HEAD,)
    yield f"{prefix}.self_attn.o_proj.weight", (HIDDEN, HEADS * HEAD)
    if norms:
        yield f"{prefix}.self_attn.q_norm.weight", (HEAD,)
        yield f"{prefix}.self_attn.k_norm.weight", (HEAD,)


def mlp(prefix: str, intermediate: int) -> Shapes:
    yield f"{prefix}.gate_proj.weight", (intermediate, HIDDEN)
    yield f"{prefix}.up_proj.weight", (intermediate, HIDDEN)
    yield f"{prefix}.down_proj.weight", (HIDDEN, intermediate)


def layer(prefix: str, kind: str) -> Shapes:
    yield from attention(prefix, norms=kind != "mtp", biases=kind == "mtp")
    if kind == "moe":
        yield f"{prefix}.mlp.gate.weight", (EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            yield from mlp(f"{prefix}.mlp.experts.{expert}", EXPERT_INTERMEDIATE)
    else:
        yield from mlp(f"{prefix}.mlp", INTERMEDIATE)
    yield f"{prefix}.input_layernorm.weight", (HIDDEN,)
    yield f"{prefix}.post_attention_layernorm.weight", (HIDDEN,)


def shapes(kind: str) -> Shapes:
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for index in range(LAYERS):
        yield from layer(f"model.layers.{index}", kind)
    yield "model.norm.weight", (HIDDEN,)
    if kind != "tied":
        yield "lm_head.weight", (VOCABULARY, HIDDEN)
    if kind == "mtp":
        yield from layer("model.mtp_layers.0", kind)
        yield "model.mtp_layers.0.input_proj.weight", (HIDDEN, 2 * HIDDEN)
        for norm in ("token", "hidden", "final"):
            yield f"model.mtp_layers.0.{norm}_layernorm.weight", (HIDDEN,)


def config(kind: str) -> dict[str, object]:
    architecture, model_type = {
        "moe": ("Qwen3MoeForCausalLM", "qwen3_moe"),
        "mtp": ("MiMoForCausalLM", "qwen2"),
    }.get(kind, ("Qwen3ForCausalLM", "qwen3"))
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "head_dim": HEAD,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": kind == "tied",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
    } | {
        "moe": {
            "num_experts": EXPERTS,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": EXPERT_INTERMEDIATE,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
        "mtp": {"num_nextn_predict_layers": 1},
    }.get(kind, {})


def weights(kind: str, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=generator) * SPREAD + (1.0 if "norm" in name else 0.0)).to(torch.bfloat16)
        for name, shape in shapes(kind)
    }


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


def make(parent: Path, name: str) -> None:
    kind, _, variant = name.partition("-")
    directory = parent / name
    directory.mkdir(parents=True)
    save_tokenizer(directory)
    (directory / "config.json").write_text(json.dumps(config(kind), indent=1))
    save_weights(directory, weights(kind, seed=2 if variant else 1))


if __name__ == "__main__":
    for checkpoint in sys.argv[2:]:
        make(Path(sys.argv[1]), checkpoint)
