"""Runs in vLLM's environment: one real vLLM engine in this process, driven by lines of JSON.

Reads {"do": ..., ...} from stdin and answers each with a line on the descriptor given as the only argument. It feeds
`VllmAdapter` directly: buckets in one block of memory that is overwritten after every `load`, which is what a sender
is allowed to do, and faults at will.
"""

from __future__ import annotations

import gc
import glob
import json
import os
import sys
from typing import Any

import torch
from checkpoint_engine.engine.adapter import TensorSpec, Update
from safetensors import safe_open
from vllm import LLM, SamplingParams

from checkpoint_engine_vllm import compat
from checkpoint_engine_vllm.adapter import VllmAdapter

PROMPTS = ["Hello, my name is", "The capital of France is", "The quick brown fox"]


class Engine:
    """The engine that was started last, and its adapter."""

    def __init__(self) -> None:
        self.llm: Any = None
        self.adapter: Any = None

    def start(self, model: str, load_format: str = "auto", **options: Any) -> dict[str, Any]:
        self.stop()
        self.llm = LLM(
            model=model, load_format=load_format, enforce_eager=True, max_model_len=128, max_num_seqs=4, dtype="bfloat16",
            kv_cache_memory_bytes=64 << 20, distributed_executor_backend="uni", disable_log_stats=False, **options,
        )  # fmt: skip
        self.adapter = VllmAdapter(self.worker)
        return {"draft": compat.draft_model(self.worker) is not None}

    @property
    def worker(self) -> Any:
        return self.llm.llm_engine.model_executor.driver_worker.worker

    def stop(self) -> dict[str, Any]:
        if self.llm is not None:
            from vllm.distributed import cleanup_dist_env_and_memory

            self.adapter = None
            self.llm.llm_engine.engine_core.shutdown()
            self.llm = None
            cleanup_dist_env_and_memory()
            gc.collect()
        return {}

    def tokens(self, length: int = 16) -> dict[str, Any]:
        self.llm.reset_prefix_cache()
        outputs = self.llm.generate(
            PROMPTS, SamplingParams(temperature=0, max_tokens=length, ignore_eos=True), use_tqdm=False
        )
        return {"tokens": [list(output.outputs[0].token_ids) for output in outputs]}

    def accepted(self) -> dict[str, Any]:
        """Of the draft model's tokens, the share that the served model accepted so far."""
        values = {
            m.name: getattr(m, "value", 0) for m in self.llm.get_metrics() if m.name.startswith("vllm:spec_decode")
        }
        return {name.rpartition("spec_decode_")[2]: value for name, value in values.items()}

    def update(self, checkpoint: str, **how: Any) -> dict[str, Any]:
        tensors = read(checkpoint)
        for old, new in how.get("rename", {}).items():
            tensors[new] = tensors.pop(old)
        for name in how.get("drop", ()):
            del tensors[name]
        for name in how.get("cut", ()):
            tensors[name] = tensors[name][:-1].contiguous()
        for name in how.get("double", ()):
            tensors[name] = torch.cat([tensors[name], tensors[name]])
        specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        model = compat.target_model(self.worker)
        undo = break_after(model, how["fail_after"]) if "fail_after" in how else None
        try:
            self.adapter.begin(Update("id", "test", how.get("version", checkpoint), specs))
            for bucket in buckets(tensors, how.get("bucket_bytes", 100_000)):
                self.adapter.load(views(bucket))
                SCRATCH.fill_(0x41)
            details = dict(self.adapter.finish())
        except Exception as error:  # noqa: BLE001 - reported to the test
            intact = self.adapter.abort()
            return {"error": type(error).__name__, "message": str(error), "intact": intact, "dirty": self.adapter.dirty}
        finally:
            if undo:
                undo()
        return {"error": None, "dirty": self.adapter.dirty, "version": self.adapter.version, "details": details}

    def state(self) -> dict[str, Any]:
        """What must not change across updates: addresses; and what must not be left behind: meta tensors."""
        model = compat.target_model(self.worker)
        return {
            "addresses": {name: p.data_ptr() for name, p in model.named_parameters()},
            "meta": [name for name, p in model.named_parameters() if p.is_meta],
        }


SCRATCH = torch.empty(8 << 20, dtype=torch.uint8)


def read(checkpoint: str) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(glob.glob(checkpoint + "/*.safetensors")):
        with safe_open(file, "pt") as opened:
            found.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118 - not a mapping
    return found


def buckets(tensors: dict[str, torch.Tensor], size: int) -> list[list[tuple[str, torch.Tensor]]]:
    result: list[list[tuple[str, torch.Tensor]]] = [[]]
    filled = 0
    for pair in tensors.items():
        if filled and filled + pair[1].nbytes > size:
            result.append([])
            filled = 0
        result[-1].append(pair)
        filled += pair[1].nbytes
    return result


def views(bucket: list[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
    result, offset = [], 0
    for name, tensor in bucket:
        raw = tensor.contiguous().reshape(-1).view(torch.uint8)
        place = SCRATCH[offset : offset + raw.numel()]
        place.copy_(raw)
        result.append((name, place.view(tensor.dtype).view(tensor.shape)))
        offset += -(-raw.numel() // 256) * 256
    return result


def break_after(model: Any, tensors: int) -> Any:
    """Makes the model's loader raise when it has taken that many tensors; returns what mends it."""
    original, taken = model.load_weights, [0]

    def counted(weights: Any) -> Any:
        for pair in weights:
            if taken[0] >= tensors:
                raise RuntimeError("a fault made by the test")
            taken[0] += 1
            yield pair

    model.load_weights = lambda weights: original(counted(weights))
    return lambda: delattr(model, "load_weights")


def main() -> None:
    answers = os.fdopen(int(sys.argv[1]), "w")
    engine = Engine()
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(engine, request.pop("do"))(**request)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
