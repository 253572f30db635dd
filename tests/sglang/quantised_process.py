"""Runs in SGLang's environment: gives models new weights in place, and compares them with ones loaded afresh.

quantised_process.py DIRECTORY NAME...     NAME: a checkpoint there, beside another one, NAME-b; with +METHOD, one that
                                           SGLang quantises itself when it has loaded it

Prints JSON: for each name what differs after each update, and what else a test wants to know.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import plain_kernels
import torch
from safetensors.torch import load_file

DEVICE = os.environ.get("ZOO_DEVICE", "cpu")
UPDATES = ("b", "a", "b", "a", "b")
"""By the loader, proved; by plan, checked; by plan. And once more each way round."""


def start(model: Path) -> None:
    """All that SGLang needs to make models, as in one of its schedulers."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    if DEVICE == "cpu":
        plain_kernels.install()
    try:
        from sglang.benchmark.one_batch import _init_process_global_configs  # noqa: F401 - asks for the version
    except ImportError:
        start_by_benchmark(model)
    else:
        start_at_once(model)


class StartedError(Exception):
    """The first model is loaded."""


def start_by_benchmark(model: Path) -> None:
    """SGLang before 0.5.22: as its own benchmark in one process starts, whatever each version needs for that."""
    from sglang.srt.server_args import PortArgs, ServerArgs

    try:
        benchmark: Any = importlib.import_module("sglang.benchmark.one_batch")
    except ImportError:
        benchmark = importlib.import_module("sglang.bench_one_batch")
    load = benchmark.load_model

    def load_and_stop(*args: Any, **kwargs: Any) -> None:
        load(*args, **kwargs)
        raise StartedError

    benchmark.load_model = load_and_stop
    arguments = ServerArgs(
        model_path=str(model),
        device=DEVICE,
        attention_backend="torch_native",
        sampling_backend="pytorch",
        grammar_backend="none",
        mem_fraction_static=0.1 if DEVICE == "cpu" else 0.5,  # several processes share a GPU
        max_total_tokens=8192,
        disable_cuda_graph=True,
    )
    with contextlib.suppress(StartedError):
        benchmark.latency_test(arguments, PortArgs.init_new(arguments), None, 0, 0)


def start_at_once(model: Path) -> None:
    from sglang.benchmark.one_batch import _init_process_global_configs
    from sglang.srt.arg_groups.overrides import resolving_view  # noqa: F401 - it must be imported before
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed import bootstrap
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import PortArgs, ServerArgs

    arguments = ServerArgs(model_path=str(model), device=DEVICE, attention_backend="torch_native")
    publish(arguments, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))
    _init_process_global_configs()
    bootstrap.init_parallel_runtime(
        server_args=arguments, device=DEVICE, dist_port=PortArgs.init_new(arguments).nccl_port
    )
    bootstrap.init_layer_runtime(model_config=ModelConfig.from_server_args(arguments))


def load(directory: Path, method: str, load_format: str = "auto") -> tuple[torch.nn.Module, Any]:
    """A model as SGLang loads it when it starts."""
    from sglang.srt.configs.device_config import DeviceConfig
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_loader import get_model

    config = ModelConfig(str(directory), dtype="bfloat16", quantization=method or None)
    loading = LoadConfig(load_format=load_format)
    with torch.inference_mode(mode=False):
        return get_model(model_config=config, load_config=loading, device_config=DeviceConfig(DEVICE, 0)), config


def tensors_of(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Whatever a model computes with: parameters, buffers, and tensors that are neither."""
    for prefix, module in model.named_modules():
        for kind in ("_parameters", "_buffers"):
            for name, tensor in getattr(module, kind).items():
                if tensor is not None:
                    yield f"{prefix}.{name}", tensor
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                yield f"{prefix}.{name}", value
    yield from held_by_methods(model)


def held_by_methods(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of what processes layers, which it may have in records of its own, as for OpenAI's kernels."""
    for prefix, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        for name, held in vars(method).items() if method is not None else ():
            value = held
            while dataclasses.is_dataclass(value) and not isinstance(value, type):
                value = getattr(value, dataclasses.fields(value)[0].name)
            if isinstance(value, torch.Tensor):
                yield f"{prefix}.{name}", value


def numbers_of(model: torch.nn.Module) -> dict[str, object]:
    """Switches and numbers of layers, of what processes them, and of their tensors."""
    found: dict[str, object] = {}
    for prefix, module in model.named_modules():
        for owner in (module, getattr(module, "quant_method", None), getattr(module, "scheme", None)):
            for name, value in vars(owner).items() if owner is not None else ():
                remembered = isinstance(getattr(type(owner), name, None), functools.cached_property)
                if isinstance(value, (bool, int, float, str)) and not remembered:
                    found[f"{prefix}.{type(owner).__name__}.{name}"] = value
    for name, tensor in tensors_of(model):
        found[f"{name}.format_ue8m0"] = getattr(tensor, "format_ue8m0", None)
    return found


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8)


