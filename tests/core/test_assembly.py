"""What is sent of a checkpoint and of its draft model's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoint_engine.errors import CheckpointFormatError, SettingError
from checkpoint_engine.source.assembly import assemble
from checkpoint_engine.source.loader import load_files
from checkpoint_engine.source.names import NameRules

pytestmark = pytest.mark.pure


@pytest.fixture
def served(tmp_path: Path) -> Path:
    return written(tmp_path / "served", 1.0)


@pytest.fixture
def draft(tmp_path: Path) -> Path:
    return written(tmp_path / "draft", 2.0)


def written(directory: Path, value: float) -> Path:
    directory.mkdir()
    tensors = {"module.embed": torch.full((8, 2), value), "module.norm": torch.full((2,), value)}
    save_file(tensors, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize("ranks", [1, 3])
def test_both_are_sent_and_neither_is_taken_for_the_other(served: Path, draft: Path, ranks: int) -> None:
    found = assemble(served, draft, NameRules(strip=("module.",)))
    held: dict[str, float] = {}
    for rank in range(ranks):
        for filled in load_files(found.of_rank(rank, ranks)):
            for tensor in filled.entry.tensors:
                raw = filled.segment.read(tensor.offset, tensor.offset + 4)
                held[tensor.name] = torch.frombuffer(bytearray(raw), dtype=torch.float32).item()
            filled.segment.discard()
    assert held == {"embed": 1.0, "norm": 1.0, "draft_model.embed": 2.0, "draft_model.norm": 2.0}


def test_rules_know_the_draft_by_its_prefix(served: Path, draft: Path) -> None:
    found = assemble(served, draft, NameRules(ignore=("draft_model.*norm",), strip=("module.",)))
    assert set(found.sent.values()) == {"embed", "norm", "draft_model.embed"}
    assert assemble(served, None, NameRules()).sent == {"module.embed": "module.embed", "module.norm": "module.norm"}


def test_what_is_no_draft_of_its_own_is_refused(served: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="takes part without being named"):
        assemble(served, served / ".." / "served", NameRules())
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointFormatError, match=r"holds no \.safetensors file"):
        assemble(served, tmp_path / "empty", NameRules())
