"""A process is killed or stopped in every phase: bounded, named, nothing left behind, and healed by the next update."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timezone

import pytest

from tests.core.fault_matrix import Cell, Matrix, cells
from tests.core.p2p_help import needs_mooncake

SAMPLE = 1
"""Cells that a day runs: each takes a quarter of a minute."""


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Matrix]:
    with pytest.MonkeyPatch.context() as patched:
        made = Matrix(tmp_path_factory.mktemp("m"), patched)
        yield made
        made.close()


def sample() -> list[Cell]:
    """Others every day, until all had their turn; those that need neither a seed nor a new engine afterwards."""
    roles, phases = ("rank 0", "rank 1"), ("gather", "load")
    those = [cell for cell in cells() if cell.role in roles and cell.phase in phases and cell.method != "p2p"]
    start = datetime.now(timezone.utc).toordinal() * SAMPLE
    return [those[(start + number) % len(those)] for number in range(SAMPLE)]


@pytest.mark.long
def test_the_cells_of_the_day(matrix: Matrix) -> None:
    for cell in sample():
        outcome = matrix.run(cell)
        assert not outcome.problems, (str(cell), outcome.problems, outcome.said)


@pytest.mark.endurance
@needs_mooncake
@pytest.mark.parametrize("cell", cells(), ids=str)
def test_every_cell(cell: Cell, matrix: Matrix) -> None:
    outcome = matrix.run(cell)
    assert not outcome.problems, (outcome.problems, outcome.said)
