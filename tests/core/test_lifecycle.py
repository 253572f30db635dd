"""What a worker's weights are after an update that may fail anywhere: allowed moves, and one truth for all who ask."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoint_engine.contract.engine_sink import ComparisonSink, EngineSink
from checkpoint_engine.contract.figures import ComparisonFigures, UpdateFigures
from checkpoint_engine.contract.lifecycle import MOVES, Lifecycle, Move, WeightsState
from checkpoint_engine.contract.sink import Tensors, TensorSpec, Update, WeightSink
from checkpoint_engine.deadline import Cancel, Deadline
from checkpoint_engine.device.cpu import CpuDevice
from checkpoint_engine.device.memory import HostMemory
from checkpoint_engine.errors import (
    CheckpointEngineError,
    CheckpointStateError,
    WeightsRejectedError,
)
from checkpoint_engine.link.channel import Listener, SenderChannel
from checkpoint_engine.link.messages import (
    PROTOCOL,
    Accepted,
    Begin,
    Failed,
    Finish,
    Finished,
    Load,
    Loaded,
    TensorSlice,
    encode_buckets,
)
from checkpoint_engine.receiver.reception import receive_update

pytestmark = pytest.mark.pure

NAMES = ("a", "b", "c")
TENSORS = {name: TensorSpec(torch.uint8, (4,)) for name in NAMES}


def update_to(version: str, tensors: dict[str, TensorSpec] = TENSORS) -> Update:
    return Update("id", "checkpoint", version, tensors)


# -- the table


def ways_to(state: WeightsState) -> Lifecycle:
    """A worker in that state."""
    life = Lifecycle("v0")
    if state is WeightsState.DIRTY:
        life.spoil()
    if state in (WeightsState.BEGUN, WeightsState.LOADING, WeightsState.FINISHED):
        life.begin(update_to("v1"))
    if state in (WeightsState.LOADING, WeightsState.FINISHED):
        life.load()
        life.deliver(NAMES)
    if state is WeightsState.FINISHED:
        life.finish()
    return life


def make(move: Move, life: Lifecycle) -> None:
    if move is Move.FINISH:
        life.deliver(NAMES)
    calls: dict[Move, Callable[[], object]] = {
        Move.BEGIN: lambda: life.begin(update_to("v2")),
        Move.REFUSE: life.refuse,
        Move.LOAD: life.load,
        Move.FINISH: life.finish,
        Move.RESTORE: life.restore,
        Move.SPOIL: life.spoil,
    }
    calls[move]()


@pytest.mark.parametrize("state", WeightsState)
@pytest.mark.parametrize("move", Move)
def test_every_move_leads_where_the_table_says_or_is_refused(state: WeightsState, move: Move) -> None:
    life = ways_to(state)
    assert life.state is state
    expected = MOVES[state].get(move)
    if expected is None:
        before = (life.version, life.dirty, life.update)
        with pytest.raises(CheckpointStateError, match=move.value):
            make(move, life)
        assert (life.state, (life.version, life.dirty, life.update)) == (state, before)
        return
    make(move, life)
    assert life.state is expected
    assert life.under_way == (expected in (WeightsState.BEGUN, WeightsState.LOADING))
    assert life.version == {WeightsState.FINISHED: "v1"}.get(expected, ways_to(state).version)


def test_no_state_is_a_dead_end_and_only_an_update_heals_a_mixture() -> None:
    assert set(MOVES) == set(WeightsState)
    assert {move for move, to in MOVES[WeightsState.DIRTY].items() if to is not WeightsState.DIRTY} == {Move.BEGIN}
    for state in WeightsState:
        reached, new = {state}, {state}
        while new:
            new = {to for each in new for to in MOVES[each].values()} - reached
            reached |= new
        assert WeightsState.FINISHED in reached


@pytest.mark.parametrize("move", [Move.REFUSE, Move.RESTORE])
def test_a_mixture_is_one_still_after_an_update_that_changed_nothing(move: Move) -> None:
    life = ways_to(WeightsState.DIRTY)
    life.begin(update_to("v1"))
    assert life.dirty
    make(move, life)
    assert life.state is WeightsState.DIRTY
    assert "mixture" in life.describe()
    life.begin(update_to("v2"))
    life.deliver(NAMES)
    life.finish()
    assert (life.dirty, life.version, life.describe()) == (False, "v2", "holds version 'v2'")


# -- a sink whose engine is real enough to be looked at


class FaultError(Exception):
    """Made by a test."""


class Engine(EngineSink):
    """Three weights, which are written as they come; fails wherever it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = dict.fromkeys(NAMES, 0)
        self.fault = ""
        self.undoes = False
        self._old: dict[str, int] = {}

    def check(self, update: Update) -> None:
        self._strike("check")
        if set(update.tensors) - set(NAMES):
            raise WeightsRejectedError("unknown")

    def open(self, update: Update) -> None:
        self._old = dict(self.weights)
        self._strike("open")

    def take(self, tensors: Tensors) -> None:
        for name, tensor in tensors:
            self._strike(f"take {name}")
            self.weights[name] = int(tensor[0])
        self._strike("taken")

    def complete(self, update: Update) -> UpdateFigures:
        self._strike("complete")
        return UpdateFigures(reload="loader")

    def restore(self) -> bool:
        self._strike("restore")
        if self.undoes:
            self.weights = self._old
        return self.weights == self._old

    def verifier(self) -> WeightSink:
        return Comparison(self)

    def _strike(self, where: str) -> None:
        if where in self.fault.split(", "):
            raise FaultError(where)


