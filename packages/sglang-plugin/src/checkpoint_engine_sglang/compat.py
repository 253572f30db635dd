"""What differs between versions of SGLang: where its hooks are, and how its objects are asked.

Every place in SGLang that the plugin touches is named in this file, once for each version that has it elsewhere.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal, cast

import torch

from checkpoint_engine.device import Device, open_device
from checkpoint_engine.errors import MissingDependencyError

OLDEST_WITH_PLUGINS = (0, 5, 11)
NEWEST_KNOWN = (0, 5, 23)

_MANAGERS = "sglang.srt.managers"
_UPDATER = "sglang.srt.managers.scheduler_components.weight_updater"
_RUNNERS = "sglang.srt.model_executor"


@dataclass(frozen=True)
class Place:
    """One of SGLang's own functions that the plugin changes, and where versions keep it, newest first."""

    name: str
    targets: tuple[str, ...]
    without_it: str
    """What does not work where none of the targets is there."""


PLACES = (
    Place(
        "alias",
        ("sglang.srt.server_args.ServerArgs.add_cli_args",),
        "the flag is only known as --checkpoint-engine-wait-weights-before-ready",
    ),
    Place(
        "settings",
        ("sglang.srt.server_args.ServerArgs.check_server_args",),
        "settings under which the server could not be closed are not refused",
    ),
    Place(
        "front",
        (f"{_MANAGERS}.tokenizer_manager.TokenizerManager.init_weight_update",),
        "no routes of ours, and nothing closes the server while it lacks weights",
    ),
    Place(
        "request",
        (
            f"{_MANAGERS}.tokenizer_control_mixin.TokenizerControlMixin.update_weights_from_ipc",  # from 0.5.11
            f"{_MANAGERS}.tokenizer_communicator_mixin.TokenizerCommunicatorMixin.update_weights_from_ipc",
        ),
        "updates asked for by /update_weights_from_ipc reach one data-parallel replica only",
    ),
    Place(
        "workers",
        (
            f"{_UPDATER}.SchedulerWeightUpdaterManager.update_weights_from_ipc",  # from 0.5.14
            f"{_MANAGERS}.scheduler_update_weights_mixin.SchedulerUpdateWeightsMixin.update_weights_from_ipc",
        ),
        "workers cannot be updated",
    ),
    Place(
        "runner",
        (
            f"{_RUNNERS}.model_runner_components.weight_updater.WeightUpdater.update_weights_from_ipc",  # from 0.5.16
            f"{_RUNNERS}.model_runner.ModelRunner.update_weights_from_ipc",
        ),
        "workers cannot be updated",
    ),
    Place(
        "stages",
        (f"{_MANAGERS}.scheduler_pp_mixin.SchedulerPPMixin._pp_send_pyobj_to_next_stage",),
        "engines with pipeline stages cannot be updated",
    ),
    Place(
        "resume",
        (f"{_MANAGERS}.scheduler.Scheduler.continue_generation",),
        "an engine whose weights are a mixture runs again when it is told to continue",
    ),
)


@dataclass(frozen=True)
class Found:
    """Where a place is in the installed SGLang; `problem` says why nowhere."""

    place: Place
    target: str = ""
    problem: str = ""


def find_places(places: Sequence[Place] = PLACES) -> list[Found]:
    """Looks for each place in the installed SGLang. Imports a good part of it."""
    return [_find(place) for place in places]


def _find(place: Place) -> Found:
    reasons: list[str] = []
    for target in place.targets:
        reason = _why_not(target)
        if not reason:
            return Found(place, target)
        reasons.append(f"{target}: {reason}")
    return Found(place, problem="; ".join(reasons))


def _why_not(target: str) -> str:
    try:
        return "" if callable(pkgutil.resolve_name(target)) else "not a function"
    except (ImportError, AttributeError, ValueError) as error:
        return str(error) or type(error).__name__


def version() -> str:
    """SGLang's."""
    try:
        return metadata.version("sglang")
    except metadata.PackageNotFoundError:
        return "of unknown version"


def version_numbers(text: str | None = None) -> tuple[int, ...]:
    """The first numbers of a version: (0, 5, 10) of `0.5.10.post1`; empty if it has none."""
    numbers: list[int] = []
    for part in (version() if text is None else text).split(".")[:3]:
        if not part.isdecimal():
            break
        numbers.append(int(part))
    return tuple(numbers)


def ping_waits_for_weights() -> bool:
    """Whether `/ping` may be closed: before 0.5.23, SGLang's own update script sends nothing until it answers."""
    return version_numbers() >= (0, 5, 23) or not version_numbers()


# -- one worker -----------------------------------------------------------------------------------------------------


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


def server_args(manager: Any) -> Any:  # noqa: ANN401
    """What the server was started with."""
    runner = manager.tp_worker.model_runner
    return getattr(runner, "server_args", None) or getattr(scheduler_of(manager), "server_args", None)


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
    try:
        return not scheduler.is_fully_idle(ignore_waiting=bool(scheduler._engine_paused))  # noqa: SLF001 - no other way
    except TypeError:  # before 0.5.22
        return not scheduler.is_fully_idle()


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
    return _loader().device_loading_context(module, device)


def named_modules(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """All modules of a model by name, each once."""
    yield from cast("Iterator[tuple[str, torch.nn.Module]]", model.named_modules())


def is_lora_wrapper(module: torch.nn.Module) -> bool:
    """Whether a module only stands before the one that owns the weights."""
    layers = _module("sglang.srt.lora.layers")
    wrapper = getattr(layers, "BaseLayerWithLoRA", None)
    return wrapper is not None and isinstance(module, wrapper)


def is_reloading_by_itself(model: torch.nn.Module) -> bool:
    """Whether the model was started with `--load-format flash_rl`, which quantises within its own loader."""
    loader = getattr(_loader(), "QuantizedRLModelLoader", None)
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


Severity = Literal["ok", "note", "problem"]


def inspect_installation() -> list[Mapping[str, str]]:
    """For `checkpoint-engine doctor`: every hook that does not find its place."""
    numbers = version_numbers()
    if numbers and numbers < OLDEST_WITH_PLUGINS:
        return [
            {
                "status": "problem",
                "value": f"SGLang {version()} loads no plugins",
                "advice": "install SGLang 0.5.11 or newer; until then only its own path works, "
                "`python -m sglang.srt.checkpoint_engine.update`, with the defects that docs/sglang.md lists",
            }
        ]
    lost = [found for found in find_places() if found.problem]
    if lost:
        return [
            {
                "status": "problem",
                "value": f"SGLang {version()} lacks the place for hook {found.place.name!r} ({found.problem})",
                "advice": f"{found.place.without_it}; known are 0.5.11 to {'.'.join(map(str, NEWEST_KNOWN))}",
            }
            for found in lost
        ]
    return [{"status": "ok", "value": f"all {len(PLACES)} hooks find their places in SGLang {version()}", "advice": ""}]
