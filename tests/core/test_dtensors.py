"""Torch's own distributed tensors: real meshes of processes, every placement, FSDP over tensor parallelism."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from checkpoint_engine.boxes import TensorBox, find_box_fault
from checkpoint_engine.source.shards import _runs_of
from tests.ports import free_port

RANKS = 4


@pytest.fixture(scope="module")
def dealt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mesh")
    port = str(free_port())
    environment = {**os.environ, "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-m", "tests.core.dtensor_ranks"]
    processes = [
        subprocess.Popen([*command, str(directory / str(rank))], env={**environment, "RANK": str(rank)})
        for rank in range(RANKS)
    ]
    assert [process.wait(120) for process in processes] == [0] * RANKS
    return directory


def test_what_ranks_hold_makes_up_every_tensor(dealt: Path) -> None:
    expected = load_file(f"{dealt / '0'}.expected")
    made = {name: torch.full_like(tensor, torch.nan) for name, tensor in expected.items()}
    shards = 0
    for rank in range(RANKS):
        places = json.loads((dealt / str(rank)).read_text())["places"]
        for label, part in load_file(f"{dealt / str(rank)}.safetensors").items():
            name, whole, begin = places.get(label, (label, tuple(part.shape), (0,) * part.dim()))
            assert tuple(whole) == made[name].shape
            made[name][TensorBox(tuple(begin), tuple(part.shape)).slices] = part
            shards += label in places
    assert not [name for name, tensor in expected.items() if not torch.equal(made[name], tensor)]
    assert shards > len(expected)


def test_a_sum_that_is_still_to_be_made_is_refused(dealt: Path) -> None:
    assert "'sum' is still to be summed up over ranks" in json.loads((dealt / "0").read_text())["refusal"]


def test_what_was_given_before_is_told_from_what_is_given_now(dealt: Path) -> None:
    for rank in range(RANKS):
        steps = json.loads((dealt / str(rank)).read_text())["steps"]
        assert len(steps) == 13
        assert not [step for step, right in steps.items() if not right]


CUTS = st.one_of(st.none(), st.tuples(st.integers(0, 1), st.sampled_from([1, 2, 3])))


@settings(max_examples=200, deadline=None)
@given(
    st.tuples(st.integers(1, 9), st.integers(1, 4)),
    st.lists(st.tuples(st.integers(1, 3), CUTS), min_size=1, max_size=3),
)
def test_every_layout_gives_each_element_to_some_rank(whole: tuple[int, int], mesh: list[tuple[int, object]]) -> None:
    sizes, cuts = tuple(size for size, _ in mesh), tuple(cut for _, cut in mesh)
    boxes: dict[TensorBox, None] = {}
    for coordinate in torch.cartesian_prod(*(torch.arange(size) for size in sizes)).view(-1, len(sizes)).tolist():
        rows, columns = _runs_of(whole, sizes, cuts, tuple(coordinate))  # type: ignore[arg-type]
        boxes |= {
            TensorBox((r, c), (height, width)): None for r, height in rows for c, width in columns if height and width
        }
    assert find_box_fault(whole, tuple(boxes)) is None
