"""Everything of vLLM that differs between 0.16 and 0.33, or that is not its public interface, in one place.

Decisions rest on what the installed vLLM offers, not on its version number. vLLM is imported only when a function
here is called, so the client works in an environment without it.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib
import inspect
import re
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, cast

import torch

from checkpoint_engine.sdk import MissingDependencyError
from checkpoint_engine_vllm.adapters import without_adapters
from checkpoint_engine_vllm.protocols import LayerState, ModelConfig, VllmConfig, Worker

__all__ = [
    "Layerwise",
    "Scope",
    "bucketed_load",
    "can_load_mtp_in_buckets",
    "captures_graphs",
    "compile_for_plain_tensors",
    "configuration",
    "default_dtype",
    "device_of",
    "draft_config",
    "draft_model",
    "draft_model_config",
    "draft_shares_checkpoint",
    "engine_context",
    "forget_dummy_scales",
    "idle_heads",
    "is_attention",
    "is_open",
    "keep_scales_of_packed_weights",
    "keep_state",
    "layerwise",
    "load_without_processing",
    "load_without_shard",
    "made_up_buffers",
    "modules_by_name",
    "moves_experts",
    "on_cpu",
    "own_constants",
    "place_kernel_tensors",
    "process_attention",
    "reloads_attention_scales",
    "target_model",
    "version",
    "watch_loaders",
    "watch_processing",
    "weights_sleep",
    "without_adding_up",
    "workers_sharing",
]

_BLOCK_CAST = "per_block_cast_to_fp8"
_FOR_PLAIN = "checkpoint_engine_plain"
_KEYS_OR_VALUES = re.compile(r"\b[kv]_proj\.")
_ONE_EXPERT = re.compile(r"\bexperts?\.\d+\.")
_PLACES = ("model", "model_weights", "original_model", "model_path")
"""In vLLM's configuration of a model: where its checkpoint lies."""
_RELOAD = "vllm.model_executor.model_loader.reload.layerwise"


@dataclass(frozen=True)
class Layerwise:
    """vLLM's layerwise reload (0.16 and newer)."""

    initialize: Callable[[torch.nn.Module], None]
    finalize: Callable[[torch.nn.Module, ModelConfig], None]
    info: Callable[[torch.nn.Module], LayerState]
    """The state of one module's reload."""
    materialize: Callable[[torch.nn.Module], None]
    """Gives memory to a module's parameters that have none."""
    process: Callable[[torch.nn.Module], None]
    """Processes a module whose weights are all loaded, and puts the result where its parameters were before."""


@cache
def layerwise() -> Layerwise:
    """The reload functions of the installed vLLM.

    Raises:
        MissingDependencyError: vLLM is missing, or older than 0.16.
    """
    try:
        module: Any = importlib.import_module(_RELOAD)
        materialize, info = module.materialize_layer, module.get_layerwise_info
        wants_info = len(inspect.signature(materialize).parameters) > 1  # not in 0.16
        _ = module._layerwise_process  # noqa: SLF001 - the steps of the public functions, for one layer

        def process_filled(layer: torch.nn.Module) -> None:
            # It begins with giving memory to the layer; before 0.24 also to one that has some, whose weights are lost.
            module.materialize_layer = _do_nothing
            try:
                module._layerwise_process(layer, info(layer))  # noqa: SLF001 - as it is now: `watch_processing` exchanges it
            finally:
                module.materialize_layer = materialize

        def materialize_keeping(layer: torch.nn.Module) -> None:
            _ = materialize(layer, info(layer)) if wants_info else materialize(layer)
            _give_back_constants(layer, info(layer))

        def initialize(model: torch.nn.Module) -> None:
            for layer in model.modules():
                _name_loaders((*layer.parameters(recurse=False), *info(layer).restore_metadata[0].values()))
            module.initialize_layerwise_reload(model)
            for layer in filter(is_attention, model.modules()):
                for parameter in layer.parameters(recurse=False):
                    load_without_shard(parameter)

        return Layerwise(
            initialize=initialize,
            finalize=module.finalize_layerwise_reload,
            info=info,
            materialize=materialize_keeping,
            process=process_filled,
        )
    except (ImportError, AttributeError) as error:
        raise MissingDependencyError(
            f"vLLM {version()} cannot reload weights layer by layer ({error}); checkpoint-engine-vllm needs vLLM 0.16 "
            "or newer: pip install --upgrade 'vllm>=0.16'"
        ) from error


