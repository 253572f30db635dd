"""vLLM's zoo: architectures that it lists and transformers can make, as tiny as they get."""

from __future__ import annotations

from tests.zoo.families import Family

__all__ = ["FAMILIES"]

_PLAIN = [
    "ApertusForCausalLM",
    "ArceeForCausalLM",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BloomForCausalLM",
    "Cohere2ForCausalLM",
    "Cohere2MoeForCausalLM",
    "CohereForCausalLM",
    "CwmForCausalLM",
    "DeepseekV2ForCausalLM",
    "Ernie4_5ForCausalLM",
    "Ernie4_5_MoeForCausalLM",
    "Exaone4ForCausalLM",
    "FalconH1ForCausalLM",
    "FalconMambaForCausalLM",
    "FlexOlmoForCausalLM",
    "GPT2ForSequenceClassification",
    "GPT2LMHeadModel",
    "GPTBigCodeForCausalLM",
    "GPTNeoXForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "GemmaForCausalLM",
    "Glm4ForCausalLM",
    "Glm4MoeForCausalLM",
    "Glm4MoeLiteForCausalLM",
    "GlmForCausalLM",
    "GptOssForCausalLM",
    "GraniteForCausalLM",
    "GraniteMoeForCausalLM",
    "GraniteMoeHybridForCausalLM",
    "GraniteMoeSharedForCausalLM",
    "HYV3ForCausalLM",
    "HyperCLOVAXForCausalLM",
    "Idefics3ForConditionalGeneration",
    "JambaForCausalLM",
    "JambaForSequenceClassification",
    "Llama4ForCausalLM",
    "LlamaForCausalLM",
    "MambaForCausalLM",
    "MellumForCausalLM",
    "MiniCPM3ForCausalLM",
    "Ministral3ForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "ModernBertForSequenceClassification",
    "ModernBertForTokenClassification",
    "OPTForCausalLM",
    "Olmo2ForCausalLM",
    "Olmo3ForCausalLM",
    "OlmoForCausalLM",
    "OlmoeForCausalLM",
    "OpenAIPrivacyFilterForTokenClassification",
    "PaddleOCRVLForConditionalGeneration",
    "PersimmonForCausalLM",
    "Phi3ForCausalLM",
    "PhiForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "Qwen3NextForCausalLM",
    "Qwen3_5ForCausalLM",
    "Qwen3_5MoeForCausalLM",
    "RobertaForSequenceClassification",
    "RobertaForTokenClassification",
    "SeedOssForCausalLM",
    "SmolLM3ForCausalLM",
    "SmolVLMForConditionalGeneration",
    "StableLmForCausalLM",
    "Starcoder2ForCausalLM",
    "VaultGemmaForCausalLM",
    "WhisperForConditionalGeneration",
    "XLMRobertaForSequenceClassification",
    "XLMRobertaForTokenClassification",
    "Zamba2ForCausalLM",
    "Lfm2VlForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration",
    "Mistral3ForConditionalGeneration",
    "MiniMaxM2ForCausalLM",
    "LagunaForCausalLM",
    "Gemma3ForConditionalGeneration",
    "InternVLForConditionalGeneration",
    "Exaone4_5_ForConditionalGeneration",
    "NemotronForCausalLM",
    "NemotronHForCausalLM",
    "Dots1ForCausalLM",
    "Qwen2_5_VLForConditionalGeneration",
    "DbrxForCausalLM",
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
    "Qwen3_5ForConditionalGeneration",
    "Glm4vForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
    "KimiLinearForCausalLM",
    "Step3p7ForConditionalGeneration",
    "LlavaNextVideoForConditionalGeneration",
    "MiniCPMV4_6ForConditionalGeneration",
    "Qwen3ASRForConditionalGeneration",
    "VoxtralForConditionalGeneration",
    "GlmAsrForConditionalGeneration",
    "DeepseekV32ForCausalLM",
    "OlmoHybridForCausalLM",
    "AriaForConditionalGeneration",
    "Blip2ForConditionalGeneration",
    "LongcatFlashForCausalLM",
    "Llama4ForConditionalGeneration",
    "PaliGemmaForConditionalGeneration",
    "Qwen2AudioForConditionalGeneration",
    "GraniteMoeSWAForCausalLM",
    "GraniteSWAForCausalLM",
    "HYV4ForCausalLM",
    "Jais2ForCausalLM",
    "GlmMoeDsaForCausalLM",
    "HrmTextForCausalLM",
    "Qwen3_5MoeForConditionalGeneration",
]
_POOLING = [
    "BertForMaskedLM",
    "BertModel",
    "CLIPModel",
    "Gemma2Model",
    "Gemma3TextModel",
    "GteModel",
    "LlamaModel",
    "MistralModel",
    "ModernBertModel",
    "Qwen2Model",
    "RobertaForMaskedLM",
    "RobertaModel",
    "SiglipModel",
    "XLMRobertaModel",
    "NomicBertModel",
]

