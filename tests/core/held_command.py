"""The command line, whose ranks are `tests.core.held_rank`."""

from __future__ import annotations

from checkpoint_engine.cli import ranks
from checkpoint_engine.cli.main import main

ranks._RANK_MODULE = "tests.core.held_rank"

if __name__ == "__main__":
    main()
