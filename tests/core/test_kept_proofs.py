"""Proofs that outlive the process: taken over by the next engine of the same kind, and by no other."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

import msgspec
import pytest
import torch

from checkpoint_engine.contract.sink import TensorSpec, Update
from checkpoint_engine.errors import WorkerError
from checkpoint_engine.reference.engine import ModelSpec, ReferenceEngine, make_checkpoint
from checkpoint_engine.reference.sink import ReferenceSink
from checkpoint_engine.reload import kept_proofs
from checkpoint_engine.reload import reloader as reloading
from checkpoint_engine.reload.kept_proofs import KeptProofs, proof_files
from checkpoint_engine.reload.plan import ReloadPlan, make_plan
from tests.core.forked import Forked
from tests.core.test_reloader import DENSE, MOE, altered, give, tensors_of

pytestmark = pytest.mark.pure

SPECS = {"a": TensorSpec(torch.bfloat16, (2, 3)), "b": TensorSpec(torch.float32, ())}


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where they are kept."""
    monkeypatch.setenv("CHECKPOINT_ENGINE_PROOFS", str(tmp_path / "proofs"))
    return tmp_path / "proofs"


def updated(directory: Path, spec: ModelSpec, rank: int = 0, size: int = 1) -> str:
    """How a fresh engine's first update went, which must leave what a cold start holds."""
    sink = ReferenceSink(ReferenceEngine(spec, tp_rank=rank, tp_size=size))
    way = give(sink, tensors_of(directory), "v").reload
    assert sink.engine.compare(ReferenceEngine.cold_start(directory, tp_rank=rank, tp_size=size)).equal
    return way


def tell_update(pipe: Connection, directory: Path) -> None:
    pipe.send(updated(directory, DENSE))


def test_a_proof_holds_for_engines_of_its_kind_alone(tmp_path: Path, kept: Path) -> None:
    dense, other = (make_checkpoint(tmp_path / f"{seed}", DENSE, seed=seed) for seed in (1, 2))
    moe = make_checkpoint(tmp_path / "moe", MOE, seed=1)
    assert [updated(dense, DENSE), updated(other, DENSE)] == ["proof", "plan"]
    assert [updated(dense, DENSE, rank, 2) for rank in (0, 1, 0, 1)] == ["proof", "proof", "plan", "plan"]
    assert [updated(moe, MOE) for _ in range(2)] == ["proof", "plan"]
    wide = msgspec.structs.replace(DENSE, heads=8)
    assert updated(make_checkpoint(tmp_path / "wide", wide, seed=1), wide) == "proof"
    assert {file.stat().st_mode & 0o777 for file in proof_files(kept)} == {0o600}
    assert kept.stat().st_mode & 0o777 == 0o700


@pytest.mark.thorough
def test_a_second_process_goes_by_plan_from_its_first_update(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "checkpoint", DENSE, seed=1)
    assert updated(directory, DENSE) == "proof"
    second = Forked(tell_update, directory)
    assert second.hear() == "plan"
    second.close()


