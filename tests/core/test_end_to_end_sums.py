"""With checksums, a bit that flips anywhere between a rank's memory and the parameters ends the update by its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from checkpoint_engine.contract.figures import Figures
from checkpoint_engine.contract.sink import Tensors, TensorSpec, Update
from checkpoint_engine.errors import UpdateError, WorkerError
from checkpoint_engine.reference.engine import ReferenceEngine
from checkpoint_engine.reference.model import ModelSpec, checkpoint_tensors
from checkpoint_engine.reference.sink import ReferenceSink
from checkpoint_engine.reload.replay import Replay
from tests.core.cluster import Cluster, check

SMALL = 16 << 10


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch, set_bucket_size: Callable[[int], None]) -> None:
    set_bucket_size(SMALL)
    monkeypatch.setenv("CHECKPOINT_ENGINE_CHECKSUM", "1")


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    found = {f"w{number}": torch.randn(1000 + number) for number in range(12)}
    return found | {"odd": torch.randint(0, 256, (4001,), dtype=torch.uint8), "none": torch.empty(0)}


def flip_what_comes(cluster: Cluster, name: str) -> list[str]:
    """Has worker 1 find one bit of a tensor changed where it reads it; the rank's own memory keeps it."""
    recorder, found = cluster.recorders[1], list[str]()
    original = recorder.load

    def load(tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        for key, tensor in tensors:
            if key == name and not found:
                tensor.view(torch.uint8)[tensor.nbytes // 2] ^= 8
                found.append(name)
        original(tensors)

    recorder.load = load
    return found


def test_a_bit_that_flips_in_staging_is_named_before_any_engine_finishes(
    clusters: Callable[[int], Cluster], tensors: dict[str, torch.Tensor]
) -> None:
    cluster = clusters(2)
    cluster.register("a", tensors)
    flipped = flip_what_comes(cluster, "w7")
    for error in cluster.update("a"):
        assert isinstance(error, UpdateError)
        assert "tensor 'w7' did not arrive as it was sent" in str(error)
    assert flipped
    assert [recorder.finishes for recorder in cluster.recorders][1] == 0
    check(cluster.update("a"))
    for recorder in cluster.recorders:
        assert all(torch.equal(recorder.loaded[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("method", ["broadcast", "direct"])
def test_memory_of_a_trainer_is_looked_at_too(
    clusters: Callable[[int], Cluster], tensors: dict[str, torch.Tensor], method: str
) -> None:
    """Here `share_memory_` is what lets others map it, as CUDA IPC does on a GPU."""
    cluster = clusters(2)
    shares = [{key: tensors[key].share_memory_() for key in list(tensors)[rank::2]} for rank in range(2)]
    cluster.publish(shares, "v1", method)
    if method == "broadcast":  # what is mapped in a direct update is the trainer's own memory
        flip_what_comes(cluster, "w7")
        with pytest.raises(UpdateError, match="'w7' did not arrive"):
            cluster.publish(shares, "v2", method)
    cluster.publish(shares, "v3", method)
    for recorder in cluster.recorders:
        assert all(torch.equal(recorder.loaded[name], tensor) for name, tensor in tensors.items())


def test_what_lies_elsewhere_than_was_said_is_named_in_a_direct_update(
    clusters: Callable[[int], Cluster], tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = clusters(2)
    cluster.register("a", tensors)
    check(cluster.update("a", method="direct"))
    from checkpoint_engine.transfer import direct

    original = direct.find_bucket

    def another(*arguments: object) -> torch.Tensor:
        data = original(*arguments).clone()  # pyright: ignore[reportArgumentType]
        data[: data.numel() // 2] ^= 1
        return data

    monkeypatch.setattr(direct, "find_bucket", another)
    assert all(isinstance(e, UpdateError) and "did not arrive" in str(e) for e in cluster.update("a", method="direct"))
    monkeypatch.undo()


def test_ranks_that_do_not_agree_on_it_say_so(
    clusters: Callable[[int], Cluster], tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = clusters(2)
    cluster.register("a", tensors)
    from dataclasses import replace

    monkeypatch.setattr(cluster.servers[1], "_settings", replace(cluster.servers[1]._settings, checksum=False))
    assert any("CHECKPOINT_ENGINE_CHECKSUM alike on all ranks" in str(error) for error in cluster.update("a"))


SPEC = ModelSpec()


def drive(sink: ReferenceSink, content: Tensors, *, compared: bool) -> Figures:
    specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in content}
    sink.begin(Update("id", "a", "v", specs, compared=compared))
    sink.load(content)
    return sink.finish()


def test_a_copy_that_went_wrong_is_noticed_long_after_its_plan_was_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ReferenceEngine(SPEC, tp_rank=0, tp_size=1)
    sink = ReferenceSink(engine)
    content = [(name, torch.randn(spec.shape).to(spec.dtype)) for name, spec in checkpoint_tensors(SPEC)]
    for _ in range(3):  # the loader, the plan compared, and the plan alone
        drive(sink, content, compared=False)
    original = Replay.load

    def load(self: Replay, tensors: Tensors, moving: dict[str, torch.Tensor]) -> int:
        read = original(self, tensors, moving)
        next(iter(engine.parameters.values())).view(torch.uint8).view(-1)[3] ^= 1
        return read

    monkeypatch.setattr(Replay, "load", load)
    drive(sink, content, compared=False)  # which is what the option is for
    with pytest.raises(WorkerError, match="put something else than tensor"):
        drive(sink, content, compared=True)
