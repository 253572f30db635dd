"""The benchmark of the seed's table: it sees a wrong byte, cuts models by layers, loses a row to a hang, and runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from steps import StepsError, run_steps
from trainer import Pattern, rows_of, wrong_bytes
from workloads import MIXTURES, Tensor, share_of, tensors_of

pytestmark = pytest.mark.pure
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CPU = torch.device("cpu")


@pytest.mark.thorough
def test_every_wrong_byte_is_seen_and_so_is_the_part_of_another_rank_or_step() -> None:
    tensors = tensors_of("smoke-fp8@2")
    pattern = Pattern(tensors, CPU)

    def take(rank: int, step: int) -> dict[str, torch.Tensor]:
        parts = {t.name: pattern.part(index, t, step, rank, 2).clone() for index, t in enumerate(tensors)}
        return {t.name: parts[t.name].contiguous().view(getattr(torch, t.dtype)) for t in tensors}

    held = take(1, 3)
    assert wrong_bytes(held, pattern, tensors, 3, 1, 2) == 0
    held["lm_head.weight"].view(torch.uint8)[5, 7] += 1
    assert wrong_bytes(held, pattern, tensors, 3, 1, 2) == 1
    assert wrong_bytes(take(0, 3), pattern, tensors, 3, 1, 2) > 1000
    assert wrong_bytes(take(1, 2), pattern, tensors, 3, 1, 2) == sum(part.nbytes for part in held.values())


@pytest.mark.parametrize("name", MIXTURES)
def test_shares_are_all_of_a_model_and_layers_are_as_many_as_fit(name: str) -> None:
    whole = MIXTURES[name]
    layers = whole.layers_of(60e9)
    tensors = tensors_of(f"{name}@{layers}")
    assert layers == whole.layers or sum(t.nbytes for t in tensors) < 60e9
    shares = [share_of(tensors, rank, 8) for rank in range(8)]
    assert [entry for share in shares for entry in share] == list(enumerate(tensors))


def test_rows_are_dealt_out_as_fsdp2_does_and_make_up_what_a_tensor_is() -> None:
    tensors = [Tensor("a", (7, 4), 0), Tensor("b", (5,), None), Tensor("c", (2, 3), 1)]
    pattern = Pattern(tensors, CPU)
    shares = [rows_of(tensors, rank, 4) for rank in range(4)]
    for index, tensor in enumerate(tensors):
        dealt = [share[index][2] for share in shares]
        sizes = [len(part) for part in torch.empty(tensor.shape).chunk(4)]
        assert [len(rows) for rows in dealt] == sizes + [0] * (4 - len(sizes))
        parts = [pattern.rows(index, tensor, 3, rows) for rows in dealt]
        assert torch.equal(torch.cat(parts), pattern.of(index, tensor, 3))


@pytest.mark.thorough
def test_a_system_that_is_not_done_in_time_is_ended() -> None:
    with pytest.raises(StepsError, match=r"not done after 0 s, 0 steps"):
        run_steps("device", "smoke-fp8@2", "cpu", 1, ranks=2, port=29400, seconds=0.2)


@pytest.mark.long
@pytest.mark.thorough
def test_the_table_is_made_on_a_machine_without_gpus(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "seed_table.py"), "--device", "cpu", "--workloads", "smoke-fp8"]
    systems = ["--systems", "device", "host-direct+host-broadcast", "upstream"]
    result = subprocess.run(
        [*command, "--gpus", "2", "--steps", "2", "--port", "29420", "--output", str(tmp_path), *systems],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    (file,) = tmp_path.iterdir()
    record = json.loads(file.read_text())
    assert {name: len(rows) for name, rows in record["steps"].items()} == {
        "device": 2,
        "host-direct": 2,
        "host-broadcast": 2,
    }
    assert record["failures"] == {"upstream": "left out: no --upstream"}
    assert "| ours: Update (Broadcast), 1 counted |" in result.stdout
