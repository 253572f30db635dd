"""What every sink must do: checks that run on any engine, in its own environment, without a test framework.

Tell with an `EngineUnderTest` how to look at your engine, and run each of `CHECKS` on it, in order:

    @pytest.mark.parametrize("name", CHECKS)
    def test_contract(name: str, engine: EngineUnderTest) -> None:
        CHECKS[name](engine)

They take for granted only what `EngineUnderTest` promises, share no code with what they test, and leave the engine in
whatever state the next check brings it out of.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from checkpoint_engine.contract.sink import Selective, TensorSpec, Update, Verifiable, WeightSink
from checkpoint_engine.device import type_of
from checkpoint_engine.errors import CheckpointEngineError, WeightsRejectedError

__all__ = ["CHECKS", "ContractBrokenError", "EngineUnderTest", "Tensors", "run_checks"]

_ALIGNMENT = 256
_GARBAGE = 0x41
_SURPRISE = "contract.nobody.knows.this.weight"
_SMALL, _WHOLE = 1, 1 << 62

Tensors = dict[str, torch.Tensor]
_Details = Mapping[str, str | int | float]


class ContractBrokenError(AssertionError):
    """A sink does not do what it must; the message says what."""


class EngineUnderTest(ABC):
    """A running engine of one worker with a small model, its sink, and eyes of the test's own."""

    device: torch.device = torch.device("cpu")
    """Where the engine wants tensors."""

    @property
    @abstractmethod
    def sink(self) -> WeightSink:
        """The engine's one sink; it has `dirty` and `version`."""

    @abstractmethod
    def checkpoint(self, number: int) -> Tensors:
        """Checkpoint 0 or 1: all tensors of the model, of which every one differs between the two."""

    @abstractmethod
    def cold(self, number: int) -> Mapping[str, str]:
        """The `state` of an engine that was started with that checkpoint in its usual way, without any of our code."""

    @abstractmethod
    def state(self) -> Mapping[str, str]:
        """What the engine computes with, digested: two engines of equal states give the same answers."""

    @abstractmethod
    def addresses(self) -> Mapping[str, int]:
        """Where each parameter lies."""

    @abstractmethod
    def spoil(self) -> None:
        """Flips one bit of a parameter; called again, flips it back."""

    def needed(self) -> str:
        """Name of a matrix in the checkpoint without which the model is not whole."""
        return next(name for name, tensor in self.checkpoint(0).items() if tensor.dim() > 1)


class _StoppedError(Exception):
    """The sender is gone."""


def _need(holds: bool, words: str) -> None:  # noqa: FBT001 - reads as `assert` does
    if not holds:
        raise ContractBrokenError(words)


def _announce(sink: WeightSink, tensors: Tensors, version: str, reload: Any = "auto") -> None:  # noqa: ANN401
    specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    sink.begin(Update("contract", "contract", version, specs, reload))


def _buckets(tensors: Tensors, size: int) -> Iterator[list[str]]:
    bucket: list[str] = []
    filled = 0
    for name, tensor in tensors.items():
        if bucket and filled + tensor.nbytes > size:
            yield bucket
            bucket, filled = [], 0
        bucket.append(name)
        filled += tensor.nbytes
    if bucket:
        yield bucket


class _Sender:
    """Delivers out of one block of memory, which is overwritten as soon as a sink has returned from `load`."""

    def __init__(self, engine: EngineUnderTest, tensors: Tensors) -> None:
        nbytes = sum(-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors.values())
        self._memory = torch.empty(max(nbytes, 1), dtype=torch.uint8, device=engine.device)
        self._tensors = tensors

    def load(self, sink: WeightSink, names: Sequence[str]) -> None:
        sink.load(self._placed(names))
        type_of(self._memory.device).synchronize(self._memory.device)
        self._memory.fill_(_GARBAGE)

    def _placed(self, names: Sequence[str]) -> list[tuple[str, torch.Tensor]]:
        placed: list[tuple[str, torch.Tensor]] = []
        start = 0
        for name in names:
            tensor = self._tensors[name]
            piece = self._memory[start : start + tensor.nbytes]
            piece.copy_(tensor.detach().contiguous().reshape(-1).view(torch.uint8))
            placed.append((name, piece.view(tensor.dtype).view(tensor.shape)))
            start += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        return placed