def _do_nothing(*_: object) -> None: ...


def watch_processing(
    around: Callable[[Callable[[], None], torch.nn.Module, LayerState], None],
) -> Callable[[], None]:
    """Has `around(process, layer, state)` called in place of vLLM's processing of a layer.

    `process()` is what vLLM would have done. What returns ends this.
    """
    module: Any = importlib.import_module(_RELOAD)
    original = module._layerwise_process  # noqa: SLF001 - there is no public way in between

    def process(layer: torch.nn.Module, state: LayerState) -> None:
        around(lambda: original(layer, state), layer, state)

    def undo() -> None:
        module._layerwise_process = original  # noqa: SLF001

    module._layerwise_process = process  # noqa: SLF001
    return undo


def place_kernel_tensors(layer: torch.nn.Module, state: LayerState) -> None:
    """Gives a layer the parameters and buffers back that `state` keeps, and closes its reload."""
    module: Any = importlib.import_module(_RELOAD)
    module._place_kernel_tensors(layer, state)  # noqa: SLF001 - as above
    cast("Any", state).reset()


def keep_state(state: LayerState) -> Callable[[], None]:
    """Remembers which buffers of a layer are not persistent, which vLLM forgets once it has processed it."""
    name = "kernel_non_persistent_buffers"  # not before 0.32
    if not hasattr(state, name):
        return lambda: None
    before: object = getattr(state, name)
    return lambda: setattr(state, name, before)


def _name_loaders(parameters: Iterable[torch.Tensor]) -> None:
    """Gives loaders that are half-filled functions a name: vLLM's reload asks for it (MiniMax M2, 0.32)."""
    for parameter in parameters:
        loader: Any = getattr(parameter, "weight_loader", None)
        if not hasattr(loader, "__name__") and hasattr(loader, "func"):  # of functools.partial
            loader.__name__ = getattr(loader.func, "__name__", "partial")


def idle_heads(model: torch.nn.Module) -> frozenset[torch.nn.Module]:
    """Output layers of a model that makes no tokens, as a classifier that inherits one."""
    if not getattr(model, "is_pooling_model", False):
        return frozenset()
    heads: Any = importlib.import_module("vllm.model_executor.layers.vocab_parallel_embedding")
    return frozenset(layer for layer in model.modules() if isinstance(layer, heads.ParallelLMHead))


def own_constants(layer: torch.nn.Module) -> set[str]:
    """Buffers that a model makes itself and no checkpoint has, such as the scale of an embedding."""
    return set(cast("Any", layer)._non_persistent_buffers_set)  # noqa: SLF001 - torch has no public name for it


def _give_back_constants(layer: torch.nn.Module, state: LayerState) -> None:
    """Fills memory that a layer has just got with what no checkpoint brings."""
    held = (state.kernel_tensors or ({}, {}))[1]
    for name, buffer in layer.named_buffers(recurse=False):
        before = held.get(name) if name in own_constants(layer) else None
        if before is not None and before is not buffer and before.shape == buffer.shape and not buffer.is_meta:
            buffer.copy_(before)


def _no(*_: object) -> bool:
    return False


@contextlib.contextmanager
def without_adding_up() -> Generator[None]:
    """Keeps vLLM from a warning for which it adds up, in 0.26 at every tensor, all that unfinished layers hold.

    Where the tensors of two large layers came in turn, as from two ranks, that took a minute for 19,000 of them.
    """
    module: Any = importlib.import_module(_RELOAD)
    name = "has_device_tensors"
    if not hasattr(module, name):
        yield
        return
    before: object = getattr(module, name)
    setattr(module, name, _no)
    try:
        yield
    finally:
        setattr(module, name, before)


class Scope(torch.nn.Module):
    """Some modules of a model, to be given to vLLM's functions in place of all of them."""

    _original_do_torchao_reload = False
    """Asked for before 0.20, when a reload ends."""

    def __init__(self, modules: Iterable[torch.nn.Module]) -> None:
        super().__init__()
        self._scope = tuple(modules)

    def modules(self, remove_duplicate: bool = True) -> Iterator[torch.nn.Module]:  # noqa: FBT001, FBT002, ARG002 - torch's own signature
        """Those modules."""
        return iter(self._scope)


def is_open(state: LayerState) -> bool:
    """Whether a module still waits for weights (vLLM's own method for it has had two names)."""
    return state.load_numel_total is not None


@cache
def version() -> str:
    """The installed vLLM's version, or `(not installed)`."""
    try:
        return str(importlib.import_module("vllm").__version__)
    except (ImportError, AttributeError):
        return "(not installed)"


