"""Who reads which bucket from whom, when a few receivers take a checkpoint out of others' host memory.

Every receiver reads its part, then the receivers tell each other. The reads are spread so that each sender's and each
receiver's network card carries its share of the bytes from the first moment to the last. Pure: the result depends on
the arguments alone, so every rank computes the same.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Sequence

import msgspec

from checkpoint_engine.errors import SettingError

__all__ = ["Assignment", "Port", "ReadLoad", "assign_receivers", "lower_bound"]


class Port(msgspec.Struct, frozen=True):
    """What connects a sender or receiver to the network. Those with the same `nic` share it.

    `rate` is in bytes per second; only how the rates compare with each other matters.
    """

    nic: str
    rate: float = 1.0


class ReadLoad(msgspec.Struct, frozen=True):
    """Bytes that must travel, and the senders that hold them, as places in the list of senders."""

    nbytes: int
    owners: tuple[int, ...]


class Assignment(msgspec.Struct, frozen=True):
    """One load on its way: places in the lists of loads, senders and receivers."""

    load: int
    sender: int
    receiver: int


def assign_receivers(loads: Sequence[ReadLoad], senders: Sequence[Port], receivers: Sequence[Port]) -> list[Assignment]:
    """Chooses for every load the owner that sends it and the receiver that reads it.

    Returns:
        One move for each load, in the order in which they are to be made: each receiver makes its own in this order.

    Raises:
        SettingError: there is no receiver, a load has no owner, or a rate is not above 0.
    """
    _check(loads, senders, receivers)
    return _Timetable(loads, _choose_senders(loads, senders), senders, receivers).moves()


def lower_bound(loads: Sequence[ReadLoad], senders: Sequence[Port], receivers: Sequence[Port]) -> float:
    """Seconds that no assignment can beat: every card at its rate, all the time.

    It looks at all receivers together, and at the bytes that only the cards of one set of owners can send.
    """
    _check(loads, senders, receivers)
    into = sum(_rates(receivers).values())
    out = _rates(senders)
    total = sum(load.nbytes for load in loads)
    bound = total / into
    by_cards: dict[frozenset[str], int] = defaultdict(int)
    for load in loads:
        by_cards[frozenset(senders[owner].nic for owner in load.owners)] += load.nbytes
    every = frozenset[str]().union(*by_cards)
    for cards in {*by_cards, every}:
        confined = sum(nbytes for held_by, nbytes in by_cards.items() if held_by <= cards)
        if confined:
            bound = max(bound, confined / sum(out[nic] for nic in cards))
    return bound


class _Card:
    """A network card in the timetable: what it has to do, and how much of its rate nobody uses at the moment."""

    def __init__(self, index: int, rate: float) -> None:
        self.index = index
        self.rate = rate
        self.free = rate
        self.enough = 0.0
        """So much must be free for another read to be worth starting."""
        self.seconds = 0.0
        """Sending card: of work not begun yet. Receiving card: of work given to it."""
        self.waits = False
        self.loads: list[int] = []

    def has_room(self) -> bool:
        return self.free >= self.enough


class _Timetable:
    """Lets the reads happen in thought; the order in which they start there is the order in which they are made.

    Whenever cards are free, the one that has most left to send starts with the one that has received least.
    """

    def __init__(
        self, loads: Sequence[ReadLoad], chosen: Sequence[int], senders: Sequence[Port], receivers: Sequence[Port]
    ) -> None:
        self._loads = loads
        self._chosen = chosen
        self._out = {nic: _Card(index, rate) for index, (nic, rate) in enumerate(_rates(senders).items())}
        self._in = {nic: _Card(index, rate) for index, (nic, rate) in enumerate(_rates(receivers).items())}
        _set_thresholds(self._out.values(), self._in.values())
        _set_thresholds(self._in.values(), self._out.values())
        # Small loads last, so that all cards end at about the same time; taken from the end of the list.
        for index in sorted(range(len(loads)), key=lambda i: (loads[i].nbytes, -i)):
            card = self._out[senders[chosen[index]].nic]
            card.loads.append(index)
            card.seconds += loads[index].nbytes / card.rate
        self._behind: dict[int, list[tuple[int, int]]] = {card.index: [] for card in self._in.values()}
        for index, port in enumerate(receivers):
            heapq.heappush(self._behind[self._in[port.nic].index], (0, index))
        self._sending: list[tuple[float, int, _Card]] = []
        self._receiving: list[tuple[float, int, _Card]] = []
        self._running: list[tuple[float, int, float, _Card, _Card]] = []
        self._moves: list[Assignment] = []

    def moves(self) -> list[Assignment]:
        for card in self._out.values():
            self._offer_sender(card)
        for card in self._in.values():
            self._offer_receiver(card)
        self._start_all(0.0)
        while self._running:
            now, _, rate, sender, receiver = heapq.heappop(self._running)
            sender.free += rate
            receiver.free += rate
            self._offer_sender(sender)
            self._offer_receiver(receiver)
            self._start_all(now)
        return self._moves

    def _offer_sender(self, card: _Card) -> None:
        if card.loads and card.has_room() and not card.waits:
            card.waits = True
            heapq.heappush(self._sending, (-card.seconds, card.index, card))

    def _offer_receiver(self, card: _Card) -> None:
        if card.has_room() and not card.waits:
            card.waits = True
            heapq.heappush(self._receiving, (card.seconds, card.index, card))

    def _start_all(self, now: float) -> None:
        while self._sending and self._receiving:
            sender = heapq.heappop(self._sending)[-1]
            receiver = heapq.heappop(self._receiving)[-1]
            sender.waits = receiver.waits = False
            self._start(now, sender, receiver)
            self._offer_sender(sender)
            self._offer_receiver(receiver)

    def _start(self, now: float, sender: _Card, receiver: _Card) -> None:
        index = sender.loads.pop()
        nbytes, rate = self._loads[index].nbytes, min(sender.free, receiver.free)
        sender.seconds -= nbytes / sender.rate
        receiver.seconds += nbytes / receiver.rate
        sender.free -= rate
        receiver.free -= rate
        behind = self._behind[receiver.index]
        carried, rank = behind[0]
        heapq.heapreplace(behind, (carried + nbytes, rank))
        heapq.heappush(self._running, (now + nbytes / rate, len(self._moves), rate, sender, receiver))
        self._moves.append(Assignment(index, self._chosen[index], rank))


def _set_thresholds(cards: Iterable[_Card], partners: Iterable[_Card]) -> None:
    fastest = max((partner.rate for partner in partners), default=0.0)
    for card in cards:
        card.enough = min(card.rate, fastest) / 2


def _choose_senders(loads: Sequence[ReadLoad], senders: Sequence[Port]) -> list[int]:
    """Loads with the fewest owners first, for they have the least choice; large ones before small ones."""
    rates = _rates(senders)
    seconds = dict.fromkeys(rates, 0.0)
    sent = [0] * len(senders)
    chosen = [0] * len(loads)
    for index in sorted(range(len(loads)), key=lambda i: (len(loads[i].owners), -loads[i].nbytes, i)):
        load = loads[index]

        def finished(owner: int, nbytes: int = load.nbytes) -> tuple[float, int, int]:
            nic = senders[owner].nic
            return seconds[nic] + nbytes / rates[nic], sent[owner], owner

        owner = min(load.owners, key=finished)
        seconds[senders[owner].nic] += load.nbytes / rates[senders[owner].nic]
        sent[owner] += load.nbytes
        chosen[index] = owner
    return chosen


def _rates(ports: Iterable[Port]) -> dict[str, float]:
    """Each card once; who shares one states its rate alike."""
    return {port.nic: port.rate for port in ports}


def _check(loads: Sequence[ReadLoad], senders: Sequence[Port], receivers: Sequence[Port]) -> None:
    if not receivers:
        raise SettingError("nobody is there to receive the checkpoint")
    for port in (*senders, *receivers):
        if not port.rate > 0:
            raise SettingError(f"the network card {port.nic!r} has a rate of {port.rate:g}; it must be above 0")
    for index, load in enumerate(loads):
        if not load.owners or any(not 0 <= owner < len(senders) for owner in load.owners):
            raise SettingError(f"load {index} is held by senders {load.owners}, there are {len(senders)}")
