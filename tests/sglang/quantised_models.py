"""Runs in SGLang's environment: makes tiny checkpoints as tests/vllm/models.py does, of a few more kinds.

quantised_models.py DIR NAME...
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "vllm"))

from models import KINDS, WIDE, Kind, make

KINDS["fp8tensormoe"] = Kind("moe", "fp8-tensor", WIDE)

if __name__ == "__main__":
    for checkpoint in sys.argv[2:]:
        make(Path(sys.argv[1]), checkpoint)
