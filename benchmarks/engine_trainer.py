"""A trainer whose weights lie on an engine's own GPU: it changes them and brings them over by a parameter server.

What `rl_step_vllm.py` and `rl_step_sglang.py` have in common.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from checkpoint_engine.client.endpoint import Endpoint, Reply
from checkpoint_engine.client.engine_client import EngineClient
from checkpoint_engine.deadline import Deadline
from checkpoint_engine.transfer.trace import PHASES

SECONDS = 300.0
"""For one update."""
IN_PLACE = {"device", "native"}
"""Systems that leave the weights where they are."""
UNCOUNTED = 3
"""Steps in which plans are recorded, proved and checked."""


class TimedEndpoint(Endpoint):
    """Keeps how many seconds the last request to each path took."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.seconds: dict[str, float] = {}

    def send(self, method: str, path: str, deadline: Deadline, **request: Any) -> Reply:  # noqa: ANN401 - handed on
        """Sends it, and measures."""
        begin = time.perf_counter()
        try:
            return super().send(method, path, deadline, **request)
        finally:
            self.seconds[path] = time.perf_counter() - begin


@dataclass
class Trainer:
    """Weights on the engine's own GPU, and an engine."""

    client: EngineClient
    weights: dict[str, torch.Tensor]
    laps: dict[str, float] = field(default_factory=dict)
    """Seconds of the parts of a step."""
    close: Callable[[], object] = lambda: None
    """Lets go of the weights."""
    requests: Mapping[str, float] = field(default_factory=dict)
    """How many seconds the last request to each path of the engine took."""
    traced: bool = False
    workers: int = 1

    def change(self, step: int) -> int:
        """Trains; returns the sum of all bit patterns."""
        generator = torch.Generator("cuda").manual_seed(step)
        for weight in self.weights.values():
            weight.normal_(0, 0.02, generator=generator)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # ipc leaves pieces behind, and both models fill the GPU
        return sum(self.held_by_all(name) * bits_of(weight) for name, weight in self.weights.items())

    def held_by_all(self, name: str) -> int:
        """How many workers keep a tensor, or a part of each: norms and what chooses experts are not shared out."""
        return self.workers if name.endswith(("norm.weight", "mlp.gate.weight")) else 1

    def lap(self, name: str, work: Callable[[], object]) -> None:
        """Does one part of a step."""
        begin = time.perf_counter()
        work()
        self.laps[name] = time.perf_counter() - begin

    def ask(self, version: str) -> Callable[[list[tuple[str, str]]], None]:
        """What asks the engine for an update."""
        options: dict[str, Any] = {"pause": "keep", "reset_caches": True, "timeout": SECONDS}
        return lambda handles: self.client.update_weights(dict(handles), version=version, **options)

    def ours(self, system: str) -> tuple[Callable[[int], None], Callable[[], dict[str, Any]]]:
        """A step through a parameter server, and what that tells of its last one."""
        from checkpoint_engine.ps import ParameterServer  # noqa: PLC0415 - of one system only

        ps = ParameterServer()
        self.close = ps.close

        def publish(step: int) -> None:
            version, stay = f"step-{step}", system in IN_PLACE
            options: dict[str, Any] = {"version": version, "method": "direct", "in_place": stay, "trace": self.traced}
            options["workers"] = self.workers
            self.lap("update", lambda: ps.publish(self.weights, self.ask(version), **options))

        def host(step: int) -> None:
            version, method = f"step-{step}", system.removeprefix("host-")
            self.lap(
                "register",
                lambda: ps.register_checkpoint(version, named_tensors=self.weights, use_shared_memory_pool=True),
            )
            self.lap("gather", lambda: ps.gather_metas(version))
            self.lap("update", lambda: ps.update(version, self.ask(version), method=method))
            self.lap("unregister", lambda: ps.unregister_checkpoint(version))

        def tell() -> dict[str, Any]:
            report = ps.last_report
            stages = {} if report is None else {name: round(value, 4) for name, value in report.seconds.items()}
            asked = {path: round(seconds, 4) for path, seconds in self.requests.items()}
            spans = () if report is None or report.trace is None else report.trace.spans
            spans = [span for span in spans if span.lane == PHASES]
            phases = [
                (span.name, round(span.begin - spans[0].begin, 4), round(span.end - span.begin, 4)) for span in spans
            ]
            told = {"stages": stages, "requests": asked, "engine": {} if report is None else dict(report.engine)}
            return {**told, "phases": [(name, *(round(at, 4) for at in times)) for name, *times in phases]}

        return (publish if system in {*IN_PLACE, "host"} else host), tell


def bits_of(weight: torch.Tensor) -> int:
    """The sum of its bit patterns."""
    return int(weight.view(torch.int16).sum(dtype=torch.int64))
