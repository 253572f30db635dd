"""How SGLang's objects are asked, where versions differ in it; decided by what they have rather than by number."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import re
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch

from checkpoint_engine.sdk import Device, MissingDependencyError, open_device
from checkpoint_engine_sglang.installation import version

__all__ = [
    "Position",
    "Runner",
    "answer_type",
    "cannot_flush",
    "cannot_update",
    "derive",
    "deriving_modules",
    "describe_runner",
    "device_of",
    "expert_placement",
    "finds_scales",
    "forget_parameters",
    "grpc_option",
    "is_paused",
    "is_reloading_by_itself",
    "is_starting",
    "is_unquantised",
    "kept_tensors",
    "loader_of",
    "loading_context",
    "named_modules",
    "observe_weight_load",
    "own_tensor",
    "position_of",
    "processed_modules",
    "processes_weights",
    "processing_of",
    "request_type",
    "retracted_set_aside",
    "scheduler_of",
    "select_runners",
    "send_answer",
    "server_args",
    "set_paused",
    "tensors_of",
    "weight_version",
    "world_group",
]

_MANAGERS = "sglang.srt.managers"


@dataclass(frozen=True)
class Runner:
    """One model of a worker, that which is served or a draft."""

    role: str
    model: torch.nn.Module
    config: Any
    """SGLang's ModelConfig."""
    device: torch.device
    has_graphs: bool = False
    """Whether CUDA graphs were captured, which go on reading the weights where they were."""

    @property
    def path(self) -> str:
        """Where its checkpoint lies."""
        return str(getattr(self.config, "model_path", ""))

    @property
    def hf_config(self) -> Any:  # noqa: ANN401 - as the model has it
        """The model's own configuration."""
        return getattr(self.config, "hf_config", None)


@dataclass(frozen=True)
class Position:
    """A worker among all workers of the server."""

    rank: int
    """Among the workers of its replica: tensor-parallel ranks of the first pipeline stage, then of the next."""
    world_size: int
    """Workers of its replica."""
    tensor_parallel_size: int
    stage: int
    stages: int
    replica: int
    replicas: int

    @property
    def overall(self) -> int:
        """Rank among the workers of all replicas."""
        return self.replica * self.world_size + self.rank


def scheduler_of(manager: Any) -> Any:  # noqa: ANN401 - SGLang's own objects
    """The scheduler that a weight updater works for; before 0.5.14 it is the scheduler itself."""
    if hasattr(manager, "running_batch"):
        return manager
    return getattr(manager, "scheduler", None) or getattr(manager.flush_cache, "__self__", None)


def is_starting(manager: Any) -> bool:  # noqa: ANN401 - SGLang's tokenizer manager
    """Whether SGLang has not run its first request, of its own, yet."""
    return getattr(getattr(manager, "server_status", None), "name", "") == "Starting"


def observe_weight_load(manager: Any, seconds: float) -> None:  # noqa: ANN401
    """Sets SGLang's own `weight_load_duration_seconds`, where it has one and metrics are on."""
    observe = getattr(getattr(manager, "metrics_collector", None), "observe_weight_load", None)
    if observe is not None:
        observe(seconds, "ipc")


def weight_version(manager: Any) -> str | None:  # noqa: ANN401 - SGLang's tokenizer manager
    """What SGLang itself calls its weights, in `/model_info` and in answers; None where it keeps no name."""
    value = getattr(manager, "config_value", None)
    found: object = value("weight_version") if callable(value) else manager.server_args.weight_version
    return None if found is None else str(found)


def server_args(manager: Any) -> Any:  # noqa: ANN401
    """What the server was started with."""
    runner = manager.tp_worker.model_runner
    return getattr(runner, "server_args", None) or getattr(scheduler_of(manager), "server_args", None)


