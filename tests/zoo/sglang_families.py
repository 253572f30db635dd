"""SGLang's zoo: architectures that it lists, transformers can make and a CPU can load, as tiny as they get."""

from __future__ import annotations

from tests.zoo.families import Family

__all__ = ["FAMILIES", "SAMPLE"]

_PLAIN = """
AfmoeForCausalLM ArceeForCausalLM Cohere2ForCausalLM Cohere2MoeForCausalLM CohereForCausalLM Ernie4_5ForCausalLM
Ernie4_5_MoeForCausalLM FalconH1ForCausalLM GPT2LMHeadModel GPTBigCodeForCausalLM GPTJForCausalLM Gemma3ForCausalLM
GemmaForCausalLM Glm4ForCausalLM Glm4MoeForCausalLM Glm4vForConditionalGeneration GptOssForCausalLM GraniteForCausalLM
GraniteMoeForCausalLM GraniteMoeHybridForCausalLM GraniteMoeSWAForCausalLM GraniteMoeSharedForCausalLM
GraniteSWAForCausalLM HrmTextForCausalLM LagunaForCausalLM Lfm2ForCausalLM
LlamaForCausalLM LlamaForSequenceClassification MellumForCausalLM MiniCPM3ForCausalLM Ministral3ForCausalLM
MistralForCausalLM MistralModel MixtralForCausalLM OPTForCausalLM Olmo2ForCausalLM Olmo3ForCausalLM OlmoForCausalLM
Phi3ForCausalLM PhiForCausalLM Qwen2ForCausalLM Qwen2ForSequenceClassification Qwen2MoeForCausalLM
Qwen2_5_VLForConditionalGeneration Qwen3ForCausalLM Qwen3ForSequenceClassification Qwen3Model Qwen3MoeForCausalLM
Qwen3VLForConditionalGeneration SeedOssForCausalLM SmolLM3ForCausalLM StableLmForCausalLM Starcoder2ForCausalLM
"""
_BERT = {"position_embedding_type": "absolute"}
_GELU = {"hidden_act": "gelu_pytorch_tanh"}
_MLA = {"scoring_func": "sigmoid", "moe_layer_freq": 1, "topk_method": "noaux_tc", "num_key_value_heads": 4}
_M2 = {"scoring_func": "sigmoid", "use_qk_norm": True, "use_routing_bias": True, "rotary_dim": 16}
_UNTIED = {"tie_word_embeddings": False}

FAMILIES: dict[str, Family] = {
    **{name: Family(name) for name in _PLAIN.split()},
    **{
        name: Family(name, _BERT)
        for name in (
            "BertModel",
            "BertForSequenceClassification",
            "XLMRobertaModel",
            "XLMRobertaForSequenceClassification",
        )
    },
    **{name: Family(name, _GELU) for name in ("Gemma2ForCausalLM", "Gemma2ForSequenceClassification")},
    "DeepseekV3ForCausalLM": Family("DeepseekV3ForCausalLM", _MLA),
    "Exaone4ForCausalLM": Family("Exaone4ForCausalLM", {"sliding_window_pattern": "LLLG"}),
    "Glm4MoeLiteForCausalLM": Family("Glm4MoeLiteForCausalLM", {"first_k_dense_replace": 1, "moe_layer_freq": 1}),
    "Lfm2ForCausalLM untied": Family("Lfm2ForCausalLM", _UNTIED),
    "Lfm2VlForConditionalGeneration": Family(
        "Lfm2VlForConditionalGeneration",
        {"vision_config": {"vision_use_head": False}},
        renamed={"model.vision_tower.": "model.vision_tower.vision_model."},
    ),
    "MiniMaxM2ForCausalLM": Family("MiniMaxM2ForCausalLM", _M2),
    "Mistral3ForConditionalGeneration": Family("Mistral3ForConditionalGeneration", {**_UNTIED, "text_config": _UNTIED}),
    "OlmoeForCausalLM": Family("OlmoeForCausalLM", {"num_key_value_heads": 4}),
    "Qwen2ForCausalLM tied": Family("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "Qwen3ForCausalLM tied": Family("Qwen3ForCausalLM", {"tie_word_embeddings": True}),
}
"""By the name in the table."""

SAMPLE = (
    "BertModel",
    "FalconH1ForCausalLM",
    "Gemma2ForCausalLM",
    "LagunaForCausalLM",
    "Lfm2ForCausalLM untied",
    "MiniCPM3ForCausalLM",
    "MixtralForCausalLM",
    "Qwen3ForCausalLM tied",
    "Qwen3MoeForCausalLM",
)
"""Those in CI: each has been wrong once, or stands for a style of loader."""
