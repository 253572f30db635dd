"""What wires carry, and what a step costs besides bytes."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Machine"]


@dataclass(frozen=True)
class Machine:
    """Hosts that are alike. Bytes per second, and seconds; the defaults were measured on hosts of two H200 or H100.

    Network cards are the exception: none was there to be measured.
    """

    hosts: int = 1
    gpus: int = 8
    """Of a host."""
    bus: float = 55e9
    """Host memory to one GPU, all GPUs at once."""
    broadcast: float = 367e9
    """NCCL, within a host."""
    device_copy: float = 577e9
    """Pieces of a plan within a GPU's memory, by the driver."""
    card: float = 45e9
    """ASSUMED: payload of one card of 400 Gbit/s; a host has one for each GPU."""
    hop: float = 12e-6
    """ASSUMED: what a broadcast needs to get from host to host."""
    prelude: float = 0.07
    """Until the engine is paused and its workers have connected and checked what will come."""
    turn: float = 0.7e-3
    """Of a worker for a bucket in staging: it hears of it, plays its plan, answers."""
    direct_turn: float = 0.15e-3
    """The same where it copies out of host memory, several buckets ahead of the bus."""
    ending: float = 0.004
    """Until all workers have finished."""
    gatherings: int = 4
    """Of the ranks in an update."""
    gathering: float = 0.06e-3
    """Of rank 0, for each rank in a gathering (`rank_gatherings.py`)."""

    @property
    def ranks(self) -> int:
        """One for each GPU."""
        return self.hosts * self.gpus

    @property
    def control(self) -> float:
        """Seconds of an update in which ranks only talk."""
        return self.gatherings * self.gathering * (self.ranks if self.ranks > 1 else 0)

    def wires(self) -> dict[str, float]:
        """Rates by name: a bus, a memory and a card for each GPU, and a way by which a broadcast gets to all."""
        rates = {"broadcast": self.broadcast if self.hosts == 1 else min(self.broadcast, self.card * self.gpus)}
        for rank in range(self.ranks):
            rates |= {
                f"bus{rank}": self.bus,
                f"memory{rank}": self.device_copy,
                f"in{rank}": self.card,
                f"out{rank}": self.card,
            }
        return rates