def configuration(worker: Worker) -> str:
    """Stands for all of vLLM's configuration and environment that its loaders and kernels may hang on.

    vLLM itself keeps compiled code by most of it. Where the checkpoint lies, which its hash has in it, says nothing of
    the model. Empty if this vLLM does not tell (see `VllmConfig.compute_hash`, `vllm.envs`), or not of all.
    """
    config: Any = copy.copy(worker.vllm_config)
    config.model_config = copy.copy(worker.model_config)
    for name in _PLACES:
        if hasattr(config.model_config, name):
            setattr(config.model_config, name, "")
    try:
        factors: Callable[[], dict[str, object]] = importlib.import_module("vllm.envs").compile_factors
        load, quantised = config.load_config, type(config.quant_config).__qualname__
        parts = (config.compute_hash(), sorted(factors().items()), load.load_format, load.model_loader_extra_config)
    except (AttributeError, TypeError, ValueError):
        return ""
    return hashlib.sha256(repr((parts, quantised, worker.model_config.enforce_eager)).encode()).hexdigest()[:32]


@contextlib.contextmanager
def engine_context(worker: Worker) -> Generator[None]:
    """What vLLM has around its loaders when it starts; some processing takes the default dtype.

    Wrappers of LoRA came later, and stand aside.
    """
    set_config = importlib.import_module("vllm.config").set_current_vllm_config
    with (
        torch.no_grad(),
        set_config(worker.vllm_config),
        default_dtype(worker.model_config.dtype),
        device_of(worker),
        without_adapters(target_model(worker)),
    ):
        yield


def device_of(worker: Worker) -> torch.device:
    """Where a worker computes; before 0.20, those on the CPU do not know."""
    return torch.device("cpu") if worker.device is None else worker.device


def on_cpu(worker: Worker) -> bool:
    """Whether the worker computes on the CPU."""
    return device_of(worker).type == "cpu"


def captures_graphs(worker: Worker) -> bool:
    """Whether the worker may have captured CUDA graphs, which read weights at the addresses that those had then."""
    mode = getattr(worker.vllm_config.compilation_config, "cudagraph_mode", None)
    return not on_cpu(worker) and not worker.model_config.enforce_eager and getattr(mode, "name", "") != "NONE"


def weights_sleep(worker: Worker) -> bool:
    """Whether sleep has taken the memory of weights (found out from 0.26 on)."""
    if on_cpu(worker):
        return False
    try:
        allocator: Any = importlib.import_module("vllm.device_allocator.cumem").CuMemAllocator.instance
        held = cast("Iterable[Any]", allocator.pointer_to_data.values())
        return any(getattr(each, "is_asleep", False) for each in held if each.tag == "weights")
    except (ImportError, AttributeError):  # it never slept, or keeps its books otherwise
        return False


def moves_experts(worker: Worker) -> bool:
    """Whether experts are moved between workers as load demands, so that they no longer lie where loaders put them."""
    return bool(getattr(worker.vllm_config.parallel_config, "enable_eplb", False))


# -- models ---------------------------------------------------------------------------------------------------------


def target_model(worker: Worker) -> torch.nn.Module:
    """The served model, without wrappers for CUDA graphs."""
    return worker.model_runner.get_model()


def draft_model(worker: Worker) -> torch.nn.Module | None:
    """The model that speculative decoding drafts with, if it is one; both model runners."""
    runner = worker.model_runner
    if hasattr(runner, "get_draft_model"):
        model = runner.get_draft_model()
    else:
        drafter = getattr(runner, "drafter", None) or getattr(runner, "speculator", None)
        model = getattr(drafter, "model", None)
        unwrap: Callable[[], object] | None = getattr(model, "unwrap", None)
        model = model if unwrap is None else unwrap()
    return model if isinstance(model, torch.nn.Module) else None


def draft_config(worker: Worker) -> VllmConfig:
    """The configuration that the draft model was built from."""
    runner = worker.model_runner
    drafter = getattr(runner, "drafter", None) or getattr(runner, "speculator", None)
    make = getattr(drafter, "_create_draft_vllm_config", None)
    return worker.vllm_config if make is None else make()


def draft_model_config(worker: Worker) -> ModelConfig | None:
    """The model configuration of the draft model; None if it has none of its own."""
    return getattr(worker.vllm_config.speculative_config, "draft_model_config", None)