def _update(
    engine: EngineUnderTest,
    sink: WeightSink,
    tensors: Tensors,
    version: str,
    size: int = _WHOLE,
    reload: str = "auto",
    stop_after: int | None = None,
) -> _Details:
    _announce(sink, tensors, version, reload)
    sender = _Sender(engine, tensors)
    for number, names in enumerate(_buckets(tensors, size)):
        if number == stop_after:
            raise _StoppedError
        sender.load(sink, names)
    finished: Any = sink.finish()
    return finished.details() if hasattr(finished, "details") else finished


def _version(engine: EngineUnderTest) -> object:
    return getattr(engine.sink, "version", None)


def _dirty(engine: EngineUnderTest) -> bool:
    return bool(getattr(engine.sink, "dirty", False))


def _bring_to(engine: EngineUnderTest, number: int) -> None:
    """A complete update heals whatever an earlier check left."""
    _update(engine, engine.sink, engine.checkpoint(number), f"v{number}")
    _expect(engine, number, "after a complete update")


def _expect(engine: EngineUnderTest, number: int, when: str) -> None:
    state, cold = engine.state(), engine.cold(number)
    wrong = [name for name in {*state, *cold} if state.get(name) != cold.get(name)]
    _need(not wrong, f"{when} the engine holds something else than a cold start of checkpoint {number}: {wrong[:8]}")
    _need(not _dirty(engine), f"{when} the sink calls whole weights dirty")
    _need(_version(engine) == f"v{number}", f"{when} the sink says version {_version(engine)!r}, not v{number}")


def _expect_truth(engine: EngineUnderTest, intact: bool, before: Mapping[str, str], when: str) -> None:  # noqa: FBT001
    _need(intact is not _dirty(engine), f"{when} abort returned {intact}, and the sink's `dirty` says {_dirty(engine)}")
    if intact:
        _need(dict(engine.state()) == dict(before), f"{when} abort said that the old weights are whole; they are not")
        _need(_version(engine) == "v0", f"{when} the old weights are whole, but of version {_version(engine)!r}")


# -- the checks, in the order in which they are run -----------------------------------------------------------------


def _the_engines_differ(engine: EngineUnderTest) -> None:
    """The test itself can tell the two checkpoints apart."""
    _need(dict(engine.cold(0)) != dict(engine.cold(1)), "checkpoints 0 and 1 look the same to this test")
    same = [n for n, t in engine.checkpoint(0).items() if t.numel() and torch.equal(t, engine.checkpoint(1)[n])]
    _need(not same, f"checkpoints 0 and 1 have the same {same[:8]}")


def _updates_in_a_row(engine: EngineUnderTest) -> None:
    """By the loader, by the proof and by plan, to and fro, each equal to a cold start; memory overwritten each time."""
    for turn in range(6):
        _bring_to(engine, turn % 2)


def _buckets_of_any_size(engine: EngineUnderTest) -> None:
    """One tensor at a time, all at once, a few at a time; and in another order."""
    most = max(tensor.nbytes for tensor in engine.checkpoint(0).values())
    for number, size in ((0, _SMALL), (1, _WHOLE), (0, 2 * most)):
        _update(engine, engine.sink, engine.checkpoint(number), f"v{number}", size)
        _expect(engine, number, f"after an update in buckets of {size} bytes")
    turned = dict(reversed(engine.checkpoint(1).items()))
    _update(engine, engine.sink, turned, "v1", most)
    _expect(engine, 1, "after an update in another order")


def _without_a_plan(engine: EngineUnderTest) -> None:
    """`reload="loader"` goes by nothing else."""
    for number in (0, 1):
        _update(engine, engine.sink, engine.checkpoint(number), f"v{number}", reload="loader")
        _expect(engine, number, "after an update by the loader")


