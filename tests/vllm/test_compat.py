"""What vLLM does differently from version to version: pure, with stand-ins for what it offers."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import nullcontext
from functools import wraps
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from checkpoint_engine.sdk import TensorSpec
from checkpoint_engine_vllm import compat, loadplan, shadow


def test_a_loader_that_quantises_gives_way_to_the_one_inside_it() -> None:
    def plain(*_: object) -> None: ...

    def as_before_0_20(weight_loader: Any) -> Any:
        def patched_weight_loader(*given: object) -> None:
            weight_loader(*given)

        return patched_weight_loader

    @wraps(plain, assigned=())
    def online_process_loader(*_: object) -> None: ...

    for loader in (as_before_0_20(plain), online_process_loader, as_before_0_20(online_process_loader)):
        parameter: Any = torch.nn.Parameter(torch.empty(1, device="meta"))
        parameter.weight_loader = loader
        assert compat.load_without_processing(parameter)
        assert parameter.weight_loader is plain
        assert not compat.load_without_processing(parameter)
    assert not compat.load_without_processing(torch.nn.Parameter(torch.empty(1)))


def test_weights_that_sleep_are_told_from_a_cache_that_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's allocator is a stand-in: it exists on GPUs alone."""
    held = [SimpleNamespace(tag="weights", is_asleep=False), SimpleNamespace(tag="kv_cache", is_asleep=True)]
    allocator = SimpleNamespace(pointer_to_data=dict(enumerate(held)))
    module: Any = SimpleNamespace(CuMemAllocator=SimpleNamespace(instance=allocator))
    monkeypatch.setitem(sys.modules, "vllm.device_allocator.cumem", module)
    worker: Any = SimpleNamespace(device=torch.device("cuda", 0))
    assert not compat.weights_sleep(worker)
    held[0].is_asleep = True
    assert compat.weights_sleep(worker)
    assert not compat.weights_sleep(cast("Any", SimpleNamespace(device=torch.device("cpu"))))
    module.CuMemAllocator.instance = None
    assert not compat.weights_sleep(worker)


def test_a_reload_around_the_plain_loader_takes_a_shard_that_the_plain_one_does_not() -> None:
    def default_weight_loader(parameter: torch.Tensor, loaded: torch.Tensor) -> None:
        parameter.data.copy_(loaded)

    @wraps(default_weight_loader, assigned=())
    def online_process_loader(*given: Any) -> None:
        default_weight_loader(*given)

    parameter: Any = torch.nn.Parameter(torch.zeros(1))
    parameter.weight_loader = online_process_loader
    compat.load_without_shard(parameter)
    parameter.weight_loader(parameter, torch.ones(1), "k")
    assert parameter.item() == 1
    assert compat.load_without_processing(parameter)  # vLLM, too, finds the loader inside by these names
    assert parameter.weight_loader is default_weight_loader
    compat.load_without_shard(parameter)
    assert parameter.weight_loader is default_weight_loader


class Layer(torch.nn.Module):
    """One of vLLM's, as far as it says by how many workers it is cut."""

    def __init__(self, **said: Any) -> None:
        super().__init__()
        vars(self).update(said)


def experts(tp_size: int, ep_size: int) -> SimpleNamespace:
    return SimpleNamespace(tp_size=tp_size, ep_size=ep_size)


@pytest.mark.parametrize(
    ("layer", "tensor", "sharing"),
    [
        (Layer(tp_size=4), "0.o_proj.weight", 4),
        (Layer(tp_size=1), "0.gate.weight", 1),  # replicated, as by disable_tp
        (Layer(tp_size=2), "0.o_proj.weight", 2),  # cut by a part of it, as under decode context parallelism
        (Layer(), "0.sinks", 4),  # a parameter of the model's own
        (Layer(tp_size=4, num_kv_head_replicas=2), "0.k_proj.weight", 2),  # of two workers each the same head
        (Layer(tp_size=4, num_kv_head_replicas=2), "0.q_proj.weight", 4),
        (Layer(tp_size=1, moe_parallel_config=experts(tp_size=8, ep_size=1)), "experts.w2", 8),  # two replicas
        (Layer(moe_config=SimpleNamespace(moe_parallel_config=experts(tp_size=1, ep_size=8))), "experts.w2", 8),
        (Layer(moe_parallel_config=experts(1, 8)), "experts.3.w2.weight", 1),  # whole, or not at all
        (Layer(moe_parallel_config=experts(1, 8), global_num_experts=60, local_num_experts=7), "experts.w2", 9),
        (Layer(moe_parallel_config=experts(1, 8), global_num_experts=64, local_num_experts=8), "experts.w2", 8),
    ],
)
def test_by_how_many_workers_a_tensor_is_shared(layer: Layer, tensor: str, sharing: int) -> None:
    assert compat.workers_sharing(layer, tensor, 4) == sharing


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize(("tensor_parallel", "rows", "fits"), [(1, 2048, False), (1, 1024, True), (2, 2048, True)])
def test_stages_and_replicas_do_not_let_a_tensor_be_cut(
    monkeypatch: pytest.MonkeyPatch, stages: int, replicas: int, tensor_parallel: int, rows: int, fits: bool
) -> None:
    """A (2048, 64) tensor for a (1024, 64) parameter was taken as soon as there were two of either."""
    whole = Layer(tp_size=tensor_parallel)
    whole.weight = torch.nn.Parameter(torch.empty((1024, 64), device="meta"), requires_grad=False)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = whole

        def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
            for _, tensor in tensors:
                self.proj.weight.data.copy_(tensor[:1024])

    parallel = SimpleNamespace(
        tensor_parallel_size=tensor_parallel,
        pipeline_parallel_size=stages,
        data_parallel_size=replicas,
        world_size=tensor_parallel * stages,
    )
    monkeypatch.setattr(shadow, "build_without_data", lambda *_: Model())
    monkeypatch.setattr(compat, "bucketed_load", nullcontext)
    monkeypatch.setattr(compat, "watch_loaders", lambda model: {id(parameter) for parameter in model.parameters()})
    config: Any = SimpleNamespace(parallel_config=parallel)
    tensors = {"proj.weight": TensorSpec(torch.float32, (rows, 64))}
    plan = loadplan.Planner().plan("served", config, config, tensors, Model())
    assert plan is not None
    assert plan.too_large == (() if fits else ("proj.weight (shape [2048, 64], 65536 elements taken)",))
