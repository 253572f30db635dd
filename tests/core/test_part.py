"""Some tensors of a checkpoint, by name: declared beforehand, brought whole, and everything else stays bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from checkpoint_engine.device import open_device
from checkpoint_engine.errors import CheckpointStateError, SettingError, UpdateError
from checkpoint_engine.receiver.reception import receive_update
from checkpoint_engine.reference.engine import ModelSpec, ReferenceEngine, make_checkpoint
from checkpoint_engine.reference.sink import ReferenceSink
from checkpoint_engine.server import ParameterServer
from checkpoint_engine.source.directory import find_files
from checkpoint_engine.transfer.methods import Method
from tests.core.cluster import Recorder

SPEC = ModelSpec()
DEVICE = open_device("cpu", rank=0)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints")
    for seed, name in enumerate("ab", start=1):
        make_checkpoint(directory / name, SPEC, seed)
    return directory


@pytest.fixture
def server(checkpoints: Path) -> Iterator[ParameterServer]:
    with ParameterServer(rank=0, world_size=1, device="cpu", master_addr="127.0.0.1") as server:
        for name in "ab":
            server.register_checkpoint(name, files=find_files(checkpoints / name), use_shared_memory_pool=True)
            server.gather_metas(name)
        yield server


class Served:
    """A reference engine that was started with `a`, and asked by threads of this process."""

    def __init__(self, checkpoints: Path) -> None:
        self.engine = ReferenceEngine.cold_start(checkpoints / "a")
        self.sink = ReferenceSink(self.engine)

    def ask(self, handles: list[tuple[str, str]]) -> None:
        receive_update(handles[0][1], self.sink, DEVICE, timeout=20)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.engine.parameters.items()}


@pytest.fixture
def served(checkpoints: Path) -> Served:
    return Served(checkpoints)


def update(server: ParameterServer, served: Served, name: str, only: list[str], method: str = "broadcast") -> None:
    server.update(name, served.ask, timeout=timedelta(seconds=20), only=only, method=method)


@pytest.mark.parametrize("method", [Method.BROADCAST, Method.DIRECT])
def test_what_is_named_changes_and_nothing_else(
    server: ParameterServer, served: Served, checkpoints: Path, method: str
) -> None:
    """Also a part of what the engine fuses: its copies go to their own rows."""
    before, new = served.tensors(), ReferenceEngine.cold_start(checkpoints / "b").parameters
    slots = served.engine.layout.slots
    only = ["model.layers.0.self_attn.q_proj.weight", "*.norm.weight"]
    for name in ("b", "a", "b"):
        update(server, served, name, only, method)
        assert served.sink.life.parts() == {"partial": True, "whole_version": ""}
    assert server.last_report is not None
    assert (server.last_report.tensors, server.last_report.engine["partial"]) == (2, 1)
    expected = {name: tensor.clone() for name, tensor in before.items()}
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.norm.weight"):
        slot = slots[name]
        expected[slot.parameter][slot.into] = new[slot.parameter][slot.into]
    assert all(torch.equal(expected[name], tensor) for name, tensor in served.engine.parameters.items())
    found = server.verify("b", served.ask, only=only)
    assert (found.compared_tensors, found.different_tensors) == (2, 0)
    assert server.verify("a", served.ask, only=only).different_tensors == 2
    server.update("b", served.ask, timeout=timedelta(seconds=20))
    assert served.sink.life.parts() == {"partial": False, "whole_version": "b"}


def test_a_pattern_that_fits_nothing_is_an_error_and_so_is_an_engine_that_takes_no_parts(
    server: ParameterServer, served: Served
) -> None:
    with pytest.raises(SettingError, match="nosuch"):
        update(server, served, "b", ["*.norm.weight", "nosuch.*"])
    with pytest.raises(SettingError, match="list of patterns"):
        server.update("b", served.ask, only="*.norm.weight")
    recorder = Recorder()
    with pytest.raises(UpdateError, match="takes whole checkpoints"):
        server.update(
            "b", lambda handles: receive_update(handles[0][1], recorder, DEVICE, timeout=20), only=["*.norm.weight"]
        )
    assert recorder.update is None


def test_a_mixture_is_not_healed_by_a_part(served: Served, server: ParameterServer) -> None:
    served.sink.life.spoil()
    with pytest.raises(UpdateError, match="bring a whole checkpoint"):
        update(server, served, "b", ["*.norm.weight"])
    assert served.sink.dirty
    server.update("b", served.ask, timeout=timedelta(seconds=20))
    assert not served.sink.dirty


def test_what_came_in_part_is_not_what_engines_are_given_back(server: ParameterServer, served: Served) -> None:
    server.update("a", served.ask, timeout=timedelta(seconds=20))
    update(server, served, "b", ["*.norm.weight"])

    def fail(_: object) -> None:
        raise CheckpointStateError("told to fail")

    served.engine.write = fail  # type: ignore[method-assign]
    served.sink = ReferenceSink(served.engine)
    with pytest.raises(UpdateError, match=r"not rolled back .* brought only a part"):
        server.update("b", served.ask, timeout=timedelta(seconds=20), reload="loader")