def _addresses_stay(engine: EngineUnderTest) -> None:
    """CUDA graphs read where the parameters were."""
    _bring_to(engine, 0)
    before = dict(engine.addresses())
    for number in (1, 0, 1):
        _bring_to(engine, number)
    moved = [name for name, address in engine.addresses().items() if before.get(name) != address]
    _need(not moved and before.keys() == engine.addresses().keys(), f"an update moved {moved[:8]}")


def _refused_before_anything_changes(engine: EngineUnderTest) -> None:
    """A tensor too many, too few, or of another shape: refused by name, and the old weights stay."""
    _bring_to(engine, 0)
    before, needed = engine.state(), engine.needed()
    good = engine.checkpoint(1)
    cut = good[needed][:-1].contiguous()
    wrong = {
        _SURPRISE: {**good, _SURPRISE: torch.ones(3, dtype=good[needed].dtype)},
        f"{needed} (misshapen)": {**good, needed: cut},
        f"{needed} (missing)": {name: tensor for name, tensor in good.items() if name != needed},
        "nothing at all": {},
    }
    for what, tensors in wrong.items():
        try:
            _announce(engine.sink, tensors, "v1")
        except WeightsRejectedError as error:
            _need(bool(str(error)), f"{what}: the refusal has no words")
        else:
            engine.sink.abort()
            raise ContractBrokenError(f"{what}: begin took it")
        _need(engine.sink.abort() is True, f"{what}: after a refusal abort must say that the old weights are whole")
        _expect_truth(engine, True, before, f"{what}: after a refusal")
    _expect(engine, 0, "after refusals")
    _bring_to(engine, 1)


