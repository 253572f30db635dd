"""What people see of an update where no terminal shows a bar."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from checkpoint_engine.cli import summary
from checkpoint_engine.cli.messages import Progressed
from checkpoint_engine.cli.summary import UpdateView
from checkpoint_engine.contract.phase import Phase

pytestmark = pytest.mark.pure


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=80)


def lines(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_the_start_is_told_before_any_rank_speaks(console: Console) -> None:
    with UpdateView(console) as view:
        assert lines(console) == ["starting the ranks …"]
        view(Progressed(Phase.READ))
        view(Progressed(Phase.READ))
    assert lines(console) == ["starting the ranks …", "reading the files …"]


def test_bytes_are_told_in_a_long_phase(console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    with UpdateView(console) as view:
        view(Progressed(Phase.LOAD, 0, 400_000_000))
        view(Progressed(Phase.LOAD, 100_000_000, 400_000_000))
        assert lines(console)[1:] == ["sending …"]
        monkeypatch.setattr(summary, "_SILENCE", -1.0)
        view(Progressed(Phase.LOAD, 200_000_000, 400_000_000))
    assert lines(console)[1:] == ["sending …", "sending … 200 MB of 400 MB"]