_POOLED = {"runner": "pooling"}
_TRANSFORMERS = {"model_impl": "transformers"}
_RERANKER = {"architectures": ["Qwen3ForSequenceClassification"], "classifier_from_token": ["5", "7"]}
_VISION = {"vision_config": {"out_hidden_size": 128}}
_CHANGED: dict[str, Family] = {
    "Mamba2ForCausalLM": Family("Mamba2ForCausalLM", {"num_heads": 8}),
    "FalconForCausalLM": Family(
        "FalconForCausalLM", {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 512}
    ),
    "FalconForCausalLM old": Family("FalconForCausalLM", {"num_kv_heads": 1, "ffn_hidden_size": 512}),
    "GPTJForCausalLM": Family("GPTJForCausalLM", {"rotary_dim": 16}),
    "DeepseekV3ForCausalLM": Family("DeepseekV3ForCausalLM", {"topk_method": "noaux_tc", "num_key_value_heads": 4}),
    "Lfm2ForCausalLM": Family(
        "Lfm2ForCausalLM", {"block_dim": 128, "conv_dim": 128, "block_ff_dim": 256, "block_norm_eps": 1e-5}
    ),
    "Qwen3ForCausalLM tied": Family("Qwen3ForCausalLM", {"tie_word_embeddings": True}),
    "Qwen3ForCausalLM own head": Family("Qwen3ForCausalLM", {"tie_word_embeddings": True}, own_head=True),
    "LlamaForCausalLM transformers": Family("LlamaForCausalLM", options=_TRANSFORMERS),
    "LlamaForCausalLM fp8_per_block": Family("LlamaForCausalLM", options={"quantization": "fp8_per_block"}),
    "Qwen3MoeForCausalLM transformers": Family("Qwen3MoeForCausalLM", options=_TRANSFORMERS),
    "BertModel transformers": Family("BertModel", options={**_POOLED, **_TRANSFORMERS}),
    "Qwen3ForSequenceClassification": Family("Qwen3ForSequenceClassification"),
    "Qwen2ForSequenceClassification": Family("Qwen2ForSequenceClassification"),
    "LlamaForSequenceClassification": Family("LlamaForSequenceClassification", {"num_labels": 1}),
    "Qwen3ForCausalLM embed": Family("Qwen3ForCausalLM", options={**_POOLED, "convert": "embed"}),
    "Qwen3-Reranker": Family(
        "Qwen3ForCausalLM",
        options={
            **_POOLED,
            "hf_overrides": {**_RERANKER, "is_original_qwen3_reranker": True},
            "skip_tokenizer_init": False,
        },
        tokenizer=True,
    ),
    "Qwen2ForRewardModel": Family("Qwen2ForRewardModel", {"num_labels": 1}, made_by="Qwen2ForTokenClassification"),
    "Qwen2_5_VLForConditionalGeneration": Family("Qwen2_5_VLForConditionalGeneration", _VISION),
    "Qwen3VLForConditionalGeneration": Family("Qwen3VLForConditionalGeneration", _VISION),
    "Qwen3VLMoeForConditionalGeneration": Family("Qwen3VLMoeForConditionalGeneration", _VISION),
    "Qwen3_5ForConditionalGeneration": Family("Qwen3_5ForConditionalGeneration", _VISION),
    "Glm4vForConditionalGeneration": Family("Glm4vForConditionalGeneration", _VISION),
    "Gemma4ForCausalLM": Family("Gemma4ForCausalLM", whole={"per_layer_config": {}}),
    "Gemma4ForCausalLM experts": Family(
        "Gemma4ForCausalLM",
        {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64},
        whole={"per_layer_config": {}},
    ),
    "Lfm2MoeForCausalLM": Family("Lfm2MoeForCausalLM", {"layer_types": ["conv", "full_attention"]}),
    "HunYuanDenseV1ForCausalLM": Family("HunYuanDenseV1ForCausalLM", {"head_dim": 32}),
    "HunYuanMoEV1ForCausalLM": Family("HunYuanMoEV1ForCausalLM", {"head_dim": 32}),
}