def grpc_option(arguments: Any) -> str:  # noqa: ANN401
    """What has SGLang start one of its gRPC servers; empty if it starts none."""
    switched = getattr(arguments, "enable_grpc", None)  # up to 0.5.14, where a port is always chosen
    names = ("smg_grpc_mode", "grpc_mode") if switched is False else ("smg_grpc_mode", "grpc_mode", "grpc_port")
    for name in names:
        if getattr(arguments, name, None):
            return "SGLANG_ENABLE_GRPC" if switched and name == "grpc_port" else f"--{name.replace('_', '-')}"
    return "SGLANG_GRPC_PORT" if switched is None and os.environ.get("SGLANG_GRPC_PORT") else ""


def world_group(manager: Any) -> Any:  # noqa: ANN401
    """Gloo's group of all workers of one replica, in order of rank."""
    del manager
    return importlib.import_module("sglang.srt.distributed.parallel_state").get_world_group().cpu_group


def position_of(manager: Any) -> Position:  # noqa: ANN401
    """Where this worker stands."""
    group = world_group(manager)
    arguments = server_args(manager)
    stages = int(arguments.pp_size)
    rank, world_size = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    within = bool(getattr(arguments, "enable_dp_attention", False))
    return Position(
        rank=rank,
        world_size=world_size,
        tensor_parallel_size=world_size // stages,
        stage=rank // (world_size // stages),
        stages=stages,
        replica=0 if within else _replica_of(manager),
        replicas=1 if within else int(arguments.dp_size),
    )


def _replica_of(manager: Any) -> int:  # noqa: ANN401
    scheduler, runner = scheduler_of(manager), manager.tp_worker.model_runner
    for holder in (scheduler, runner, getattr(scheduler, "ps", None), getattr(runner, "ps", None), _parallel()):
        replica = getattr(holder, "dp_rank", None)
        if replica is not None:
            return int(replica)
    return 0


def _parallel() -> Any:  # noqa: ANN401
    try:
        return importlib.import_module("sglang.srt.runtime_context").get_parallel()
    except (ImportError, AttributeError):  # before 0.5.14
        return None


def device_of(manager: Any, position: Position) -> Device:  # noqa: ANN401
    """The worker's device."""
    device = _torch_device(manager.tp_worker.model_runner)
    return open_device(device.type, index=device.index or 0, rank=position.overall)


def _torch_device(runner: Any) -> torch.device:  # noqa: ANN401
    kind = str(runner.device)
    return torch.device(kind, int(runner.gpu_id)) if kind == "cuda" else torch.device(kind)


def select_runners(manager: Any) -> list[Runner] | None:  # noqa: ANN401
    """The models of a worker, the served one first; None before 0.5.21, which must be asked in another way."""
    select = getattr(manager, "_select_runners", None)
    if select is None:
        return None
    return [describe_runner(role, runner) for role, runner in cast("list[tuple[str, Any]]", select())]


def describe_runner(role: str, owner: Any) -> Runner:  # noqa: ANN401
    """Of a model runner, or of its weight updater."""
    get = getattr(owner, "get_model_runner", None)
    runner = owner if get is None else get()
    device = _torch_device(runner)
    disabled = bool(getattr(getattr(runner, "server_args", None), "disable_cuda_graph", False))
    return Runner(role, runner.model, runner.model_config, device, has_graphs=device.type == "cuda" and not disabled)


def cannot_update(manager: Any, model: torch.nn.Module) -> str:  # noqa: ANN401
    """Why SGLang's own optimisations or state rule an update out now; empty if they do not."""
    mode = getattr(server_args(manager), "weight_cache_mode", "off")
    if mode != "off":
        return f"--weight-cache-mode {mode} shares the weights with other engines; start with `off`"
    backend = getattr(server_args(manager), "elastic_ep_backend", None)
    if backend:
        return (
            f"--elastic-ep-backend {backend} brings back lost experts from the weights of the start, which would be "
            "old after an update; start without it"
        )
    released = getattr(manager, "offload_tags", None) or getattr(scheduler_of(manager), "offload_tags", None) or ()
    if "weights" in released:
        return 'the memory of the weights is released; POST /resume_memory_occupation {"tags": ["weights"]} first'
    updater = _module("sglang.srt.model_executor.model_runner_components.weight_updater")
    find = getattr(updater, "_unsupported_derived_weight_cache_error", None)
    if find is None:
        return ""
    try:
        return find(model) or ""
    except TypeError:  # without the model, before 0.5.22
        return find() or ""


