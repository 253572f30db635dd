"""A small real Llama of a vLLM source tree, updated by the plugin's own sink as a worker would be."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from fp8_state import addresses, differences, state
from fp8_tree import Vllm

from checkpoint_engine.contract.sink import TensorSpec, Update
from checkpoint_engine.errors import MissingDependencyError, WeightsRejectedError
from checkpoint_engine_vllm import patched

SIZE, VOCABULARY = 256, 128
PROJECTIONS = {
    "self_attn.q_proj": (256, 256),
    "self_attn.k_proj": (128, 256),
    "self_attn.v_proj": (128, 256),
    "self_attn.o_proj": (256, 256),
    "mlp.gate_proj": (256, 256),
    "mlp.up_proj": (256, 256),
    "mlp.down_proj": (256, 256),
}
NORMS = ("model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm", "model.norm")


def checkpoint(seed: int) -> dict[str, torch.Tensor]:
    """FP8 in blocks, with scales of the cache, under the names of a published checkpoint."""
    random = torch.Generator(device="cpu").manual_seed(seed)
    found = {
        "model.embed_tokens.weight": torch.randn(VOCABULARY, SIZE, generator=random).bfloat16(),
        "lm_head.weight": torch.randn(VOCABULARY, SIZE, generator=random).bfloat16(),
    }
    found |= {f"{name}.weight": torch.randn(SIZE, generator=random).bfloat16() for name in NORMS}
    for projection, (rows, columns) in PROJECTIONS.items():
        name = f"model.layers.0.{projection}"
        weight = torch.randn(rows, columns, generator=random, dtype=torch.float32) * 40
        found[f"{name}.weight"] = weight.to(torch.float8_e4m3fn)
        found[f"{name}.weight_scale_inv"] = torch.rand(rows // 128, columns // 128, generator=random)
    return found | {f"model.layers.0.self_attn.{x}_scale": torch.rand(1, generator=random)[0] for x in "kv"}


class Worker:
    """What the sink uses of vLLM's worker."""

    def __init__(self, vllm: Vllm) -> None:
        from vllm.config import VllmConfig, set_current_vllm_config
        from vllm.model_executor.models.llama import LlamaForCausalLM

        described = transformers.LlamaConfig(
            hidden_size=SIZE,
            intermediate_size=SIZE,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCABULARY,
        )
        self.model_config: Any = types.SimpleNamespace(
            hf_config=described,
            hf_text_config=described,
            dtype=torch.bfloat16,
            quantization="fp8",
            max_model_len=64,
            is_encoder_decoder=False,
            is_mm_prefix_lm=False,
            use_mla=False,
            model="llama",
        )
        self.vllm_config: Any = VllmConfig()
        self.vllm_config.quant_config = vllm.fp8.Fp8Config(True, "dynamic", weight_block_size=[128, 128])
        self.vllm_config.model_config = self.model_config
        self.rank, self.device = 0, torch.device("cpu")
        with set_current_vllm_config(self.vllm_config):
            self.model = LlamaForCausalLM(vllm_config=self.vllm_config)
        for layer in self.model.modules():
            if hasattr(layer, "kv_cache_dtype"):
                layer.kv_cache_dtype = "fp8"
        self.model_runner = types.SimpleNamespace(get_model=lambda: self.model)
        self.model.model.norm.quant_method = moving_method()

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """As vLLM starts."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.utils import process_weights_after_loading

        with set_current_vllm_config(self.vllm_config):
            self.model.load_weights(tensors.items())
            process_weights_after_loading(self.model, self.model_config, self.device)


def moving_method() -> object:
    """Stands for unquantised experts on GPUs, some of which are in other memory after every processing."""
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

    class UnquantizedAndMoving(QuantizeMethodBase):
        def create_weights(self, layer: torch.nn.Module, *args: object, **kwargs: object) -> None: ...

        def apply(self, layer: torch.nn.Module, *args: object, **kwargs: object) -> None: ...

        def process_weights_after_loading(self, layer: Any) -> None:
            layer.weight.data = layer.weight.data.clone()

    return UnquantizedAndMoving()


def update(vllm: Vllm) -> str:
    """What is wrong after updates that succeed, are cut off, and lack a tensor."""
    if not patched.is_needed():
        return "the plugin takes this vLLM for a newer one"
    worker, expected = Worker(vllm), {}
    for seed in (1, 2):
        fresh = Worker(vllm)
        fresh.load(checkpoint(seed))
        expected[seed] = state(fresh.model)
    worker.load(checkpoint(1))
    before = addresses(worker.model)
    sink, wrong = patched.PatchedSink(worker), []

    def compare(what: str, seed: int, *, dirty: bool = False) -> None:
        wrong.extend(f"{what}: {text}" for text in differences(state(worker.model), expected[seed]))
        wrong.extend([f"{what}: dirty is {sink.dirty}"] if sink.dirty is not dirty else [])

    if not differences(expected[1], expected[2]):
        return "the two checkpoints are the same"
    bring(sink, checkpoint(2))
    compare("an update", 2)
    announce(sink, checkpoint(1))
    wrong += [] if sink.abort() else ["given up before anything came: the weights are said to be others"]
    compare("given up before anything came", 2)
    announce(sink, checkpoint(1))
    for bucket in list(buckets(checkpoint(1)))[:2]:
        sink.load(bucket)
    wrong += ["given up half-way: the weights are said to be the old ones"] if sink.abort() else []
    for missing in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
        some = {name: tensor for name, tensor in checkpoint(1).items() if name != missing}
        try:
            bring(sink, some)
            wrong.append(f"without {missing}: no error")
        except WeightsRejectedError as error:
            wrong += [] if "weight" in str(error) else [str(error)]
            sink.abort()
        wrong += [] if sink.dirty else [f"without {missing}: not dirty"]
    bring(sink, checkpoint(1))
    compare("healed", 1)
    wrong += [f"{name} has moved" for name, at in addresses(worker.model).items() if at != before.get(name)]
    return "; ".join(wrong) or refusals(worker, sink)


def refusals(worker: Worker, sink: patched.PatchedSink) -> str:
    """What is wrong with the refusals of what this vLLM cannot do."""
    layer: Any = worker.model.model.layers[0].mlp.down_proj
    from vllm import __version__ as version

    kept, wrong = vars(layer).pop(patched.STATE), []
    if "down_proj" not in refusal(sink):
        wrong.append("a layer that cannot be loaded again was accepted")
    vars(layer)[patched.STATE] = kept
    worker.model.lora_manager = object()
    if "LoRA" not in refusal(sink):
        wrong.append("layers wrapped for LoRA were accepted")
    del worker.model.lora_manager
    worker.vllm_config = types.SimpleNamespace(
        quant_config=types.SimpleNamespace(is_checkpoint_fp8_serialized=False),
        parallel_config=types.SimpleNamespace(tensor_parallel_size=2),
    )
    if ("only half" in refusal(sink)) is not version.startswith("0.13."):
        wrong.append(f"quantised by {version} for two workers: {refusal(sink) or 'accepted'}")
    return "; ".join(wrong)


def refusal(sink: patched.PatchedSink) -> str:
    try:
        announce(sink, checkpoint(1))
    except MissingDependencyError as error:
        return str(error)
    sink.abort()
    return ""


def bring(sink: patched.PatchedSink, tensors: dict[str, torch.Tensor]) -> None:
    announce(sink, tensors)
    for bucket in buckets(tensors):
        sink.load(bucket)
        for _, tensor in bucket:
            tensor.view(torch.uint8).fill_(0x55) if tensor.dim() else tensor.fill_(7)  # memory is used again
    sink.finish()


def announce(sink: patched.PatchedSink, tensors: dict[str, torch.Tensor]) -> None:
    specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    sink.begin(Update(id="1", checkpoint="x", version="2", tensors=specs))


def buckets(tensors: dict[str, torch.Tensor]) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Five tensors each; layers lie across their ends."""
    pairs = list(tensors.items())
    for start in range(0, len(pairs), 5):
        yield pairs[start : start + 5]
