"""The reference engine by plan: proved, checked, replayed; and what happens when a plan is wrong."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from checkpoint_engine.contract.figures import UpdateFigures
from checkpoint_engine.contract.sink import TensorSpec, Update
from checkpoint_engine.errors import WeightsRejectedError, WorkerError
from checkpoint_engine.reference.engine import ModelSpec, ReferenceEngine, make_checkpoint
from checkpoint_engine.reference.sink import ReferenceSink
from checkpoint_engine.reload import proof
from checkpoint_engine.reload import reloader as reloading
from checkpoint_engine.reload.plan import ReloadPlan, make_plan
from checkpoint_engine.reload.proof import Checksums, Proof
from checkpoint_engine.reload.recorder import record
from checkpoint_engine.reload.reloader import Reloader

pytestmark = pytest.mark.pure

DENSE, MOE, TIED = ModelSpec(), ModelSpec(experts=4), ModelSpec(tied=True, extras=False, dtype="float32")


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def give(sink: ReferenceSink, tensors: dict[str, torch.Tensor], version: str, mode: str = "auto") -> UpdateFigures:
    """One update in buckets of three tensors."""
    specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    sink.begin(Update("id", "checkpoint", version, specs, mode))  # type: ignore[arg-type]
    pairs = list(tensors.items())
    for start in range(0, len(pairs), 3):
        sink.load(pairs[start : start + 3])
    figures = sink.finish()
    assert isinstance(figures, UpdateFigures)
    return figures


@pytest.mark.parametrize("spec", [DENSE, MOE, TIED], ids=["dense", "moe", "tied"])
@pytest.mark.parametrize(("tp_rank", "tp_size"), [(0, 1), (0, 2), (1, 2)])
def test_four_updates_by_proof_check_and_plan(spec: ModelSpec, tp_rank: int, tp_size: int, tmp_path: Path) -> None:
    sink = ReferenceSink(ReferenceEngine(spec, tp_rank=tp_rank, tp_size=tp_size))
    addresses, ways = sink.engine.addresses(), []
    for seed in (1, 2, 3, 1):
        directory = make_checkpoint(tmp_path / str(seed), spec, seed=seed)
        figures = give(sink, tensors_of(directory), f"v{seed}")
        cold = ReferenceEngine.cold_start(directory, tp_rank=tp_rank, tp_size=tp_size)
        assert sink.engine.compare(cold).equal
        ways.append(figures.reload)
    assert ways == ["proof", "plan", "plan", "plan"]
    assert (figures.plan_bytes > 0, figures.loader_bytes) == (True, 0)
    assert sink.engine.addresses() == addresses


def test_the_loader_alone_when_asked_for(tmp_path: Path) -> None:
    sink = ReferenceSink(ReferenceEngine(DENSE))
    tensors = tensors_of(make_checkpoint(tmp_path, DENSE, seed=1))
    assert [give(sink, tensors, "v", "loader").reload for _ in range(3)] == ["loader"] * 3


def test_other_tensors_are_recorded_anew() -> None:
    parameters = {"p": torch.zeros(4)}

    def load(tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in tensors:
            parameters["p"][:2].copy_(tensor) if name == "a" else parameters["p"][2:].copy_(tensor)

    def shadow_load(tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in tensors:
            (shadow["p"][:2] if name == "a" else shadow["p"][2:]).copy_(tensor)

    shadow = {"p": torch.empty(4, device="meta")}
    reloader = Reloader(load, parameters, lambda: (shadow_load, shadow))
    ways = []
    for names in ("ab", "ab", "ab", "ac", "ac"):
        tensors = {name: torch.rand(2) for name in names}
        reloader.begin({name: TensorSpec(torch.float32, (2,)) for name in names}, "auto")
        reloader.load(list(tensors.items()))
        ways.append(reloader.finish().reload)
        assert torch.equal(parameters["p"], torch.cat(list(tensors.values())))
    assert ways == ["proof", "plan", "plan", "proof", "plan"]


def altered(plan: ReloadPlan) -> ReloadPlan:
    """The same plan, but one of its copies takes its rows in the wrong order."""
    name, (piece, *rest) = next((name, pieces) for name, pieces in plan.pieces.items() if pieces[0].region.offset == 0)
    region = piece.region
    wrong = msgspec.structs.replace(piece, region=type(region)(region.offset, region.shape, (0, *region.stride[1:])))
    return replace(plan, pieces={**plan.pieces, name: (wrong, *rest)})


def test_one_altered_entry_of_a_plan_is_found_before_the_plan_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def alter(recording: object, targets: Mapping[str, torch.Tensor]) -> ReloadPlan:
        plan = altered(make_plan(recording, targets))  # type: ignore[arg-type]
        seen.append(next(iter(plan.pieces)))
        return plan

    monkeypatch.setattr(reloading, "make_plan", alter)
    sink = ReferenceSink(ReferenceEngine(DENSE))
    tensors = tensors_of(make_checkpoint(tmp_path, DENSE, seed=1))
    whole = sum(tensor.nbytes for tensor in tensors.values())
    give(sink, tensors, "v1")
    figures = give(sink, tensors, "v2")
    assert seen
    assert figures.reload == "plan"
    assert 0 < figures.loader_bytes < whole, "the altered parameter stays with the loader"
    cold = ReferenceEngine.cold_start(tmp_path)
    assert sink.engine.compare(cold).equal


def divert_a_copy(sink: ReferenceSink) -> str:
    """Has a copy of its plan go elsewhere; returns the parameter that gets nothing."""
    assert sink._reloader._ladder.layers is not None
    replay = sink._reloader._ladder.layers.replay
    step = next(steps[0] for steps in replay._steps.values() if steps and steps[0].piece.region.elements > 1)
    assert step.target is not None
    step.target = step.target.clone()
    sink.engine.parameters[step.piece.target].zero_()
    return step.piece.target


def test_an_entry_altered_after_the_proof_is_found_by_the_check(tmp_path: Path) -> None:
    sink = ReferenceSink(ReferenceEngine(DENSE))
    tensors = tensors_of(make_checkpoint(tmp_path, DENSE, seed=1))
    give(sink, tensors, "v1")
    step_target = divert_a_copy(sink)
    with pytest.raises(WorkerError, match="put something else") as caught:
        give(sink, tensors, "v2")
    assert step_target in str(caught.value)
    sink.abort()
    assert sink.dirty
    assert give(sink, tensors, "v3").reload == "proof", "nothing of a plan that failed is kept"
    assert not sink.dirty


def by_plan_and_broken_off(tmp_path: Path) -> tuple[ReferenceSink, dict[str, torch.Tensor], ReferenceEngine]:
    """A sink that goes by plan and has taken two buckets of an update, with what it held before."""
    old, new = (make_checkpoint(tmp_path / str(seed), DENSE, seed=seed) for seed in (1, 2))
    sink, tensors = ReferenceSink(ReferenceEngine(DENSE)), tensors_of(old)
    for _ in range(3):
        give(sink, tensors, "old")
    others = tensors_of(new)
    specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in others.items()}
    sink.begin(Update("id", "checkpoint", "new", specs))
    for start in (0, 3):
        sink.load(list(others.items())[start : start + 3])
    cold = ReferenceEngine.cold_start(old)
    assert not sink.engine.compare(cold).equal
    return sink, tensors, cold


def test_a_mixture_that_copies_alone_have_made_is_healed_by_plan(tmp_path: Path) -> None:
    sink, tensors, cold = by_plan_and_broken_off(tmp_path)
    assert not sink.abort()
    assert sink.dirty
    figures = give(sink, tensors, "old")
    assert (figures.reload, figures.loader_bytes) == ("plan", 0)
    assert sink.engine.compare(cold).equal
    assert not sink.dirty


def test_a_mixture_that_is_healed_by_plan_is_compared(tmp_path: Path) -> None:
    sink, tensors, _ = by_plan_and_broken_off(tmp_path)
    sink.abort()
    divert_a_copy(sink)
    with pytest.raises(WorkerError, match="put something else"):
        give(sink, tensors, "old")


@pytest.mark.parametrize("hook", ["take", "complete"])
def test_what_a_sink_has_failed_in_itself_is_healed_by_the_loader(
    hook: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink, tensors, cold = by_plan_and_broken_off(tmp_path)
    others = [(name, torch.zeros_like(tensor)) for name, tensor in tensors.items()]
    with monkeypatch.context() as patched:
        patched.setattr(sink._reloader, {"take": "load", "complete": "finish"}[hook], fail_by_itself)
        with pytest.raises(WorkerError, match="by itself"):
            load_and_finish(sink, others)
    assert not sink.abort()
    assert give(sink, tensors, "old").reload == "proof"
    assert sink.engine.compare(cold).equal


def load_and_finish(sink: ReferenceSink, tensors: list[tuple[str, torch.Tensor]]) -> None:
    sink.load(tensors)
    sink.finish()


def fail_by_itself(*_: object) -> None:
    raise WorkerError("it fails by itself")


@pytest.mark.thorough
def test_nothing_but_a_plan_where_it_does_not_reach() -> None:
    parameters = {"p": torch.zeros(4)}

    def load(tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        for _, tensor in tensors:
            shadow["p"].copy_(-tensor)

    shadow = {"p": torch.empty(4, device="meta")}
    reloader = Reloader(load, parameters, lambda: (load, shadow))
    with pytest.raises(WeightsRejectedError, match="--reload auto") as caught:
        reloader.begin({"a": TensorSpec(torch.float32, (4,))}, "plan")
    assert "'p'" in str(caught.value)


@pytest.mark.thorough
def test_a_mixture_of_planned_and_computed(tmp_path: Path) -> None:
    del tmp_path

    def loader(parameters: dict[str, torch.Tensor]) -> object:
        def load(tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
            for name, tensor in tensors:
                parameters[name].copy_(tensor.exp() if name == "a" else tensor)

        return load

    parameters = {name: torch.zeros(4) for name in "abc"}
    shadow = {name: torch.empty(4, device="meta") for name in "abc"}
    reloader = Reloader(loader(parameters), parameters, lambda: (loader(shadow), shadow))  # type: ignore[arg-type, return-value]
    for _ in range(3):
        tensors = {name: torch.rand(4) for name in "abc"}
        reloader.begin({name: TensorSpec(torch.float32, (4,)) for name in "abc"}, "auto")
        reloader.load(list(tensors.items()))
        figures = reloader.finish()
        assert torch.equal(parameters["a"], tensors["a"].exp())
        assert torch.equal(parameters["b"], tensors["b"])
    assert (figures.plan_bytes, figures.loader_bytes) == (32, 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8, torch.float32, torch.float64, torch.complex128])
def test_checksums_tell_any_change_and_any_exchange(dtype: torch.dtype) -> None:
    checksums = Checksums()
    tensor = torch.arange(1, 200).to(dtype)
    original = int(checksums.of(tensor))
    for index in (0, 77, 198):
        changed = tensor.clone()
        changed[index] = 0
        assert int(checksums.of(changed)) != original
    exchanged = tensor.clone()
    exchanged[[3, 4]] = tensor[[4, 3]]
    assert int(checksums.of(exchanged)) != original
    assert int(checksums.of(tensor.clone())) == original
    assert int(checksums.of(tensor.reshape(199, 1).expand(199, 2)[:, 0])) == original


def test_checksums_tell_chunks_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "_CHUNK", 4)
    checksums = Checksums()
    words = torch.arange(11, dtype=torch.int64)
    exchanged = torch.cat((words[4:8], words[:4], words[8:]))
    assert int(checksums.of(words)) != int(checksums.of(exchanged))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8, torch.float8_e4m3fn, torch.int64, torch.complex128])
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (3, 7), (8, 16), (2, 3, 5)])
@pytest.mark.parametrize("batch", [1, 1 << 20])
def test_checksums_of_many_are_those_of_each(
    dtype: torch.dtype, shape: tuple[int, ...], batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the definition, in Python's own integers: chunks of four words with odd weights, and an odd one each."""
    monkeypatch.setattr(proof, "_CHUNK", 4)
    monkeypatch.setattr(proof, "_BATCH", batch)
    checksums = Checksums()
    memory = torch.randint(0, 256, (5, *shape, dtype.itemsize), dtype=torch.uint8).view(dtype)[..., 0]
    for tensors in (list(memory), [tensor.mT if tensor.dim() > 1 else tensor for tensor in memory]):
        found = [int(value) for value in checksums.of_each(tensors)]
        assert found == [int(checksums.of(tensor)) for tensor in tensors]
        for tensor, value in zip(tensors, found, strict=True):
            raw = bytes(tensor.reshape(-1, 1).view(torch.uint8).flatten().tolist()) if tensor.numel() else b""
            words = [int.from_bytes(raw[at : at + 8], "little") for at in range(0, len(raw), 8)]  # zeros behind the end
            weights = checksums._weights_on(tensor.device).tolist()
            terms = [weight * word for weight, word in zip(itertools.cycle(weights), words, strict=False)]
            sums = [sum(terms[at : at + 4]) for at in range(0, len(terms), 4)]
            sums = [sums[-1], *sums[:-1]] if len(words) % 4 else [0, *sums]
            expected = sum((2 * index + 1) * each for index, each in enumerate(sums))
            assert (value - expected) % (1 << 64) == 0


def test_every_single_piece_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """One element of one piece among many alike is wrong; wherever it is, its tensor is named."""
    monkeypatch.setattr(proof, "_BATCH", 200)  # three pieces at a time

    def load(tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in tensors:
            shadow["p"][int(name)].copy_(tensor.t())

    shadow = {"p": torch.empty(8, 5, 3, device="meta")}
    specs = {str(index): TensorSpec(torch.float32, (3, 5)) for index in range(8)}
    plan = make_plan(record(load, shadow, specs), shadow)
    tensors = {name: torch.rand(3, 5) for name in specs}
    memory = torch.stack([tensor.t() for tensor in tensors.values()])
    found = Proof(plan, torch.device("cpu"))
    found.expect(list(tensors.items()), ["p"])
    assert found.differing(["p"]) == {"p": "0"}, "nothing was looked at"
    found.find("p", memory)
    assert found.differing(["p"]) == {}
    for index in range(8):
        wrong = memory.clone()
        wrong[index, 4, 2] += 1
        found.find("p", wrong)
        assert found.differing(["p"]) == {"p": str(index)}
        assert found.differing([]) == {}