def cannot_flush(manager: Any) -> bool:  # noqa: ANN401
    """Whether requests still hold the cache, so that SGLang would refuse to flush it (or, before 0.5.22, end)."""
    scheduler = scheduler_of(manager)
    if _flushes_while_requests_wait(scheduler):
        return not scheduler.is_fully_idle(ignore_waiting=bool(scheduler._engine_paused))  # noqa: SLF001 - no other way
    with retracted_set_aside(manager):
        return not scheduler.is_fully_idle()


@contextlib.contextmanager
def retracted_set_aside(manager: Any) -> Generator[None]:  # noqa: ANN401
    """Takes what waits in a paused engine and holds no cache out of its sight.

    A pause puts running requests back into the queue. Before 0.5.22, SGLang would not flush its cache for them.
    """
    scheduler = scheduler_of(manager)
    if not is_paused(scheduler) or _flushes_while_requests_wait(scheduler):
        yield
        return
    queue: list[Any] = scheduler.waiting_queue
    scheduler.waiting_queue = [request for request in queue if _holds_cache(request)]
    try:
        yield
    finally:
        scheduler.waiting_queue = queue


def _holds_cache(request: Any) -> bool:  # noqa: ANN401
    owner = getattr(request, "kv", None)  # from 0.5.20 or a little before; the request itself in older ones
    owner = owner if hasattr(owner, "req_pool_idx") else request
    return getattr(owner, "req_pool_idx", -1) is not None


def _flushes_while_requests_wait(scheduler: Any) -> bool:  # noqa: ANN401
    return "ignore_waiting" in inspect.signature(scheduler.is_fully_idle).parameters


def is_paused(scheduler: Any) -> bool:  # noqa: ANN401
    """Whether the scheduler runs no requests until it is told to."""
    return bool(getattr(scheduler, "_engine_paused", False))


def set_paused(scheduler: Any, paused: bool) -> None:  # noqa: ANN401, FBT001
    """Stops the scheduler where it stands, or lets it go on."""
    scheduler._engine_paused = paused  # noqa: SLF001 - pausing through its handler would also retract requests


def send_answer(scheduler: Any, answer: object, request: object) -> None:  # noqa: ANN401
    """Sends a late answer to a request of the server's front."""
    send = getattr(scheduler, "send_control_output", None)  # from 0.5.22
    if send is not None:
        send(answer, request)
        return
    channels = getattr(scheduler, "ipc_channels", scheduler)  # from 0.5.14
    channels.send_to_tokenizer.send_output(answer, request)


def answer_type() -> Any:  # noqa: ANN401
    """What the scheduler answers to a request for an update."""
    return importlib.import_module(f"{_MANAGERS}.io_struct").UpdateWeightsFromIPCReqOutput


def request_type() -> Any:  # noqa: ANN401
    """A request for an update."""
    return importlib.import_module(f"{_MANAGERS}.io_struct").UpdateWeightsFromIPCReqInput


# -- its loader -----------------------------------------------------------------------------------------------------


def loading_context(module: torch.nn.Module, device: torch.device) -> Any:  # noqa: ANN401
    """Brings an offloaded module to its device for as long as its weights are processed."""
    return contextlib.nullcontext() if device.type == "cpu" else _loader().device_loading_context(module, device)


def named_modules(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """All modules of a model by name, each once."""
    yield from cast("Iterator[tuple[str, torch.nn.Module]]", model.named_modules())


def tensors_of(module: torch.nn.Module) -> tuple[dict[str, torch.Tensor | None], dict[str, torch.Tensor | None]]:
    """A module's own parameters and buffers as they are registered, None included."""
    held: dict[str, Any] = vars(module)
    return held["_parameters"], held["_buffers"]


def kept_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A module's own parameters, and those of its buffers that checkpoints may have, too."""
    parameters, buffers = tensors_of(module)
    left_out = cast("set[str]", vars(module)["_non_persistent_buffers_set"])
    held = {**parameters, **{name: tensor for name, tensor in buffers.items() if name not in left_out}}
    return {name: tensor for name, tensor in held.items() if tensor is not None}


def own_tensor(module: torch.nn.Module, name: str) -> torch.Tensor | None:
    """A module's own parameter or buffer."""
    parameters, buffers = tensors_of(module)
    found = parameters.get(name)
    found = buffers.get(name) if found is None else found
    return None if found is None else found.data


def processed_modules(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, Any]]:
    """The layers whose weights SGLang processes after loading, and what does so."""
    for name, module in named_modules(model):
        method = processing_of(module)
        if method is not None:
            yield name, module, method


