"""Real FP8 layers of a vLLM source tree: loaded with A, then B, then A again, each time compared with a fresh load.

    python fp8_layers.py TREE...        prints one JSON object a tree: {case: what is wrong, as text; empty if nothing}

Layers, loaders and quantisation methods are the tree's own; `fp8_tree.py` says what is not. Nothing is multiplied,
except for `mla`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import fp8_model
import torch
import transformers  # noqa: F401 - once for all trees
from fp8_state import addresses, differences, state
from fp8_tree import Vllm, import_tree

Tensors = Iterator[tuple[str, Any, torch.Tensor]]
"""Name, which part of the parameter, content."""

HIDDEN, EXPERTS, INTERMEDIATE = 256, 4, 128
PROJECTIONS = [  # layer, shard, rows, columns
    ("qkv", "q", 256, HIDDEN),
    ("qkv", "k", 128, HIDDEN),
    ("qkv", "v", 128, HIDDEN),
    ("gate_up", 0, 256, HIDDEN),
    ("gate_up", 1, 256, HIDDEN),
    ("down", None, HIDDEN, 256),
]


class Kind:
    """Layers of one kind: `make`, tensors of a checkpoint (`tensors`), and giving them to the layers (`load`)."""

    def __init__(self, vllm: Vllm, quantised: str) -> None:
        self.vllm, self.quantised = vllm, quantised

    def config(self) -> Any:
        if self.quantised == "block":
            return self.vllm.fp8.Fp8Config(True, "dynamic", weight_block_size=[128, 128])
        if self.quantised == "tensor":
            return self.vllm.fp8.Fp8Config(True, "static")
        return self.vllm.fp8.Fp8Config(False, "dynamic")

    def weight(self, seed: torch.Generator, rows: int, columns: int) -> torch.Tensor:
        wide = torch.randn(rows, columns, generator=seed, dtype=torch.float32)
        return wide.bfloat16() if self.quantised == "online" else (wide * 40).to(torch.float8_e4m3fn)

    def loader(self, param: torch.nn.Parameter) -> Callable[..., object]:
        return getattr(param, "weight_loader", self.vllm.default_weight_loader)


class Linear(Kind):
    def make(self) -> torch.nn.Module:
        model, options = torch.nn.Module(), {"quant_config": self.config()}
        model.qkv = self.vllm.linear.QKVParallelLinear(HIDDEN, 64, 4, 2, bias=False, prefix="qkv", **options)
        sizes = [256, 256]
        model.gate_up = self.vllm.linear.MergedColumnParallelLinear(HIDDEN, sizes, bias=False, prefix="gu", **options)
        # Where vLLM 0.13 and newer quantise while they load, Marlin takes a bias before it has come.
        bias = not (self.vllm.marlin and self.quantised == "online")
        model.down = self.vllm.linear.RowParallelLinear(256, HIDDEN, bias=bias, prefix="down", **options)
        return model

    def tensors(self, seed: torch.Generator) -> Tensors:
        for layer, shard, rows, columns in PROJECTIONS:
            yield f"{layer}.weight", shard, self.weight(seed, rows, columns)
            if self.quantised == "block":
                yield f"{layer}.weight_scale_inv", shard, torch.rand(rows // 128, columns // 128, generator=seed)
            elif self.quantised == "tensor":
                yield f"{layer}.weight_scale", shard, scale(seed)
                yield f"{layer}.input_scale", shard, scale(seed)
        if not (self.vllm.marlin and self.quantised == "online"):
            yield "down.bias", None, torch.randn(HIDDEN, generator=seed).bfloat16()

    def load(self, model: torch.nn.Module, tensors: Iterable[tuple[str, Any, torch.Tensor]]) -> None:
        for name, shard, tensor in tensors:
            param = dict(model.named_parameters())[name]
            self.loader(param)(param, tensor, *([] if shard is None else [shard]))


class Experts(Kind):
    made = 0

    def make(self) -> torch.nn.Module:
        model = torch.nn.Module()
        Experts.made += 1
        model.experts = self.vllm.FusedMoE(
            num_experts=EXPERTS,
            top_k=2,
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            reduce_results=False,
            renormalize=True,
            quant_config=self.config(),
            prefix=f"experts{self.made}",
        )
        return model

    def tensors(self, seed: torch.Generator) -> Tensors:
        for expert in range(EXPERTS):
            activation = scale(seed)
            for shard, name, rows, columns in (
                ("w1", "w13", INTERMEDIATE, HIDDEN),
                ("w3", "w13", INTERMEDIATE, HIDDEN),
                ("w2", "w2", HIDDEN, INTERMEDIATE),
            ):
                yield f"{name}_weight", (shard, expert), self.weight(seed, rows, columns)
                if self.quantised == "block":
                    blocks = torch.rand(rows // 128, columns // 128, generator=seed)
                    yield f"{name}_weight_scale_inv", (shard, expert), blocks
                elif self.quantised == "tensor":
                    yield f"{name}_weight_scale", (shard, expert), scale(seed)
                    yield f"{name}_input_scale", (shard, expert), activation

    def load(self, model: torch.nn.Module, tensors: Iterable[tuple[str, Any, torch.Tensor]]) -> None:
        params = dict(model.named_parameters())
        for name, (shard, expert), tensor in tensors:
            param = params[f"experts.{name}"]
            full_name = f"experts.{expert}.{shard}.{name.split('_', 1)[1]}"
            param.weight_loader(param, tensor, full_name, shard_id=shard, expert_id=expert)


class KeyValueScales(Kind):
    """A has the scales that are named; B has those of keys and values."""

    made = 0

    def make(self) -> torch.nn.Module:
        model = torch.nn.Module()
        KeyValueScales.made += 1
        cache = self.vllm.CacheConfig(block_size=16)
        model.attn = self.vllm.Attention(
            4, 64, 1.0, 2, cache_config=cache, quant_config=self.vllm.fp8.Fp8Config(True), prefix=f"attn{self.made}"
        )
        model.attn.kv_cache_dtype = "fp8"  # only now: CPU attention refuses it
        return model

    def tensors(self, seed: torch.Generator) -> Tensors:
        names = self.quantised.split() if seed.initial_seed() == 1 else ["k_scale", "v_scale"]
        for name in names:
            yield f"attn.{name}", name[0], scale(seed)

    def load(self, model: torch.nn.Module, tensors: Tensors) -> None:
        """As models of Qwen do, which find these under fused layers: only the plain loader is not told a shard."""
        params: dict[str, Any] = dict(model.named_parameters())
        plain = self.vllm.default_weight_loader
        for name, shard, tensor in tensors:
            loader = getattr(params[name], "weight_loader", plain)
            loader(params[name], tensor, *([] if loader == plain else [shard]))


class LatentAttention(Kind):
    """MLA: what is computed from kv_b_proj must follow it, in place."""

    def make(self) -> torch.nn.Module:
        model = torch.nn.Module()
        model.kv_b_proj = self.vllm.linear.ColumnParallelLinear(
            HIDDEN, 256, bias=False, quant_config=self.config(), prefix="kv_b_proj"
        )
        model.impl = types.SimpleNamespace(
            kv_b_proj=model.kv_b_proj,
            kv_lora_rank=HIDDEN,
            num_heads=1,
            qk_nope_head_dim=128,
            v_head_dim=128,
            is_aiter_triton_fp8_bmm_enabled=False,
            is_aiter_triton_fp4_bmm_enabled=False,
        )
        method = model.kv_b_proj.quant_method

        def apply(layer: Any, x: torch.Tensor, bias: None = None) -> torch.Tensor:
            del bias
            blocks = getattr(layer, "weight_scale_inv", getattr(layer, "weight_scale", None))
            blocks = blocks if blocks.shape == (2, 2) and not self.vllm.transposes(layer) else blocks.t()
            scales = blocks.repeat_interleave(128, 0).repeat_interleave(128, 1)
            return x @ (layer.weight.float() * scales).to(x.dtype).t()

        method.apply = apply
        return model

    def tensors(self, seed: torch.Generator) -> Tensors:
        yield "kv_b_proj.weight", None, self.weight(seed, 256, HIDDEN)
        yield "kv_b_proj.weight_scale_inv", None, torch.rand(2, 2, generator=seed)

    load = Linear.load


def scale(seed: torch.Generator) -> torch.Tensor:
    return torch.rand((), generator=seed) + 0.1


def process(vllm: Vllm, model: torch.nn.Module) -> None:
    for layer in model.modules():
        method = getattr(layer, "quant_method", None)
        if method is not None:
            method.process_weights_after_loading(layer)
    if hasattr(model, "impl"):
        vllm.process_mla(model.impl, torch.bfloat16)


def reload(kind: Kind) -> str:
    """A, B, A into the same layers, against fresh ones."""
    vllm = kind.vllm

    def checkpoint(number: int) -> list[tuple[str, Any, torch.Tensor]]:
        return list(kind.tensors(torch.Generator(device="cpu").manual_seed(number)))

    def fresh(number: int) -> torch.nn.Module:
        model = kind.make()
        kind.load(model, checkpoint(number))
        process(vllm, model)
        return model

    model, wrong = fresh(1), []
    before = addresses(model)
    expected = {number: state(fresh(number)) for number in (1, 2)}
    if not differences(expected[1], expected[2]):
        return "the two checkpoints are the same"
    for number in (2, 2, 1):
        kind.load(model, checkpoint(number))
        process(vllm, model)
        wrong += [f"checkpoint {number}: {text}" for text in differences(state(model), expected[number])]
    wrong += [f"{name} has moved" for name, address in addresses(model).items() if address != before.get(name)]
    process(vllm, model)
    wrong += [f"without weights: {text}" for text in differences(state(model), expected[1])]
    return "; ".join(wrong)


def part(kind: Kind) -> str:
    """A layer that gets only some of its weights is an error, and one that gets all of them again is whole."""
    vllm, model = kind.vllm, kind.make()
    tensors = list(kind.tensors(torch.Generator(device="cpu").manual_seed(1)))
    kind.load(model, tensors)
    process(vllm, model)
    before = {name: value.clone() for name, value in state(model).items()}
    for _ in range(2):  # it does not become right by asking again
        kind.load(model, tensors[1:])
        try:
            process(vllm, model)
        except RuntimeError as error:
            if "came only in part; missing: w" not in str(error):
                return f"another error: {error}"
        else:
            return "no error"
    kind.load(model, tensors[:2])
    if not vllm.abandon(model):
        return "abandon saw nothing"
    kind.load(model, tensors[2:])
    try:
        process(vllm, model)
    except RuntimeError:
        kind.load(model, tensors)
        process(vllm, model)
        return "; ".join(differences(state(model), before))
    return "two halves, of which the first was abandoned, were taken for a whole"


def at_once(kind: Kind) -> str:
    """What is quantised here becomes so while it is loaded, or a second model would have to fit into memory."""
    model = kind.make()
    tensors = list(kind.tensors(torch.Generator(device="cpu").manual_seed(1)))
    for _ in range(2):
        kind.load(model, tensors)
        process(kind.vllm, model)
    kind.load(model, tensors)
    return "layers wait to be processed" if kind.vllm.abandon(model) else ""


CASES = {
    "linear, blocks": (Linear, "block"),
    "linear, one scale": (Linear, "tensor"),
    "linear, online": (Linear, "online"),
    "experts, blocks": (Experts, "block"),
    "experts, one scale": (Experts, "tensor"),
    "experts, online": (Experts, "online"),
    "cache, keys and values": (KeyValueScales, "k_scale v_scale"),
    "cache, queries too": (KeyValueScales, "k_scale v_scale q_scale prob_scale"),
    "cache, one scale": (KeyValueScales, "k_scale"),
    "mla": (LatentAttention, "block"),
}


def check(tree: str) -> dict[str, str]:
    vllm = import_tree(tree)
    found = {name: attempt(reload, kind(vllm, quantised)) for name, (kind, quantised) in CASES.items()}
    found["a model"] = attempt(fp8_model.update, vllm)
    if vllm.abandon is not None:
        for name in ("linear, blocks", "linear, one scale", "experts, blocks"):
            kind, quantised = CASES[name]
            found[f"{name}, in part"] = attempt(part, kind(vllm, quantised))
        for name in ("linear, online", "experts, online"):
            kind, quantised = CASES[name]
            found[f"{name}, at once"] = attempt(at_once, kind(vllm, quantised))
    vllm.marlin = True
    for name in ("linear, blocks", "linear, online", "experts, blocks"):
        kind, quantised = CASES[name]
        found[f"{name}, marlin"] = attempt(reload, kind(vllm, quantised))
    return found


def attempt(test: Callable[[Any], str], kind: Kind | Vllm) -> str:
    try:
        return test(kind)
    except Exception as error:
        if os.environ.get("TRACEBACK"):
            raise
        return f"{type(error).__name__}: {error}"


def show(tree: str) -> None:
    with torch.no_grad():
        print(json.dumps(check(tree)), flush=True)


def main() -> None:
    for tree in sys.argv[1:]:
        # Forked: the libraries that all trees need are imported once. A process for each, which ends in good order.
        process = multiprocessing.get_context("fork").Process(target=show, args=(tree,))
        process.start()
        process.join()
        if process.exitcode != 0:
            sys.exit(f"the process for {tree} died")


if __name__ == "__main__":
    main()
