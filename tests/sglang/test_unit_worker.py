"""What a worker of SGLang says of itself when an update breaks off, at any point."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from torch import nn

from checkpoint_engine.contract.sink import TensorSpec, Update
from checkpoint_engine.device import open_device
from checkpoint_engine.errors import LinkError
from checkpoint_engine_sglang import compat
from checkpoint_engine_sglang import worker as worker_module
from checkpoint_engine_sglang.agreement import WorkerGroup
from checkpoint_engine_sglang.compat import Position, Runner
from checkpoint_engine_sglang.messages import Order, Report
from checkpoint_engine_sglang.scheduler import update_otherwise
from checkpoint_engine_sglang.worker import WorkerSide

pytestmark = pytest.mark.pure


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))

    def load_weights(self, weights: Any) -> None:
        for _, tensor in weights:
            self.weight.data.copy_(tensor)


class Group(WorkerGroup):
    """This worker, and others that say the same of themselves but for how the update went there."""

    def __init__(self, size: int, changed: dict[str, Any]) -> None:
        self.size, self.changed = size, changed

    def exchange(self, mine: Any, seconds: float) -> list[Any]:
        del seconds
        other = msgspec.structs.replace(mine, **self.changed) if isinstance(mine, Report) and mine.seconds else mine
        return [mine, *[other] * (self.size - 1)]


@pytest.fixture
def side(monkeypatch: pytest.MonkeyPatch) -> Callable[..., WorkerSide]:
    def make(breaks: str = "", others: dict[str, Any] | None = None) -> WorkerSide:
        scheduler = SimpleNamespace(_engine_paused=False)
        position = Position(0, 2 if others is not None else 1, 1, 0, 1, 0, 1)
        monkeypatch.setattr(compat, "position_of", lambda _: position)
        monkeypatch.setattr(compat, "device_of", lambda *_: open_device("cpu"))
        monkeypatch.setattr(compat, "scheduler_of", lambda _: scheduler)
        monkeypatch.setattr(compat, "cannot_update", lambda *_: "")
        monkeypatch.setattr(worker_module, "pick_handle", lambda *_: "handle")
        monkeypatch.setattr(worker_module, "receive_update", lambda _, sink, *__, **___: receive(sink, breaks))
        runner = Runner("target", Plain(), SimpleNamespace(), torch.device("cpu"))
        return WorkerSide(None, [runner], Group(position.world_size, others or {}))

    return make


def receive(sink: Any, breaks: str) -> Any:
    """As the link does it, up to where it breaks."""
    try:
        sink.begin(Update("id", "checkpoint", "new", {"weight": TensorSpec(torch.float32, (2,))}))
        fail("begin", breaks)
        sink.load([("weight", torch.ones(2))])
        fail("load", breaks)
        details = sink.finish().details()
        fail("synchronise", breaks)
    except LinkError:
        sink.abort()
        raise
    fail("goodbye", breaks)
    return SimpleNamespace(details=details, nbytes=8, verified=False)


def fail(point: str, breaks: str) -> None:
    if point == breaks:
        raise LinkError(f"broken in {point}")


@pytest.mark.parametrize(
    ("breaks", "ok", "complete", "dirty", "version"),
    [
        ("", True, True, False, "new"),
        ("begin", False, False, False, ""),
        ("load", False, False, True, ""),
        ("synchronise", False, False, True, "new"),  # nobody knows whether the last copies arrived
        ("goodbye", False, True, False, "new"),  # the parameter server was gone before it could be told
    ],
)
def test_what_it_holds_wherever_an_update_breaks_off(
    side: Callable[..., WorkerSide], breaks: str, ok: bool, complete: bool, dirty: bool, version: str
) -> None:
    worker = side(breaks)
    (report,) = worker.run({}, Order(version="new"), flush=False)
    assert (report.ok, report.complete, report.dirty, report.version) == (ok, complete, dirty, version)
    (status,) = worker.status()
    assert (status.dirty, status.version) == (dirty, version)
    assert compat.is_paused(compat.scheduler_of(None)) is dirty


@pytest.mark.parametrize(
    ("others", "dirty"),
    [({}, False), ({"ok": False}, False), ({"ok": False, "complete": False}, True)],
)
def test_workers_that_hold_different_weights_are_a_mixture(
    side: Callable[..., WorkerSide], others: dict[str, Any], dirty: bool
) -> None:
    worker = side(others=others)
    assert {report.dirty for report in worker.run({}, Order(version="new"), flush=False)} == {dirty}
    assert worker.dirty is dirty
    assert compat.is_paused(compat.scheduler_of(None)) is dirty


def test_a_version_that_sglangs_own_routes_have_replaced_is_not_named(side: Callable[..., WorkerSide]) -> None:
    worker = side()
    worker.run({}, Order(version="new"), flush=False)
    owner = SimpleNamespace(_checkpoint_engine_side=SimpleNamespace(after_others=worker.others_brought))
    compat.scheduler_of(None).__dict__.update(vars(owner))
    for answer, told, version in (
        (SimpleNamespace(success=True), "of theirs", "of theirs"),
        ((True, "before 0.5.14"), None, ""),
        (SimpleNamespace(success=False), "half", ""),
    ):
        request = SimpleNamespace(weight_version=told)
        assert update_otherwise(lambda *_, answer=answer: answer, None, request) is answer
        (status,) = worker.status()
        assert (status.version, status.update) == (version, "")