def processing_of(module: torch.nn.Module) -> Any:  # noqa: ANN401
    """What processes a layer's weights after loading; None if nothing does."""
    method = getattr(module, "quant_method", None)
    return method if processes_weights(method) else None


def processes_weights(held: object) -> bool:
    """Whether this processes weights after loading."""
    return hasattr(held, "process_weights_after_loading") and not isinstance(held, type)


def is_unquantised(method: object) -> bool:
    """Whether a layer computes with the weights as they come."""
    return type(method).__name__.startswith("Unquantized")


def finds_scales(layer: torch.nn.Module) -> bool:
    """Whether a layer's scales are computed from its weights: SGLang quantises a checkpoint that is not."""
    config = getattr(getattr(layer, "quant_method", None), "quant_config", None)
    return getattr(config, "is_checkpoint_fp8_serialized", None) is False


def deriving_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """What derives something from the weights once all are loaded: mostly the model, else the models that it holds."""
    found: dict[str, torch.nn.Module] = {}
    for name, module in named_modules(model):
        inside = any(not outer or name.startswith(f"{outer}.") for outer in found)
        if hasattr(module, "post_load_weights") and not inside:
            found[name] = module
    return list(found.values())


def derive(module: torch.nn.Module, config: Any) -> None:  # noqa: ANN401
    """Has one of them do so."""
    shared = getattr(_module("sglang.srt.model_loader.utils"), "post_load_weights", None)
    if shared is None:
        cast("Any", module).post_load_weights()
    else:
        shared(module, config)  # before 0.5.14, where only this knows which models are drafts


def expert_placement() -> list[list[int]] | None:
    """Which expert lies in which slot of each layer, by which loaders go; None where experts are not moved about.

    SGLang changes the table in place when it rebalances experts (`--enable-eplb`).
    """
    get = getattr(_module("sglang.srt.eplb.expert_location"), "get_global_expert_location_metadata", None)
    table = None if get is None else get()
    if table is None:
        return None
    held = getattr(table, "physical_to_logical_map_cpu", None)
    held = table.physical_to_logical_map if held is None else held
    return cast("list[list[int]]", held.tolist())


def loader_of(model: torch.nn.Module) -> Callable[[Iterable[tuple[str, torch.Tensor]]], object]:
    """The model's loader, given what SGLang gives it at a start."""
    load = cast("Any", model).load_weights
    config = getattr(model, "quant_config", None)
    if config is None or config.get_name() != "mxfp8":
        return load
    # Its layers call scales as those in blocks are called, whatever checkpoints do.
    return lambda tensors: load((re.sub(r"\.weight_scale$", ".weight_scale_inv", name), each) for name, each in tensors)


def forget_parameters(model: torch.nn.Module) -> None:
    """A few models keep a list of their parameters from their first load on."""
    vars(model).pop("_cached_params_dict", None)


def is_reloading_by_itself(model: torch.nn.Module) -> bool:
    """Whether the model was started with `--load-format flash_rl`, which quantises within its own loader."""
    loader = getattr(_module("sglang.srt.model_loader.loader"), "QuantizedRLModelLoader", None)
    return loader is not None and bool(loader.is_reload_scenario(model))


def _loader() -> Any:  # noqa: ANN401
    try:
        return importlib.import_module("sglang.srt.model_loader.loader")
    except ImportError as error:
        raise MissingDependencyError(f"this SGLang ({version()}) has no model loader that is known: {error}") from error


def _module(name: str) -> Any:  # noqa: ANN401
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