def draft_shares_checkpoint(worker: Worker) -> bool:
    """Whether the draft model's weights lie in the served model's checkpoint, as those of MTP layers do."""
    config = draft_model_config(worker)
    return config is not None and config.model == worker.model_config.model


def modules_by_name(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Every module of a model, itself included as the empty name."""
    return {name: module for name, module in cast("Any", model).named_modules()}  # noqa: C416 - says the types


def workers_sharing(layer: torch.nn.Module, tensor: str, tensor_parallel_size: int) -> int:
    """How many workers each take a part of their own of a tensor that comes into this layer.

    Most layers know by how many they are cut: replicated ones by 1, others by the tensor-parallel size or a part of it.
    Experts are cut, or dealt out, over data-parallel replicas as well; some workers may hold one expert fewer.
    """
    held: Any = layer
    experts: Any = getattr(held, "moe_parallel_config", None)
    if experts is None:
        experts = getattr(getattr(held, "moe_config", None), "moe_parallel_config", None)
    if experts is None:
        sharing = int(getattr(held, "tp_size", tensor_parallel_size))
        # More workers than heads of keys and values: several of them hold the same one.
        return sharing // int(getattr(held, "num_kv_head_replicas", 1)) if _KEYS_OR_VALUES.search(tensor) else sharing
    if _ONE_EXPERT.search(tensor):
        return int(experts.tp_size)
    everywhere, here = getattr(held, "global_num_experts", 0), getattr(held, "local_num_experts", 0)
    return int(experts.tp_size) * max(int(experts.ep_size), -(-everywhere // here) if here else 1)


def is_attention(layer: torch.nn.Module) -> bool:
    """Whether a layer is completed only at the end of a reload; its scales may be missing from a checkpoint."""
    try:
        attention = importlib.import_module("vllm.model_executor.layers.attention")
    except ImportError:
        return hasattr(layer, "kv_cache")
    if hasattr(attention, "is_deferred_attention_layer"):
        return bool(attention.is_deferred_attention_layer(layer))
    kinds = tuple(
        getattr(attention, name)
        for name in ("Attention", "MLAAttention", "MMEncoderAttention")
        if hasattr(attention, name)
    )
    return isinstance(layer, kinds)


def reloads_attention_scales() -> bool:
    """Whether a reload takes attention's scales from a checkpoint (0.20 and newer); else it breaks off at its end."""
    return hasattr(importlib.import_module(_RELOAD), "finalize_layerwise_processing")


def process_attention(layer: torch.nn.Module, model_config: ModelConfig) -> None:
    """What vLLM does to an attention layer once all other layers have their weights."""
    cast("Any", layer).process_weights_after_loading(model_config.dtype)


def keep_scales_of_packed_weights() -> None:
    """Has each int8 weight that is packed for the CPU keep its scales alive: it knows them by their address only."""
    operators = importlib.import_module("vllm._custom_ops")
    pack: Callable[..., object] | None = getattr(operators, "create_onednn_scaled_mm", None)
    if pack is None or hasattr(pack, "__wrapped__"):
        return

    @wraps(pack)
    def create_onednn_scaled_mm(weight: torch.Tensor, scales: torch.Tensor, *arguments: object) -> object:
        packed: Any = pack(weight, scales, *arguments)
        packed.checkpoint_engine_scales = scales
        return packed

    cast("Any", operators).create_onednn_scaled_mm = create_onednn_scaled_mm


@cache
def compile_for_plain_tensors() -> None:
    """Has vLLM's compiled cast to FP8 in blocks get plain tensors from now on; given its parameters, it breaks off.

    What it computes is the same (0.26; not seen in 0.32).
    """
    for name in ("vllm.utils.deep_gemm", "vllm.model_executor.layers.quantization.online.fp8"):
        try:
            module: Any = importlib.import_module(name)
        except ImportError:
            continue
        cast_to_fp8: Callable[..., object] | None = getattr(module, _BLOCK_CAST, None)
        if cast_to_fp8 is not None and not hasattr(cast_to_fp8, _FOR_PLAIN):
            setattr(module, _BLOCK_CAST, _for_plain_tensors(cast_to_fp8))


def _for_plain_tensors(function: Callable[..., object]) -> Callable[..., object]:
    @wraps(function)
    def call(tensor: torch.Tensor, *arguments: Any, **options: Any) -> object:  # noqa: ANN401 - vLLM's own
        with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001  # pyright: ignore[reportPrivateUsage] - torch has no public name
            plain = tensor.detach().as_subclass(torch.Tensor)
        return function(plain, *arguments, **options)

    setattr(call, _FOR_PLAIN, True)
    return call


def made_up_buffers(worker: Worker, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that a start with dummy weights has filled with noise, and that only a checkpoint can mend.

    Scales of attention are not among them; see `forget_dummy_scales`.
    """
    if worker.vllm_config.load_config.load_format != "dummy":
        return {}
    return {
        f"{name}.{own}".lstrip("."): buffer
        for name, layer in modules_by_name(model).items()
        if not is_attention(layer)
        for own, buffer in layer.named_buffers(recurse=False)
        if buffer.is_floating_point() and own not in own_constants(layer)
    }


def forget_dummy_scales(worker: Worker, model: torch.nn.Module) -> None:
    """Gives attention its default scales back where a start with dummy weights made them up.

    A checkpoint that brings scales overwrites them; one that brings none would leave them.
    """
    if worker.vllm_config.load_config.load_format != "dummy":
        return
    attention = importlib.import_module("vllm.model_executor.layers.attention.attention")
    reset: Callable[..., None] | None = getattr(attention, "set_default_quant_scales", None)
    if reset is None:
        return
    for layer in model.modules():
        if is_attention(layer) and isinstance(getattr(layer, "_k_scale", None), torch.Tensor):
            reset(layer)


# -- MTP ------------------------------------------------------------------------------------------------------------


def bucketed_load() -> AbstractContextManager[None]:
    """Lets MTP models take their weights in several calls (0.32 and newer)."""
    switch = _mtp_switch()
    return contextlib.nullcontext() if switch is None else switch()


def can_load_mtp_in_buckets() -> bool:
    """Whether `bucketed_load` does anything; without it, an MTP model must get all its weights in one call."""
    return _mtp_switch() is not None


@cache
def _mtp_switch() -> Callable[[], AbstractContextManager[None]] | None:
    try:
        return importlib.import_module("vllm.model_executor.model_loader.mtp_validation").disable_mtp_completeness_check
    except (ImportError, AttributeError):
        return None


def load_without_processing(parameter: torch.Tensor) -> bool:
    """Takes from a parameter that vLLM quantises while it loads what does so, for there is no data to quantise.

    Returns whether it is such a parameter.
    """
    found = False
    while (plain := _without_processing(getattr(parameter, "weight_loader", None))) is not None:
        cast("Any", parameter).weight_loader = plain
        found = True
    return found


def watch_loaders(model: torch.nn.Module) -> set[int]:
    """Notes for which of a model's tensors their own loader is called, by `id`; the others are written to directly.

    A reload stands around those loaders, and sees nothing of what goes past them.
    """
    called: set[int] = set()
    plain = importlib.import_module("vllm.model_executor.model_loader.weight_utils").default_weight_loader

    def watch(tensor: Any) -> None:  # noqa: ANN401 - vLLM's own classes
        original: Callable[..., object] = getattr(tensor, "weight_loader", plain)

        @wraps(original)
        def load(*arguments: Any, **options: Any) -> object:  # noqa: ANN401
            called.add(id(tensor))
            return original(*arguments, **options)

        tensor.weight_loader = load

    for tensor in {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values():
        watch(tensor)
    return called


def load_without_shard(parameter: torch.Tensor) -> None:
    """Has a parameter's loader that a reload stands around take a shard's name too, where the one inside takes none.

    Loaders of Qwen name one for scales of a cache, unless the loader is the plain one itself (0.22).
    """
    around: Any = getattr(parameter, "weight_loader", None)
    inside = around
    while getattr(inside, "__name__", "") == "online_process_loader":
        inside = inside.__wrapped__
    if inside is around or getattr(inside, "__name__", "") != "default_weight_loader":
        return

    @wraps(around)
    def online_process_loader(parameter: torch.Tensor, loaded: torch.Tensor, *_: object) -> object:
        return around(parameter, loaded)

    cast("Any", parameter).weight_loader = online_process_loader


def _without_processing(loader: Callable[..., object] | None) -> Callable[..., object] | None:
    """What a loader calls that also quantises; None for others."""
    match getattr(loader, "__name__", ""):
        case "online_process_loader":
            return cast("Any", loader).__wrapped__
        case "patched_weight_loader":  # before 0.20
            return inspect.getclosurevars(cast("Any", loader)).nonlocals.get("weight_loader")
        case _:
            return None


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Generator[None]:
    """What torch makes of numbers that are not told otherwise."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