def _given_up_anywhere(engine: EngineUnderTest) -> None:
    """A sender dies after any bucket: abort tells the truth, and a complete update heals."""
    _bring_to(engine, 0)
    tensors = engine.checkpoint(1)
    for after in (0, 1, len(tensors) // 2, len(tensors) - 1):
        _bring_to(engine, 0)
        before = engine.state()
        try:
            _update(engine, engine.sink, tensors, "v1", _SMALL, stop_after=after)
        except _StoppedError:
            intact = engine.sink.abort()
        else:
            raise ContractBrokenError("the test did not stop")
        when = f"given up after {after} of {len(tensors)} tensors:"
        _expect_truth(engine, intact, before, when)
        _need(intact or after > 0, f"{when} nothing had come, so the old weights must be whole")
    _bring_to(engine, 1)
    _bring_to(engine, 0)


def _given_up_by_plan(engine: EngineUnderTest) -> None:
    """A sender dies once the plan is trusted: whichever way the old weights are brought back, they come back whole."""
    tensors = engine.checkpoint(1)
    for after in (1, len(tensors) // 2, len(tensors) - 1):
        for turn in (0, 1, 0):
            _bring_to(engine, turn)
        with contextlib.suppress(_StoppedError):
            _update(engine, engine.sink, tensors, "v1", _SMALL, stop_after=after)
        engine.sink.abort()
        _bring_to(engine, 0)


def _an_older_mixture_stays_one(engine: EngineUnderTest) -> None:
    """An update that is refused later heals nothing."""
    _bring_to(engine, 0)
    tensors = engine.checkpoint(1)
    try:
        _update(engine, engine.sink, tensors, "v1", _SMALL, stop_after=len(tensors) - 1)
    except _StoppedError:
        engine.sink.abort()
    was_dirty = _dirty(engine)
    try:
        _announce(engine.sink, {}, "v1")
    except WeightsRejectedError:
        engine.sink.abort()
    _need(_dirty(engine) is was_dirty, "a refused update changed what the sink says of older damage")
    _bring_to(engine, 1)


def _announced_and_not_delivered(engine: EngineUnderTest) -> None:
    """`finish` counts."""
    _bring_to(engine, 0)
    before, tensors, needed = engine.state(), engine.checkpoint(1), engine.needed()
    _announce(engine.sink, tensors, "v1")
    sender = _Sender(engine, tensors)
    for name in tensors:
        if name != needed:
            sender.load(engine.sink, [name])
    try:
        engine.sink.finish()
    except WeightsRejectedError as error:
        _need(needed in str(error) or bool(str(error)), "the refusal has no words")
    else:
        raise ContractBrokenError(f"finish took an update that lacked {needed}")
    _expect_truth(engine, engine.sink.abort(), before, "a tensor did not come:")
    _bring_to(engine, 1)


def _out_of_order(engine: EngineUnderTest) -> None:
    """Calls outside of an update are refused, and change nothing."""
    _bring_to(engine, 0)
    tensors = engine.checkpoint(1)
    sender = _Sender(engine, tensors)
    for what, call in (
        ("load", lambda: sender.load(engine.sink, [engine.needed()])),
        ("finish", engine.sink.finish),
    ):
        try:
            call()
        except CheckpointEngineError:
            continue
        raise ContractBrokenError(f"{what} worked outside of an update")
    _expect(engine, 0, "after calls outside of an update")


def _verified(engine: EngineUnderTest) -> None:
    """A comparison finds nothing where nothing is wrong, one flipped bit, another checkpoint; and changes nothing."""
    sink = engine.sink
    if not isinstance(sink, Verifiable):
        return
    for turn in (0, 1):
        _bring_to(engine, turn)
    _bring_to(engine, 0)

    def differing(number: int) -> int:
        details = _update(engine, sink.verifier(), engine.checkpoint(number), f"v{number}", reload="verify")
        _need(int(details["compared_tensors"]) > 0, "a comparison compared nothing")
        return int(details["different_tensors"])

    _need(differing(0) == 0, "a comparison with the weights held found something")
    _expect(engine, 0, "after a comparison")
    _need(differing(1) > 0, "a comparison with another checkpoint found nothing")
    _expect(engine, 0, "after a comparison with another checkpoint")
    engine.spoil()
    _need(differing(0) > 0, "a comparison did not find one flipped bit")
    engine.spoil()
    _need(differing(0) == 0, "a comparison found something after the bit was flipped back")
    _expect(engine, 0, "after comparisons")


def _wanted_is_enough(engine: EngineUnderTest) -> None:
    """What a sink does not want to read may hold anything."""
    sink = engine.sink
    if not isinstance(sink, Selective):
        return
    for turn in range(4):
        _bring_to(engine, turn % 2)
    tensors = engine.checkpoint(0)
    _announce(sink, tensors, "v0")
    for name, tensor in tensors.items():
        whole = tensor.detach().contiguous().reshape(-1).view(torch.uint8).to(engine.device)
        ranges = sink.wanted([(name, 0)])
        given = whole.clone() if ranges is None else torch.full_like(whole, _GARBAGE)
        for start, nbytes in ranges or ():
            given[start : start + nbytes] = whole[start : start + nbytes]
        sink.load([(name, given.view(tensor.dtype).view(tensor.shape))])
    sink.finish()
    _expect(engine, 0, "after an update of which only the wanted bytes came")


CHECKS: Mapping[str, Callable[[EngineUnderTest], None]] = MappingProxyType(
    {
        check.__name__.removeprefix("_"): check
        for check in (
            _the_engines_differ,
            _updates_in_a_row,
            _buckets_of_any_size,
            _without_a_plan,
            _addresses_stay,
            _refused_before_anything_changes,
            _given_up_anywhere,
            _given_up_by_plan,
            _an_older_mixture_stays_one,
            _announced_and_not_delivered,
            _out_of_order,
            _verified,
            _wanted_is_enough,
        )
    }
)
"""By name, in the order in which they are run."""


def run_checks(engine: EngineUnderTest) -> dict[str, str]:
    """Runs all checks, where there is no test framework; name -> what is wrong, or nothing."""
    return {name: _verdict(check, engine) for name, check in CHECKS.items()}


def _verdict(check: Callable[[EngineUnderTest], None], engine: EngineUnderTest) -> str:
    try:
        check(engine)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the verdict
        return f"{type(error).__name__}: {error}"
    return ""