class Comparison(ComparisonSink):
    """Spoils a weight meanwhile, as those do that look at what an engine makes of tensors."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.of = engine
        self._held = dict(engine.weights)

    def check(self, update: Update) -> None: ...

    def open(self, update: Update) -> None:
        self.of.weights["a"] = -1

    def take(self, tensors: Tensors) -> None: ...

    def complete(self, update: Update) -> ComparisonFigures:
        self.restore()
        return ComparisonFigures(compared_tensors=3)

    def restore(self) -> bool:
        if self.of.fault == "restore":
            raise FaultError("restore")
        self.of.weights = self._held
        return True


FAULTS = ("", "check", "open", "take a", "take b", "taken", "lost", "complete", "synchronise")


def drive(sink: Engine, number: int, fault: str, *, fails_to_undo: bool = False) -> bool | None:
    """What the receiver does; returns what the link would say of the weights, None where all went well."""
    sink.fault = f"{fault}, restore" if fails_to_undo else fault
    try:
        sink.begin(update_to(f"v{number}"))
        for name in NAMES[: 2 if fault == "lost" else 3]:
            sink.load([(name, torch.full((4,), number, dtype=torch.uint8))])
        sink.finish()
        sink._strike("synchronise")
    except (FaultError, WeightsRejectedError):
        try:
            return sink.abort()
        except FaultError:
            return False
    return None


@given(st.lists(st.tuples(st.sampled_from(FAULTS), st.booleans(), st.booleans()), max_size=6))
def test_what_is_said_of_the_weights_is_true_whatever_failed(updates: list[tuple[str, bool, bool]]) -> None:
    sink = Engine()
    for number, (fault, undoes, fails_to_undo) in enumerate(updates, start=1):
        sink.undoes = undoes
        said = drive(sink, number, fault, fails_to_undo=fails_to_undo)
        assert said in (None, not sink.dirty), "the link and the status are one truth"
        if not sink.dirty:
            version = int(sink.version.removeprefix("v") or 0)
            assert sink.weights == dict.fromkeys(NAMES, version)
        assert not sink.life.under_way
        assert sink.state in (WeightsState.IDLE, WeightsState.FINISHED, WeightsState.DIRTY)
        assert (said is None) == (sink.state is WeightsState.FINISHED) == (fault == "")


def test_calls_out_of_order_are_refused_and_change_nothing() -> None:
    sink = Engine()
    with pytest.raises(CheckpointStateError, match=r"load was called while no update is under way \(idle\)"):
        sink.load([])
    with pytest.raises(CheckpointStateError, match="finish was called while no update is under way"):
        sink.finish()
    assert sink.abort() is True
    sink.begin(update_to("v1"))
    with pytest.raises(CheckpointStateError, match="begin was called while an update to version 'v1' is under way"):
        sink.begin(update_to("v2"))
    assert sink.abort() is True
    assert (sink.state, sink.version, sink.dirty) == (WeightsState.IDLE, "", False)


def test_a_comparison_leaves_the_engines_books_alone_unless_it_cannot_put_things_back() -> None:
    sink = Engine()
    assert drive(sink, 1, "") is None
    for breaks, fault in itertools.product((False, True), ("", "restore")):
        comparison = sink.verifier()
        sink.fault = ""
        comparison.begin(update_to("v2"))
        if not breaks:
            for name in NAMES:
                comparison.load([(name, torch.zeros(4))])
            assert comparison.finish() == ComparisonFigures(compared_tensors=3)
            continue
        sink.fault = fault
        if fault:
            with pytest.raises(FaultError):
                comparison.abort()
            assert sink.dirty
        else:
            assert comparison.abort() is True
            assert (sink.weights["a"], sink.version, sink.state) == (1, "v1", WeightsState.FINISHED)
    assert drive(sink, 1, "") is None
    assert not sink.dirty


def test_figures_are_filled_in_and_travel_as_one_flat_map() -> None:
    sink = Engine()
    sink.begin(update_to("v1"))
    sink.load([(name, torch.ones(4, dtype=torch.uint8)) for name in NAMES])
    figures = sink.finish()
    assert isinstance(figures, UpdateFigures)
    assert (figures.tensors, figures.reload, sink.nbytes) == (3, "loader", 12)
    assert min(figures.check_seconds, figures.load_seconds, figures.finish_seconds) > 0
    more = UpdateFigures(tensors=1, reload="plan", engine={"vllm": "0.32.0", "draft_tensors": 0})
    assert more.details()["vllm"] == "0.32.0"
    assert "engine" not in more.details()
    assert UpdateFigures.from_details(more.details()) == more
    assert UpdateFigures().details() == {}
    assert UpdateFigures.from_details({"tensors": "many", "new": 1}).engine == {"tensors": "many", "new": 1}
    found = ComparisonFigures(compared_tensors=2, different="p")
    assert ComparisonFigures.from_details({**found.details(), "nbytes": 3}) == found
    assert found.equal
    assert not ComparisonFigures().equal
    assert not ComparisonFigures(compared_tensors=2, unseen_tensors=1).equal


# -- over a real link


class Cpu(CpuDevice):
    """Fails to synchronise from the given call on."""

    def __init__(self, fails_at: int) -> None:
        super().__init__(0)
        self.left = fails_at

    def synchronize(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("an illegal memory access was encountered")


@pytest.fixture
def listener(short_path: Path) -> Iterator[Listener]:
    found = Listener(short_path)
    yield found
    found.close()


def send(channel: SenderChannel, until: type) -> object:
    """Announces three tensors in one bucket, sends them, and reads answers until one of that kind comes."""
    buckets = encode_buckets([[TensorSlice(name, "uint8", (4,), 4 * at) for at, name in enumerate(NAMES)]])
    memory = CpuDevice(0).allocate(12)
    memory.tensor.fill_(7)
    begin = Begin(PROTOCOL, "0", "0", "id", "checkpoint", "v7", HostMemory(12), buckets)
    channel.send(begin, Deadline(5), memory.descriptors)
    answers: dict[type, Load | Finish] = {Accepted: Load(0, 0), Loaded: Finish()}
    while True:
        answer = channel.receive(Deadline(5), "an answer")
        if type(answer) in answers:
            channel.send(answers[type(answer)], Deadline(5))
        if isinstance(answer, (until, Failed)):
            memory.close()
            return answer


def test_a_device_that_fails_after_the_finish_leaves_a_mixture_for_link_and_status(listener: Listener) -> None:
    sink = Engine()
    with ThreadPoolExecutor(1) as pool:
        receiving = pool.submit(receive_update, listener.handle, sink, Cpu(fails_at=1), timeout=10.0)
        channel, _ = listener.accept(Deadline(5), Cancel(), "the worker connecting")
        with channel:
            answer = send(channel, Finished)
            assert isinstance(receiving.exception(5), RuntimeError)
    assert isinstance(answer, Failed)
    assert (answer.dirty, answer.complete, answer.phase) == (True, False, "finish")
    assert (sink.dirty, sink.state, sink.version) == (True, WeightsState.DIRTY, "v7")
    assert drive(sink, 8, "") is None
    assert not sink.dirty


def test_memory_that_cannot_be_unmapped_after_the_finish_leaves_the_new_weights(listener: Listener) -> None:
    sink = Engine()
    with ThreadPoolExecutor(1) as pool:
        receiving = pool.submit(receive_update, listener.handle, sink, Cpu(fails_at=2), timeout=10.0)
        channel, _ = listener.accept(Deadline(5), Cancel(), "the worker connecting")
        with channel:
            answer = send(channel, Finished)
            assert isinstance(receiving.exception(5), RuntimeError)
    assert isinstance(answer, Failed)
    assert (answer.dirty, answer.complete) == (False, True)
    assert (sink.dirty, sink.state, sink.version) == (False, WeightsState.FINISHED, "v7")


def test_a_sender_that_dies_before_it_hears_of_the_finish_leaves_the_new_weights(listener: Listener) -> None:
    sink = Engine()
    with ThreadPoolExecutor(1) as pool:
        receiving = pool.submit(receive_update, listener.handle, sink, CpuDevice(0), timeout=10.0)
        channel, _ = listener.accept(Deadline(5), Cancel(), "the worker connecting")
        original, gone = sink.complete, threading.Event()

        def complete(update: Update) -> UpdateFigures:
            assert gone.wait(5)
            return original(update)

        sink.complete = complete
        send(channel, Loaded)  # and then Finish
        channel.close()
        gone.set()
        error = receiving.exception(10)
    assert isinstance(error, CheckpointEngineError)
    assert "the update is complete, and this worker holds version 'v7'" in str(error)
    assert (sink.dirty, sink.state, sink.version) == (False, WeightsState.FINISHED, "v7")
    assert set(sink.weights.values()) == {7}
    assert sink.life.describe() == "holds version 'v7'"
