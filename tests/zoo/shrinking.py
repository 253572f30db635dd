"""Any configuration of transformers, made tiny."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["HEADS", "HIDDEN", "VOCABULARY", "shrunk"]

VOCABULARY = 512
HIDDEN, HEADS, KEY_HEADS, HEAD = 128, 4, 2, 32
INNER, EXPERT_INNER, EXPERTS, CHOSEN = 256, 64, 4, 2
POSITIONS, LAYERS = 256, 2

_SIZES: dict[str, int] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "text_vocab_size"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim", "embedding_size"), HIDDEN),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "encoder_attention_heads"), HEADS),
    **dict.fromkeys(("decoder_attention_heads", "attention_heads", "num_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "multi_query_group_num", "n_kv_heads"), KEY_HEADS),
    **dict.fromkeys(("global_head_dim", "head_dim", "attention_head_dim", "swa_head_dim"), HEAD),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim"), INNER),
    **dict.fromkeys(("ffn_hidden_size", "shared_intermediate_size", "intermediate_size_mlp"), INNER),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), EXPERT_INNER
    ),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_expert_size"), EXPERT_INNER),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts"), CHOSEN
    ),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "n_group", "topk_group"), 1),
    **dict.fromkeys(("num_expert_group", "num_limited_groups", "first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "max_target_positions", "n_ctx", "max_seq_len"), POSITIONS
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "depth"), LAYERS),
    **dict.fromkeys(("num_layers", "encoder_num_layers"), LAYERS),
    "sliding_window": 64,
    "kv_lora_rank": 64,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "qk_head_dim": 64,
    "v_head_dim": 32,
    "hidden_size_per_layer_input": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # mixers that are no attention
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), HEAD),
    **dict.fromkeys(("mamba_d_state", "mamba_ssm_state_size", "ssm_state_size", "state_size"), 32),
    **dict.fromkeys(("mamba_n_groups", "mamba_ngroups", "n_groups"), 1),
    **dict.fromkeys(("mamba_d_ssm",), 2 * HIDDEN),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 64),
    **dict.fromkeys(("mamba_expand", "expand"), 2),
    "mamba_dt_rank": 8,
    "time_step_rank": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": HEAD,
    "linear_value_head_dim": HEAD,
    # pictures and sounds
    "image_size": 28,
    "patch_size": 14,
    "num_mel_bins": 80,
}
_PER_TOKEN = ("image_token", "video_token", "audio_token", "vision_start", "vision_end", "_token_id", "_token_index")


def shrunk(config: Mapping[str, Any]) -> dict[str, Any]:
    """A tiny configuration of the same kind: sizes from one table, each kind of layer once, and few layers."""
    small: dict[str, Any] = {}
    layers = _layers_of(config)
    fewer = _kinds_of_layers(config, layers)
    for name, value in config.items():
        if isinstance(value, Mapping) and name.endswith("config"):
            small[name] = shrunk(value)
        elif isinstance(value, int) and not isinstance(value, bool) and name in _SIZES:
            small[name] = len(fewer) if value == layers and _SIZES[name] == LAYERS else _SIZES[name]
        elif isinstance(value, list) and layers and len(value) == layers:
            small[name] = [value[index] for index in fewer]
        elif isinstance(value, int) and name.endswith(_PER_TOKEN) and value >= VOCABULARY:
            small[name] = VOCABULARY - 1 - len([other for other in small if other.endswith(_PER_TOKEN)])
        else:
            small[name] = value
    return small


def _layers_of(config: Mapping[str, Any]) -> int:
    names = [name for name, size in _SIZES.items() if (size == LAYERS and "layer" in name) or name == "depth"]
    return next((config[name] for name in names if isinstance(config.get(name), int)), 0)


def _kinds_of_layers(config: Mapping[str, Any], layers: int) -> list[int]:
    """The first layer of each kind, where lists of the configuration tell them apart; two at least."""
    lists = [value for value in config.values() if isinstance(value, list) and layers and len(value) == layers]
    first: dict[str, int] = {}
    for index in range(layers):
        first.setdefault(str([each[index] for each in lists]), index)
    chosen = list(first.values())[:4]
    return chosen if len(chosen) >= LAYERS else list(range(LAYERS))
