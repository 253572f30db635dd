"""Engine and trainer as Ray actors: vLLM in one, a trainer's ranks in others; every step is published and served.

    python examples/ray_actors.py MODEL

Ray carries the request and nothing else: actors of one host share `/tmp`, and weights go from process to process. It
runs on the CPU; on GPUs, place a trainer's rank on the GPU of the engine's worker that it feeds. It needs ray, vLLM and
transformers in one environment. MODEL is a directory with a small model.
"""

from __future__ import annotations

import argparse
import os
import socket
from typing import Any

import ray
import torch

PROMPT = "The capital of France is"
TIMEOUT = 120.0


@ray.remote
class Engine:
    """vLLM, offline; `vllm serve` and Ray's own servers of it take the same worker method."""

    def __init__(self, model: str, workers: int) -> None:
        from vllm import LLM

        self.llm = LLM(
            model=model, load_format="dummy", tensor_parallel_size=workers, max_model_len=128, enforce_eager=True
        )

    def update(self, handles: dict[str, str]) -> list[dict[str, Any]]:
        """Has every worker take the update that is offered to it."""
        reports = self.llm.collective_rpc("checkpoint_engine_update", kwargs={"handles": handles, "timeout": TIMEOUT})
        self.llm.reset_prefix_cache()
        return reports

    def say(self, tokens: int = 12) -> str:
        """An answer."""
        from vllm import SamplingParams

        how = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        return self.llm.generate(PROMPT, how, use_tqdm=False)[0].outputs[0].text


@ray.remote
class Trainer:
    """One rank: it trains nothing here, but changes its weights, of which it holds the rows that FSDP would give it."""

    def __init__(self, model: str, rank: int, ranks: int, port: int, engine: Any) -> None:
        from transformers import AutoModelForCausalLM

        from checkpoint_engine.ps import ParameterServer

        self.rank, self.ranks, self.engine = rank, ranks, engine
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        self.ps = ParameterServer(rank=rank, world_size=ranks, master_addr="127.0.0.1", master_port=port, device="cpu")

    def step(self, number: int) -> tuple[float, bool]:
        """Changes all weights, alike on all ranks, and publishes this rank's part of them.

        Returns the seconds that took, and whether every parameter of this rank's worker is as it should be.
        """
        from checkpoint_engine import TensorShard

        generator = torch.Generator().manual_seed(number)
        shards = {}
        for name, tensor in self.model.state_dict().items():
            tensor.add_(torch.randn(tensor.shape, generator=generator).to(tensor.dtype) * 0.02)
            rows = -(-tensor.shape[0] // self.ranks)
            part = tensor[self.rank * rows : (self.rank + 1) * rows]
            if part.numel():
                shards[name] = TensorShard(part, tensor.shape, (self.rank * rows, *([0] * (tensor.dim() - 1))))

        def ask(handles: list[tuple[str, str]]) -> None:
            if self.rank == 0:
                reports = ray.get(self.engine.update.remote(dict(handles)), timeout=TIMEOUT)
                failed = [report["error"] for report in reports if not report["ok"]]
                if failed:
                    raise RuntimeError(failed[0])

        self.ps.publish(shards, ask, version=f"step-{number}", in_place=False)
        seconds = self.ps.last_report.seconds["total"] if self.ps.last_report else 0.0
        return seconds, self.ps.verify("published", ask).equal


def main() -> None:
    """Starts the actors and lets them go a few steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1, help="tensor-parallel, and as many trainers")
    options = parser.parse_args()
    ray.init(num_cpus=2 * options.workers + 1, include_dashboard=False, log_to_driver=False)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    engine = Engine.options(runtime_env={"env_vars": dict(os.environ)}).remote(options.model, options.workers)
    trainers = [Trainer.remote(options.model, rank, options.workers, port, engine) for rank in range(options.workers)]
    print(f"start: {ray.get(engine.say.remote())!r}", flush=True)
    for number in range(options.steps):
        done = ray.get([trainer.step.remote(number) for trainer in trainers])
        seconds, equal = max(seconds for seconds, _ in done), all(equal for _, equal in done)
        print(f"step {number}: {ray.get(engine.say.remote())!r}, {equal=}, after {seconds:.2f} s", flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main()
