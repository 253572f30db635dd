"""Runs in vLLM's environment, which has transformers: makes a model, or looks at what it holds, without our code.

transformers_models.py make DIRECTORY SEED     a tiny Llama with random weights
transformers_models.py look DIRECTORY          prints its digest and the tokens that it generates, as JSON
"""

from __future__ import annotations

import hashlib
import json
import sys

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

PROMPT = [1, 5, 9, 2]


def make(directory: str, seed: int) -> None:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        tie_word_embeddings=False,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.01)  # norms differ as well
    model.save_pretrained(directory, max_shard_size="200KB")


def look(directory: str) -> dict[str, object]:
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    found = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        found.update(name.encode())
        found.update(parameter.data.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    with torch.no_grad():
        tokens = model.generate(torch.tensor([PROMPT]), max_new_tokens=16, do_sample=False)[0].tolist()
    return {"digest": found.hexdigest(), "tokens": tokens}


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(sys.argv[2], int(sys.argv[3]))
    else:
        print(json.dumps(look(sys.argv[2])))
