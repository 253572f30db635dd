"""Which rank each of verl's processes is, and where they meet: from what all of them tell before an update. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

from checkpoint_engine.errors import CheckpointStateError

__all__ = ["Address", "Preparation", "plan_topology"]

Address = tuple[str, int, str]
"""Host, port, and a secret that ranks of several hosts know each other by; as plain data, for Ray to carry."""


class Preparation(TypedDict):
    """What a process tells before an update."""

    host: str
    run: str
    """Which ranks it is connected with; empty if with none."""
    rank: int
    """Which of them it is; -1 if none."""
    ranks: int
    """How many they are."""
    offer: Address | None
    """Of the trainer's first rank: where all could meet anew."""


def plan_topology(
    trainers: int, rollouts: int, told: Sequence[Preparation]
) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """Arguments of `init_process_group`, a list with a value for each process: of the trainer, and of the rollouts.

    Who are connected as they stand here stay so; if one is not, as after a restart, all meet anew.

    Raises:
        CheckpointStateError: a process is missing, or none is the trainer's first.
    """
    ranks = trainers + rollouts
    offers = [each["offer"] for each in told if each["offer"] is not None]
    if len(told) != ranks or len(offers) != 1:
        raise CheckpointStateError(
            f"verl has prepared {len(told)} processes of {ranks}, of which {len(offers)} are a trainer's first"
        )
    host, port, secret = offers[0]
    if len({each["host"] for each in told}) == 1:
        host, secret = "127.0.0.1", ""
    run = told[0]["run"]
    places = [(each["run"], each["rank"], each["ranks"]) for each in told]
    met = run and places == [(run, rank, ranks) for rank in range(ranks)]
    shared = {
        "ranks": ranks,
        "trainers": trainers,
        "run": run if met else f"{host}:{port}",
        "at": (host, port, secret),
    }

    def of(first: int, count: int) -> dict[str, list[Any]]:
        alike: dict[str, list[Any]] = {key: [value] * count for key, value in shared.items()}
        return {"rank": list(range(first, first + count)), **alike}

    return of(0, trainers), of(trainers, rollouts)
