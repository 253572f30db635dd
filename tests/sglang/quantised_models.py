"""Runs in SGLang's environment: makes tiny checkpoints as tests/vllm/models.py does, of a few more kinds.

quantised_models.py DIR NAME...
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "vllm"))

import models
from models import KINDS, WIDE, Kind, make
from quantise import FORMATS, Format

models.FORMATS = {
    **FORMATS,
    "w8a8-int8": Format(FORMATS["int8-channel"].store, {"quant_method": "w8a8_int8", "ignore": []}),
}
KINDS["widemoe"] = Kind("moe", size=WIDE)
KINDS["w8a8int8"] = Kind("qwen3", "w8a8-int8", WIDE)
KINDS["fp8tensormoe"] = Kind("moe", "fp8-tensor", WIDE)

if __name__ == "__main__":
    for checkpoint in sys.argv[2:]:
        make(Path(sys.argv[1]), checkpoint)
