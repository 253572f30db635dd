"""The worker extension, and hashes of everything that a worker computes with."""

from __future__ import annotations

import hashlib
import time
from typing import Any

import torch

from checkpoint_engine.contract.sink import Update
from checkpoint_engine.receiver.cache import process_cache
from checkpoint_engine.receiver.deliveries import view_bucket
from checkpoint_engine_vllm import WorkerExtension, compat
from checkpoint_engine_vllm.extension import state_of


class ChecksumExtension(WorkerExtension):
    """For checks on GPUs, where parameters hold all there is (on the CPU, vLLM packs them away)."""

    def checkpoint_engine_checksum(self: Any) -> dict[str, str]:
        """SHA-256 of the target's and the draft's parameters and of what attention derives, a module each."""
        result: dict[str, str] = {}
        for kind, model in (("", compat.target_model(self)), ("draft ", compat.draft_model(self))):
            for name, module in () if model is None else model.named_modules():
                if digest := _digest(module):
                    result[f"{kind}{name}"] = digest
        return result

    def checkpoint_engine_addresses(self: Any) -> dict[str, int]:
        """Where each parameter lies, which captured CUDA graphs have by heart."""
        return {name: parameter.data_ptr() for name, parameter in compat.target_model(self).named_parameters()}

    def checkpoint_engine_kernels(self: Any) -> list[str]:
        """What the layers' quantisation methods and backends are called."""
        found: set[str] = set()
        for module in compat.target_model(self).modules():
            method = getattr(module, "quant_method", None)
            for thing in (method, getattr(module, "scheme", None), getattr(module, "impl", None)):
                if thing is None or "Unquantized" in type(thing).__name__:
                    continue
                kernel = getattr(thing, "kernel", None) or getattr(thing, "fp8_linear", None)
                backend = next((getattr(thing, n) for n in vars(thing) if n.endswith("_backend")), None)
                parts = [type(thing).__name__, kernel and type(kernel).__name__, backend and str(backend)]
                found.add(" ".join(part for part in parts if part))
        return sorted(found)

    def checkpoint_engine_memory(self: Any) -> tuple[int, int]:
        """Free and total bytes of this worker's GPU."""
        return torch.cuda.mem_get_info()

    def checkpoint_engine_bits(self: Any) -> int:
        """The sum of all parameters' 16-bit patterns, which neither fusing nor transposing 16-bit weights changes."""
        parameters = compat.target_model(self).parameters()
        return sum(int(each.data.reshape(-1).view(torch.int16).sum(dtype=torch.int64)) for each in parameters)

    def checkpoint_engine_takeover(self: Any) -> dict[str, float]:
        """Seconds that buckets of the last layout take once they lie on the GPU; leaves nonsense as weights."""
        adapter, layout = state_of(self).sink, list(process_cache().layouts.snapshot().values())[-1]
        memory = torch.zeros(max(bucket.end for bucket in layout.buckets), dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        times = [time.perf_counter()]
        adapter.begin(Update("takeover", "takeover", "takeover", layout.tensors, "auto"))
        times.append(time.perf_counter())
        for bucket in layout.buckets:
            adapter.load(view_bucket(memory, bucket, 0))
            torch.cuda.current_stream().synchronize()
        times.append(time.perf_counter())
        adapter.finish()
        torch.cuda.synchronize()
        times.append(time.perf_counter())
        steps = zip(("begin", "load", "finish"), times, times[1:], strict=False)
        return {"buckets": len(layout.buckets), **{step: end - begin for step, begin, end in steps}}


def _digest(module: torch.nn.Module) -> str:
    held = dict(module.named_parameters(recurse=False))
    if compat.is_attention(module):
        held |= {name: value for name, value in _derived(module).items() if isinstance(value, torch.Tensor)}
    digest = hashlib.sha256()
    for name, tensor in sorted(held.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest() if held else ""


def _derived(attention: torch.nn.Module) -> dict[str, Any]:
    """Scales, and what an attention layer makes of other layers' weights."""
    held = {**vars(attention), **dict(attention.named_buffers(recurse=False))}
    # Where the cache is not quantised, a start with dummy weights leaves nonsense in scales that nothing reads.
    quantised = str(getattr(attention, "kv_cache_dtype", "")).startswith("fp8")
    return {name: held[name] for name in held if name.startswith("W_") or (quantised and name.endswith("_scale"))}
