"""What vLLM does differently from version to version: pure, with stand-ins for what it offers."""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch

from checkpoint_engine_vllm import compat


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
