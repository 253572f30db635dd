"""`checkpoint-engine verify` finds what differs between an engine and a checkpoint, and changes nothing."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_engine.cli.messages import Job, Logged, Progressed
from checkpoint_engine.cli.options import Engines, Patience
from checkpoint_engine.cli.ranks import Ranks
from checkpoint_engine.client.rpc_client import ReferenceClient
from checkpoint_engine.contract.figures import ComparisonFigures
from checkpoint_engine.contract.findings import Findings, same_bytes
from checkpoint_engine.deadline import Deadline
from checkpoint_engine.reference.engine import ModelSpec, make_checkpoint
from checkpoint_engine.reference.process import ReferenceProcess
from tests.commands import run_command
from tests.core.cluster import Cluster, Recorder

SPEC = ModelSpec(experts=2)
TP = 2
ON_BOTH = ("norm.weight", ".gate.weight", ".inv_freq", ".steps", ".scale", ".odd_bytes", ".mask", ".half")
"""How tensors end that each worker holds whole; of all others it has a part."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints, `served` and `altered`, in which a single bit of one norm is another."""
    directory = tmp_path_factory.mktemp("checkpoints")
    for name in ("served", "altered"):
        make_checkpoint(directory / name, SPEC, 0, shards=1)
    (file,) = (directory / "altered").glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.norm.weight"].view(torch.int16)[-1] ^= 1
    save_file(tensors, file)
    return directory


@pytest.fixture(scope="module")
def engine(checkpoints: Path) -> Iterator[ReferenceProcess]:
    with ReferenceProcess(SPEC.to_json(), TP) as process, Ranks(TP, device="cpu") as ranks:
        served = checkpoints / "served"
        job = Job(str(served), "step-1", Engines("reference", (process.endpoint,), TP), patience=Patience(30.0, 60.0))
        ranks.run(job, _ignore)
        yield process


def _ignore(event: Progressed | Logged) -> None:
    del event


def verify(directory: Path, engine: ReferenceProcess, *options: str) -> subprocess.CompletedProcess[str]:
    arguments = ["verify", directory, "--engine", "reference", "--endpoint", engine.endpoint, "-tp", TP]
    return run_command(*arguments, "--device", "cpu", *options, timeout=60)


def checksums(engine: ReferenceProcess) -> list[Any]:
    return ReferenceClient(engine.endpoint).collective_rpc("checksum", Deadline(20))


def test_equal_weights(engine: ReferenceProcess, checkpoints: Path) -> None:
    done = verify(checkpoints / "served", engine, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] is True
    assert [worker["rank"] for worker in report["workers"]] == [0, 1]
    assert all(worker["different_tensors"] == 0 < worker["compared_tensors"] for worker in report["workers"])
    (file,) = (checkpoints / "served").glob("*.safetensors")
    tensors = load_file(file)
    on_both = [tensor for name, tensor in tensors.items() if name.endswith(ON_BOTH)]
    expected = sum(tensor.nbytes for tensor in (*tensors.values(), *on_both))
    assert sum(worker["compared_bytes"] for worker in report["workers"]) == expected


def test_one_other_bit_is_found_named_and_left_as_it_is(engine: ReferenceProcess, checkpoints: Path) -> None:
    before = checksums(engine)
    done = verify(checkpoints / "altered", engine)
    assert done.returncode == 1, done.stderr
    assert "rank 0, different: model.norm.weight" in done.stdout
    assert "not equal to altered" in done.stdout
    assert checksums(engine) == before
    assert {worker.version for worker in ReferenceClient(engine.endpoint).status(Deadline(20))} == {"step-1"}


def test_an_engine_that_cannot_compare_says_so_and_is_not_updated() -> None:
    cluster = Cluster(1)
    try:
        cluster.register("step", {"a": torch.ones(4)})
        (result,) = cluster.on_all(lambda server: server.update("step", cluster.asker(0), reload="verify"))
        assert "cannot compare weights with a checkpoint" in str(result)
        assert not cluster.recorders[0].loaded
    finally:
        cluster.close()


def test_a_parameter_server_verifies_in_one_call() -> None:
    class Comparing(Recorder):
        def verifier(self) -> Recorder:
            return Compared()

    class Compared(Recorder):
        def finish(self) -> Mapping[str, str | int | float]:
            return {"compared_tensors": len(self.loaded), "different_tensors": 1, "different": "a"}

    cluster = Cluster(1)
    cluster.recorders[0] = Comparing()
    try:
        cluster.register("step", {"a": torch.ones(4), "b": torch.ones(4)})
        (found,) = cluster.on_all(lambda server: server.verify("step", cluster.asker(0)))
        assert isinstance(found, ComparisonFigures)
        assert (found.compared_tensors, found.different, found.equal) == (2, "a", False)
        assert not cluster.recorders[0].loaded
    finally:
        cluster.close()


def test_bits_count_not_values() -> None:
    nan = torch.tensor([float("nan")])
    assert same_bytes(nan, nan.clone())
    assert not same_bytes(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bytes(torch.zeros(2), torch.zeros(2, dtype=torch.float64))
    assert same_bytes(torch.arange(6).reshape(2, 3).t(), torch.tensor([[0, 3], [1, 4], [2, 5]]))
    assert same_bytes(torch.tensor(1.0), torch.tensor(1.0))


def test_a_report_names_the_first_and_counts_the_rest() -> None:
    findings = Findings()
    for index in range(10):
        findings.note(f"p{index}", torch.zeros(1), torch.ones(1))
    assert findings.details()["different_tensors"] == 10
    assert findings.details()["different"] == "p0, p1, p2, p3, p4, p5, p6, p7 and 2 more"
