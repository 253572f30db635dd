"""Writes two checkpoints of a family, A and B: the same architecture, other random values."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.zoo.families import Family
from tests.zoo.shrinking import VOCABULARY, shrunk

__all__ = ["SEEDS", "make"]

SEEDS = {"A": 1, "B": 2}
_SPREAD = 0.08
_OTHERS_DECIDE = ("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype")
_ALL_TOKENIZERS = "ZOO_TOKENIZERS" in os.environ
"""For those who serve such a checkpoint to people."""
_LARGEST = 40_000_000
"""Parameters of a model that is still called tiny."""


def make(directory: Path, family: Family) -> None:
    """Writes `directory/A` and `directory/B`.

    Raises:
        ValueError: the family's configuration is not tiny.
    """
    kind: Any = getattr(transformers, family.made_by or family.architecture)
    for tag, seed in SEEDS.items():
        torch.manual_seed(seed)
        config = _configured(kind.config_class, family)
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in kind(config).parameters())
        if size > _LARGEST:
            raise ValueError(f"{size} parameters are too many")
        if family.own_head:
            config.tie_word_embeddings = False
        model = kind(config).to(torch.bfloat16)
        fill(model, seed)
        if family.own_head:
            config.tie_word_embeddings = True
        model.config.architectures = [family.architecture]
        model.save_pretrained(directory / tag)
        _rename(directory / tag, family.renamed)
        if family.tokenizer or _ALL_TOKENIZERS:
            _save_tokenizer(directory / tag)


def _rename(checkpoint: Path, renamed: Mapping[str, str]) -> None:
    for file in checkpoint.glob("*.safetensors") if renamed else ():
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        save_file({_published(name, renamed): tensor for name, tensor in tensors.items()}, file, {"format": "pt"})


def _published(name: str, renamed: Mapping[str, str]) -> str:
    prefix = next((prefix for prefix in renamed if name.startswith(prefix)), "")
    return renamed.get(prefix, "") + name.removeprefix(prefix)


def _save_tokenizer(directory: Path) -> None:
    """One whose tokens are numbers."""
    words = tokenizers.models.WordLevel({str(number): number for number in range(VOCABULARY)}, unk_token="0")
    tokenizers.Tokenizer(words).save(str(directory / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "0", "eos_token": "2"}
    (directory / "tokenizer_config.json").write_text(json.dumps(described))


def _configured(kind: Any, family: Family) -> Any:
    whole = {**kind().to_dict(), **family.whole}
    small = shrunk({name: value for name, value in whole.items() if name not in _OTHERS_DECIDE})
    config = kind(**_changed(small, family.changes))
    config.dtype = torch.bfloat16
    return config


def _changed(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(config)
    for name, value in changes.items():
        held = result.get(name)
        result[name] = _changed(held, value) if isinstance(held, dict) and isinstance(value, Mapping) else value
    return result


def fill(model: torch.nn.Module, seed: int) -> None:
    """Random values that no two seeds share, of a size that a model can compute with."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("A_log"):
                parameter.copy_(torch.log(noise.abs() * 4 + 1))
            elif name.endswith(("dt_bias", ".D")):
                parameter.copy_(noise.abs())
            elif parameter.dim() == 1 and name.endswith("weight"):
                parameter.copy_(1 + 0.1 * noise)
            else:
                parameter.copy_(_SPREAD * noise)
        for name, buffer in model.named_buffers():
            if name.endswith(("e_score_correction_bias", "layer_scalar", "expert_bias")):
                buffer.copy_(0.1 * torch.rand(buffer.shape, generator=generator))