@pytest.mark.parametrize("how", ["bit", "cut", "empty", "writable", "format", "claims"])
def test_what_is_damaged_stale_or_of_somebody_else_is_not_used_and_replaced(
    how: str, tmp_path: Path, kept: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = make_checkpoint(tmp_path / "checkpoint", DENSE, seed=1)
    updated(directory, DENSE)
    (file,) = proof_files(kept)
    whole = file.read_bytes()
    spoil(file, whole, how)
    assert updated(directory, DENSE) == "proof"
    assert "is not used, and will be replaced" in caplog.text
    assert file.read_bytes() == whole
    assert updated(directory, DENSE) == "plan"


def spoil(file: Path, whole: bytes, how: str) -> None:
    """With a digest that fits what it says, where that is something."""
    if how == "bit":
        file.write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
    elif how in ("cut", "empty"):
        file.write_bytes(whole[: -1 if how == "cut" else 0])
    elif how == "writable":
        file.chmod(0o620)
    else:
        said = msgspec.msgpack.decode(whole[32:])
        said[{"format": 0, "claims": 2}[how]] = {"format": 99, "claims": "0" * 64}[how]
        body = msgspec.msgpack.encode(said)
        file.write_bytes(hashlib.sha256(body).digest() + body)


def test_a_plan_that_records_otherwise_is_proved_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a plan comes from a file: what was proved of another one does not help a wrong one."""
    directory = make_checkpoint(tmp_path / "checkpoint", DENSE, seed=1)
    updated(directory, DENSE)

    def wrong(recording: object, targets: Mapping[str, torch.Tensor]) -> ReloadPlan:
        return altered(make_plan(recording, targets))  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(reloading, "make_plan", wrong)
        assert [updated(directory, DENSE) for _ in range(3)] == ["proof"] * 3, "what differs is proved every time"
    assert updated(directory, DENSE) == "plan"


def test_copies_that_go_astray_take_the_proof_with_them(tmp_path: Path, kept: Path) -> None:
    directory = make_checkpoint(tmp_path / "checkpoint", DENSE, seed=1)
    updated(directory, DENSE)
    sink, tensors = ReferenceSink(ReferenceEngine(DENSE)), tensors_of(directory)
    find = reloading.Replay.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reloading.Replay, "load", lambda self, tensors, moving: find(self, tensors[1:], moving))
        with pytest.raises(WorkerError, match="put something else"):
            give(sink, tensors, "v")
    sink.abort()
    assert proof_files(kept) == []
    assert [give(sink, tensors, "v").reload for _ in range(2)] == ["proof", "plan"]
    assert len(proof_files(kept)) == 1


def test_an_update_that_breaks_off_is_followed_by_a_proof_of_this_process(tmp_path: Path, kept: Path) -> None:
    directory = make_checkpoint(tmp_path / "checkpoint", DENSE, seed=1)
    updated(directory, DENSE)
    sink = ReferenceSink(ReferenceEngine(DENSE))
    give(sink, tensors_of(directory), "v")
    specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors_of(directory).items()}
    sink.begin(Update("id", "checkpoint", "v", specs, "auto"))
    sink.abort()
    assert give(sink, tensors_of(directory), "v").reload == "proof"
    assert len(proof_files(kept)) == 1, "others need not suffer for it"


def test_off_or_without_a_place_nothing_is_kept_and_nothing_fails(
    tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    directory = make_checkpoint(tmp_path / "checkpoint", DENSE, seed=1)
    monkeypatch.setenv("CHECKPOINT_ENGINE_PROOFS", "off")
    assert [updated(directory, DENSE) for _ in range(2)] == ["proof", "proof"]
    (tmp_path / "file").touch()
    monkeypatch.setenv("CHECKPOINT_ENGINE_PROOFS", str(tmp_path / "file" / "proofs"))
    assert [updated(directory, DENSE) for _ in range(2)] == ["proof", "proof"]
    assert "is not kept for the next engine" in caplog.text
    assert not kept.exists()


def test_many_at_once_leave_one_whole_file_and_old_ones_go(kept: Path) -> None:
    proofs = KeptProofs({"engine": "reference"})
    seen: list[bool] = []

    def write() -> None:
        for _ in range(20):
            proofs.keep("plan", SPECS)
            seen.append(proofs.has("plan", SPECS))

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(seen), all(seen)) == (160, True)
    assert len(list(kept.iterdir())) == 1
    assert proofs.last() == SPECS
    for number in range(70):
        proofs.keep(str(number), SPECS)
    assert len(proof_files(kept)) == 64
    assert (proofs.has("69", SPECS), proofs.has("plan", SPECS)) == (True, False)
    assert KeptProofs({"engine": "another"}).last() is None


def test_proofs_of_other_software_or_other_tensors_are_others(kept: Path) -> None:
    proofs = KeptProofs({"engine": "reference", "torch": "2.0"})
    proofs.keep("plan", SPECS)
    assert proofs.has("plan", SPECS)
    assert proofs.has("plan", dict(reversed(SPECS.items())))
    assert not proofs.has("another", SPECS)
    assert not proofs.has("plan", {**SPECS, "a": TensorSpec(torch.float16, (2, 3))})
    assert not KeptProofs({"engine": "reference", "torch": "2.1"}).has("plan", SPECS)
    assert not KeptProofs({"engine": "reference", "torch": "2.0"}, kept / "elsewhere").has("plan", SPECS)


def test_one_plan_is_looked_for_under_many_digests_and_its_tensors_are_gone_through_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    proofs = KeptProofs({"engine": "reference"})
    counted = mock.Mock(wraps=kept_proofs.fingerprint)
    monkeypatch.setattr(kept_proofs, "fingerprint", counted)
    assert not any(proofs.has(str(number), SPECS) for number in range(64))
    assert counted.call_count == 1
    proofs.keep("plan", {"a": SPECS["a"]})
    assert not proofs.has("plan", SPECS)
    assert counted.call_count == 3