_BERT = {"position_embedding_type": "absolute"}
_TOWER = {"vision_tower.": "vision_tower.vision_model."}
_MODELS_TOWER = {"model.vision_tower.": "model.vision_tower.vision_model."}
_LANGUAGE = {"language_model.model.model.": "language_model.model."}
_M2 = {"scoring_func": "sigmoid", "use_qk_norm": True, "use_routing_bias": True, "rotary_dim": 16}
_LFM2 = {"block_dim": 128, "conv_dim": 128, "block_ff_dim": 256, "block_norm_eps": 1e-5}
_MENDED: dict[str, Family] = {
    "AfmoeForCausalLM": Family(
        "AfmoeForCausalLM", {"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1}
    ),
    "Glm4MoeForCausalLM": Family("Glm4MoeForCausalLM", {"head_dim": 32}),
    "Glm4MoeLiteForCausalLM": Family("Glm4MoeLiteForCausalLM", {"first_k_dense_replace": 1, "num_key_value_heads": 4}),
    "HYV3ForCausalLM": Family(
        "HYV3ForCausalLM", {"first_k_dense_replace": 1, "expert_hidden_dim": 64, "route_norm": True}
    ),
    "Dots1ForCausalLM": Family(
        "Dots1ForCausalLM", whole={"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}
    ),
    "NemotronForCausalLM": Family("NemotronForCausalLM", whole={"head_dim": 32, "num_key_value_heads": 2}),
    "MiniMaxM2ForCausalLM": Family("MiniMaxM2ForCausalLM", _M2),
    "GteModel": Family("GteModel", {"position_embedding_type": "rope"}, _POOLED),
    "XLMRobertaModel": Family("XLMRobertaModel", _BERT, _POOLED),
    "Qwen2VLForConditionalGeneration": Family(
        "Qwen2VLForConditionalGeneration", {"vision_config": {"embed_dim": 128, "hidden_size": 128, "mlp_ratio": 2}}
    ),
    "Lfm2VlForConditionalGeneration": Family(
        "Lfm2VlForConditionalGeneration",
        {"text_config": _LFM2, "vision_config": {"vision_use_head": False}},
        renamed=_MODELS_TOWER,
    ),
    "GlmAsrForConditionalGeneration": Family("GlmAsrForConditionalGeneration", renamed=_LANGUAGE),
    "Qwen2AudioForConditionalGeneration": Family("Qwen2AudioForConditionalGeneration", renamed=_LANGUAGE),
    **{
        name: Family(name, renamed=_TOWER)
        for name in (
            "LlavaForConditionalGeneration",
            "LlavaNextForConditionalGeneration",
            "LlavaNextVideoForConditionalGeneration",
            "LlavaOnevisionForConditionalGeneration",
            "Gemma3ForConditionalGeneration",
            "PaliGemmaForConditionalGeneration",
        )
    },
}
"""What transformers' own configuration lacks, or its writer calls otherwise."""

FAMILIES: dict[str, Family] = {
    **{name: Family(name) for name in _PLAIN},
    **{name: Family(name, options=_POOLED) for name in _POOLING},
    **_CHANGED,
    **_MENDED,
}
"""By the name in the table."""
