"""The way of each layer and of each tensor, worked out once for all updates by one plan."""

from __future__ import annotations

from collections import Counter

import torch

from checkpoint_engine.reload.replay import Replay
from checkpoint_engine_vllm import compat
from checkpoint_engine_vllm.layers import Layer, Layers, Way


class Routes:
    """What an update by plan looks up."""

    def __init__(self, layers: Layers, model: torch.nn.Module, lent: frozenset[torch.nn.Module]) -> None:
        """Works it out for `model`, apart from modules in `lent`, which are another model's."""
        self.layers = layers
        self.planned = {target for layer in layers if layer.way is not Way.LOADER for target in layer.targets}
        """Targets that are filled by plan."""
        self.direct = layers.tensors_of(Way.DIRECT)
        self.by_loader = layers.tensors_of(Way.LOADER)
        rebuilt = {target: layer for layer in layers.of(Way.REBUILT) for target in layer.targets}
        self.rebuilt: dict[str, list[Layer]] = {}
        """Tensor -> the layers to be rebuilt that it has pieces for, once for each piece."""
        for name, pieces in layers.plan.reload.pieces.items():
            found = [rebuilt[piece.target] for piece in pieces if piece.target in rebuilt]
            if found:
                self.rebuilt[name] = found
        self.pieces = Counter(layer.name for found in self.rebuilt.values() for layer in found)
        """How many pieces a layer to be rebuilt waits for."""
        others = {id(layer.module) for layer in layers.of(Way.LOADER)}
        self.attention = [
            module
            for module in model.modules()
            if compat.is_attention(module) and module not in lent and id(module) not in others
        ]
        """Attention layers that no loader completes."""
        fixed = {
            target: tensor
            for layer in layers.of(Way.DIRECT)
            for target in layer.targets
            if (tensor := layer.tensor(target)) is not None
        }
        self.replay = Replay(layers.plan.reload, fixed, set(rebuilt))
