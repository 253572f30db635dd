"""Runs in the environment of frameworks: verl's real manager, Ray, workers and rollout, and real vLLM, on the CPU.

verl_loop.py CHECKPOINT...: each in turn is what the trainer has after a step; the last two go the colocated way.
Prints JSON: whether every parameter of every replica is as after a cold start. Stand-ins: the trainer, which reads its
weights from files, and the actor around vLLM, which has those methods of verl's own that this needs (verl's starts on
GPUs only).
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from verl.checkpoint_engine import CheckpointEngineManager, CheckpointEngineRegistry, CheckpointEngineWorker
from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Dispatch, register
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.distributed import initialize_global_process_group_ray
from verl.workers.config import CheckpointEngineConfig
from verl.workers.rollout import get_rollout_class

TRAINERS, REPLICAS = 2, 2
OPTIONS = {"device": "cpu", "timeout": 300}
ENGINE = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}
TESTS = str(Path(__file__).parents[2])


class Trainer(Worker):
    """As verl's worker of the actor: it has the two methods that the manager calls."""

    def __init__(self, checkpoints: list[str]) -> None:
        super().__init__()
        self.checkpoints = checkpoints
        self.rollout: Any = None
        self.engine = CheckpointEngineRegistry.new(
            "checkpoint_engine", is_master=self.rank == 0, bucket_size=2 << 30, **OPTIONS
        )

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    async def update_weights(self, global_steps: int | None = None, mode: str = "auto") -> dict[str, float]:
        return await self.engine.send_weights(self.weights_of(global_steps), global_steps=global_steps)

    def weights_of(self, step: int) -> Iterator[tuple[str, torch.Tensor]]:
        for file in sorted(Path(self.checkpoints[step]).glob("*.safetensors")):
            yield from load_file(file).items()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    async def update_colocated(self, config: Any, model: Any, step: int) -> None:
        """As verl does where trainer and rollout are one process: there is no backend then."""
        if self.rollout is None:
            initialize_global_process_group_ray(timeout_second=None, backend="cpu:gloo")
            self.rollout = get_rollout_class("vllm")(config=config, model_config=model, device_mesh=None)
        await self.rollout.update_weights(
            self.weights_of(step), peft_config=None, base_sync_done=True, global_steps=step
        )

    @register(dispatch_mode=Dispatch.DP_COMPUTE, blocking=False)
    def execute_checkpoint_engine(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.engine, method)(*args, **kwargs)


@ray.remote
class VllmServer:
    """Real vLLM in the place of verl's server."""

    def __init__(self, model: str, load_format: str) -> None:
        from vllm import LLM
        from vllm.v1.executor.uniproc_executor import UniProcExecutor

        self.llm = LLM(
            model=model,
            load_format=load_format,
            worker_extension_cls="verl.workers.rollout.vllm_rollout.utils.vLLMColocateWorkerExtension",
            enforce_eager=True,
            max_model_len=128,
            max_num_seqs=4,
            dtype="bfloat16",
            kv_cache_memory_bytes=64 << 20,
            distributed_executor_backend=UniProcExecutor,
        )
        self.steps: list[int] = []
        self.cleared = 0

    def collective_rpc(
        self, method: str, timeout: float | None = None, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> None:
        self.llm.collective_rpc(method, timeout, args, kwargs)

    def clear_kv_cache(self) -> None:
        self.cleared += 1

    def set_global_steps(self, steps: int) -> None:
        self.steps.append(steps)

    def told(self) -> dict[str, Any]:
        status = self.llm.collective_rpc("checkpoint_engine_status")[0]
        return {
            "steps": self.steps,
            "cleared": self.cleared,
            "version": status["version"],
            "way": status["last_update"]["reload"],
        }

    def digests(self) -> dict[str, str]:
        sys.path.insert(0, TESTS)
        from tests.oracle.digest import digest

        worker = self.llm.llm_engine.model_executor.driver_worker.worker
        return {name: digest(tensor) for name, tensor in worker.model_runner.get_model().named_parameters()}


class Replica:
    """As verl's: its workers, and its server, whose pauses are not what is tested."""

    def __init__(self, workers: list[Any]) -> None:
        self.workers = workers

    async def _nothing(self, **_: Any) -> None:
        await asyncio.sleep(0)

    abort_all_requests = resume_generation = release_kv_cache = resume_kv_cache = _nothing


def rollout_config(**options: Any) -> Any:
    return omega_conf_to_dataclass(
        OmegaConf.create(
            {
                "_target_": "verl.workers.config.RolloutConfig",
                "name": "vllm",
                "mode": "async",
                "tensor_model_parallel_size": 1,
                "checkpoint_engine": {
                    "_target_": "verl.workers.config.CheckpointEngineConfig",
                    "backend": "checkpoint_engine",
                    "engine_kwargs": {"checkpoint_engine": OPTIONS | options},
                },
            }
        )
    )


def group(cls: type, size: int, prefix: str, **arguments: Any) -> RayWorkerGroup:
    pool = RayResourcePool([size], use_gpu=False, max_colocate_count=1)
    made = RayClassWithInitArgs(cls=ray.remote(cls), **arguments)
    return RayWorkerGroup(
        resource_pool=pool, ray_cls_with_init=made, bin_pack=False, name_prefix=prefix, use_gpu=False, device_name="cpu"
    )


def main() -> None:
    checkpoints = sys.argv[1:]
    ray.init(
        num_cpus=8, include_dashboard=False, log_to_driver=True, runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}}
    )
    model = OmegaConf.create({"_target_": "verl.workers.config.HFModelConfig", "path": checkpoints[0]})
    servers = []
    for replica in range(REPLICAS):
        options = {"name": f"vllm_server_{replica}_0", "num_cpus": 0, "runtime_env": {"env_vars": ENGINE}}
        servers.append(VllmServer.options(**options).remote(checkpoints[0], "dummy"))
    trainers = group(Trainer, TRAINERS, "trainer", checkpoints=checkpoints)
    rollouts = [
        group(
            CheckpointEngineWorker,
            1,
            f"rollout{replica}",
            rollout_config=rollout_config(),
            model_config=model,
            replica_rank=replica,
        )
        for replica in range(REPLICAS)
    ]
    config = CheckpointEngineConfig(backend="checkpoint_engine", engine_kwargs={"checkpoint_engine": OPTIONS})
    manager = CheckpointEngineManager(config, trainers, [Replica(each.workers) for each in rollouts])
    served, metrics = [], []
    for step in range(len(checkpoints)):
        if step < len(checkpoints) - 2:
            metrics.append(manager.update_weights(global_steps=step))
        else:
            trainers.update_colocated(rollout_config(colocated=True), omega_conf_to_dataclass(model), step)
        served.append(ray.get([server.digests.remote() for server in servers]))
    told = ray.get([server.told.remote() for server in servers])
    for server in servers:
        ray.kill(server)
    cold = []
    for checkpoint in dict.fromkeys(checkpoints):
        server = VllmServer.options(num_cpus=0, runtime_env={"env_vars": ENGINE}).remote(checkpoint, "auto")
        cold.append((checkpoint, ray.get(server.digests.remote())))
        ray.kill(server)
    known = dict(cold)
    equal = [[found == known[name] for found in each] for name, each in zip(checkpoints, served, strict=True)]
    differ = known[checkpoints[0]] != known[checkpoints[1]]
    kimi = str(CheckpointEngineRegistry._import_errors["kimi_checkpoint_engine"])
    result = {"equal": equal, "differ": differ, "told": told, "metrics": metrics, "kimi": kimi}
    print("RESULT " + json.dumps(result))
    ray.shutdown()


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    main()
