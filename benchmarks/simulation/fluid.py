"""Bytes that flow over wires, and what they wait for: an event-driven simulation in which a wire is shared fairly.

Rates are max-min fair, by progressive filling (Bertsekas and Gallager, Data Networks, 6.5.2): all that share wires grow
alike until a wire is full; those on it stay as they are, the rest grows on.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["Flow", "Interval", "simulate"]

_DELAY, _END = 0, 1


@dataclass(frozen=True)
class Flow:
    """Waits for others, then `seconds` long, then for `nbytes` bytes to have passed over each of its wires."""

    name: str
    nbytes: float = 0.0
    wires: tuple[str, ...] = ()
    after: tuple[int, ...] = ()
    """Places of those that must have ended."""
    seconds: float = 0.0


@dataclass(frozen=True)
class Interval:
    """When something flowed, in seconds."""

    begin: float
    end: float


@dataclass
class _Active:
    left: float
    rate: float = 0.0
    since: float = 0.0
    stamp: int = 0


@dataclass
class _State:
    wires: Mapping[str, float]
    flows: Sequence[Flow]
    active: dict[int, _Active] = field(default_factory=dict)
    on_wire: dict[str, set[int]] = field(default_factory=dict)
    events: list[tuple[float, int, int, int]] = field(default_factory=list)
    """Time, kind, place of the flow, stamp of the rate with which this was foreseen."""


def simulate(wires: Mapping[str, float], flows: Sequence[Flow]) -> list[Interval]:
    """Lets everything happen; `wires` have their rates in bytes per second.

    Raises:
        ValueError: a flow waits for itself, through others or directly, or has bytes and no wire.
    """
    state, order = _State(wires, flows), _Order(flows)
    begins, ends = dict[int, float](), dict[int, float]()

    def begin(places: Iterable[int], now: float) -> None:
        for place in places:
            begins[place] = now
            heapq.heappush(state.events, (now + flows[place].seconds, _DELAY, place, 0))

    begin(order.first(), 0.0)
    while state.events:
        now, kind, place, stamp = heapq.heappop(state.events)
        if _ends(state, now, kind, place, stamp):
            ends[place] = now
            begin(order.freed_by(place), now)
    if len(ends) < len(flows):
        raise ValueError(f"{next(flow.name for place, flow in enumerate(flows) if place not in ends)} waits for ever")
    return [Interval(begins[place], ends[place]) for place in range(len(flows))]


class _Order:
    """What each flow still waits for."""

    def __init__(self, flows: Sequence[Flow]) -> None:
        self._missing = [len(set(flow.after)) for flow in flows]
        self._waiting: dict[int, list[int]] = {}
        for place, flow in enumerate(flows):
            if flow.nbytes and not flow.wires:
                raise ValueError(f"{flow.name} has bytes and no wire")
            for other in set(flow.after):
                self._waiting.setdefault(other, []).append(place)

    def first(self) -> list[int]:
        return [place for place, count in enumerate(self._missing) if not count]

    def freed_by(self, ended: int) -> list[int]:
        waiting = self._waiting.get(ended, ())
        for place in waiting:
            self._missing[place] -= 1
        return [place for place in waiting if not self._missing[place]]


def _ends(state: _State, now: float, kind: int, place: int, stamp: int) -> bool:
    """Whether this event is the end of a flow; otherwise it is the beginning of its bytes, or foreseen and not true."""
    if kind == _DELAY:
        if state.flows[place].nbytes:
            _start(state, place, now)
        return not state.flows[place].nbytes
    if place not in state.active or state.active[place].stamp != stamp:
        return False
    _stop(state, place, now)
    return True


def _start(state: _State, place: int, now: float) -> None:
    state.active[place] = _Active(state.flows[place].nbytes, since=now)
    for wire in state.flows[place].wires:
        state.on_wire.setdefault(wire, set()).add(place)
    _share(state, state.flows[place].wires, now)


def _stop(state: _State, place: int, now: float) -> None:
    del state.active[place]
    for wire in state.flows[place].wires:
        state.on_wire[wire].discard(place)
    _share(state, state.flows[place].wires, now)


def _share(state: _State, wires: Iterable[str], now: float) -> None:
    """Rates anew for all that these wires connect."""
    places = _connected(state, wires)
    for place, rate in _fair_rates(state, places).items():
        flow = state.active[place]
        if rate == flow.rate:
            continue
        flow.left -= flow.rate * (now - flow.since)
        flow.rate, flow.since, flow.stamp = rate, now, flow.stamp + 1
        heapq.heappush(state.events, (now + max(0.0, flow.left) / rate, _END, place, flow.stamp))


def _connected(state: _State, wires: Iterable[str]) -> set[int]:
    reached, places, ahead = set(wires), set[int](), list(wires)
    while ahead:
        for place in state.on_wire.get(ahead.pop(), ()):
            if place not in places:
                places.add(place)
                new = [wire for wire in state.flows[place].wires if wire not in reached]
                reached.update(new)
                ahead += new
    return places


def _fair_rates(state: _State, places: set[int]) -> dict[int, float]:
    rates: dict[int, float] = {}
    users = {wire: {*state.on_wire[wire]} for place in places for wire in state.flows[place].wires}
    free = {wire: state.wires[wire] for wire in users}
    while len(rates) < len(places):
        full = min((wire for wire in users if users[wire]), key=lambda wire: free[wire] / len(users[wire]))
        rate = free[full] / len(users[full])
        for place in list(users[full]):
            rates[place] = rate
            for wire in state.flows[place].wires:
                users[wire].discard(place)
                free[wire] -= rate
    return rates