def differing(model: torch.nn.Module, fresh: torch.nn.Module) -> list[str]:
    mine, other = dict(tensors_of(model)), dict(tensors_of(fresh))
    wrong = [f"only one has {name}" for name in mine.keys() ^ other.keys()]
    for name in mine.keys() & other.keys():
        one, two = mine[name], other[name]
        same = (one.shape, one.stride(), one.dtype) == (two.shape, two.stride(), two.dtype)
        if not same or not torch.equal(bits(one), bits(two)):
            wrong.append(name)
    ours, theirs = numbers_of(model), numbers_of(fresh)
    wrong += [f"{name}: {ours.get(name)} != {theirs.get(name)}" for name in theirs if ours.get(name) != theirs[name]]
    return sorted(wrong)


def read(directory: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def update(sink: Any, tensors: dict[str, torch.Tensor], mode: str) -> dict[str, Any]:
    """In three buckets that cut layers apart, each of whose memory is used again."""
    from checkpoint_engine.contract.sink import TensorSpec, Update

    specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    sink.begin(Update("id", "checkpoint", "version", specs, mode))
    names = sorted(tensors)
    for part in range(3):
        bucket = [(name, tensors[name].clone()) for name in names[part::3]]
        sink.load(bucket)
        for _, tensor in bucket:
            tensor.zero_()
    return dict(sink.finish().details())


def derived_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What DeepSeek's attention computes from its weights, and what methods hold in place of their layers."""
    derived = {
        f"{prefix}.{name}": getattr(module, name)
        for prefix, module in model.named_modules()
        for name in ("w_kc", "w_vc", "w_scale")
        if isinstance(getattr(module, name, None), torch.Tensor)
    }
    return {**derived, **dict(held_by_methods(model))}


def found_when_flipped(model: torch.nn.Module, sink: Any, weights: dict[str, torch.Tensor]) -> dict[str, str]:
    """What a comparison finds when one bit of one derived tensor is another, for each of them."""
    found: dict[str, str] = {}
    for name, tensor in derived_tensors(model).items():
        first = tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.itemsize])[(0,) * tensor.dim()]
        first.bitwise_xor_(1)
        found[name] = update(sink.verifier(), weights, "verify")["different"]
        first.bitwise_xor_(1)
    return found


def in_tree(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> str:
    """An update as SGLang's own worker does it."""
    model.load_weights(iter(tensors.items()))
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if method is not None:
            method.process_weights_after_loading(module)
    if hasattr(model, "post_load_weights"):
        model.post_load_weights()
    return ""


def check(parent: Path, name: str) -> dict[str, Any]:
    from checkpoint_engine_sglang.compat import Runner
    from checkpoint_engine_sglang.sink import SGLangSink

    name, _, method = name.partition("+")
    directories = {"a": parent / name, "b": parent / f"{name}-b"}
    fresh = {key: load(directory, method)[0] for key, directory in directories.items()}
    weights = {key: read(directory) for key, directory in directories.items()}
    model, config = load(directories["a"], method, "dummy")
    places = {key: tensor.data_ptr() for key, tensor in tensors_of(model)}
    objects = {key: id(tensor) for key, tensor in tensors_of(model)}
    result: dict[str, Any] = {"a is b": not differing(fresh["a"], fresh["b"]), "ways": [], "reasons": []}
    runner = Runner("target", model, config, torch.device("cpu"), has_graphs=True)
    for mode in ("auto", "loader"):
        sink = SGLangSink([runner], 1)
        for key in UPDATES if mode == "auto" else UPDATES[:2]:
            details = update(sink, weights[key], mode)
            result.setdefault("differing", []).append(differing(model, fresh[key])[:8])
            result["ways"].append(details["reload"])
            result["reasons"].append(details["loader_reason"])
            result["rebuilt"] = details["rebuilt_layers"]
    result["compared"] = {key: update(sink.verifier(), weights[key], "verify") for key in ("a", "b")}
    result["flipped"] = found_when_flipped(model, sink, weights["a"])
    result["changed by comparing"] = differing(model, fresh["a"])
    result["moved"] = [key for key, tensor in tensors_of(model) if tensor.data_ptr() != places.get(key)]
    result["exchanged"] = [key for key, tensor in tensors_of(model) if id(tensor) != objects.get(key)]
    try:
        in_tree(model, weights["b"])
        result["in tree"] = differing(model, fresh["b"])[:4]
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what a user gets
        result["in tree"] = [f"{type(error).__name__}: {error}"[:200]]
    return result


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    start(directory / sys.argv[2].partition("+")[0])
    with torch.inference_mode():
        print(json.dumps({name: check(directory, name) for name in sys.argv[2:]}))
