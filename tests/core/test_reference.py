"""The reference engine: what it holds, what it refuses, and its server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoint_engine.client.auto import load_client
from checkpoint_engine.client.rpc_client import ReferenceClient
from checkpoint_engine.client.update_request import request_inference_to_update
from checkpoint_engine.contract.sink import TensorSpec, Update
from checkpoint_engine.deadline import Deadline
from checkpoint_engine.errors import (
    DeadlineError,
    EngineRequestError,
    MissingDependencyError,
    SettingError,
    WeightsRejectedError,
)
from checkpoint_engine.reference.engine import ModelSpec, ReferenceEngine, make_checkpoint
from checkpoint_engine.reference.model import checkpoint_tensors
from checkpoint_engine.reference.process import ReferenceProcess
from checkpoint_engine.reference.sink import ReferenceSink

DENSE = ModelSpec()
MOE = ModelSpec(experts=4)
TIED = ModelSpec(tied=True, extras=False, dtype="float32")


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in directory.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def update_of(tensors: dict[str, torch.Tensor], version: str = "v1") -> Update:
    specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return Update("id", "checkpoint", version, specs)


@pytest.mark.parametrize("spec", [DENSE, MOE, TIED], ids=["dense", "moe", "tied"])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_cold_start_takes_the_files_bit_for_bit(spec: ModelSpec, tp_size: int, tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, spec, seed=1, shards=3)
    whole = tensors_of(directory)
    workers = [ReferenceEngine.cold_start(directory, tp_rank=rank, tp_size=tp_size) for rank in range(tp_size)]

    embedding = torch.cat([worker.parameters["model.embed_tokens.weight"] for worker in workers])
    assert torch.equal(embedding[: spec.vocab], whole["model.embed_tokens.weight"])
    o_proj = torch.cat([w.parameters["model.layers.1.self_attn.o_proj.weight"] for w in workers], dim=1)
    assert torch.equal(o_proj, whole["model.layers.1.self_attn.o_proj.weight"])
    keys = whole["model.layers.0.self_attn.k_proj.weight"]
    rows = spec.heads * spec.head_dim // tp_size
    for rank, worker in enumerate(workers):
        kv_rows = max(1, spec.kv_heads // tp_size) * spec.head_dim
        start = rank * spec.kv_heads // tp_size * spec.head_dim
        fused = worker.parameters["model.layers.0.self_attn.qkv_proj.weight"]
        assert torch.equal(fused[rows : rows + kv_rows], keys[start : start + kv_rows])
    if spec.experts:
        each = spec.intermediate // tp_size
        up = torch.cat([w.parameters["model.layers.0.mlp.experts.w13_weight"][3, each:] for w in workers])
        assert torch.equal(up, whole["model.layers.0.mlp.experts.3.up_proj.weight"])
    if spec.extras:
        assert all(torch.equal(w.parameters["model.steps"], whole["model.steps"]) for w in workers)


def test_every_parameter_differs_between_seeds_and_from_dummy_values(tmp_path: Path) -> None:
    a = ReferenceEngine.cold_start(make_checkpoint(tmp_path / "a", MOE, seed=1))
    b = ReferenceEngine.cold_start(make_checkpoint(tmp_path / "b", MOE, seed=2))
    with_elements = {name for name, parameter in a.parameters.items() if parameter.numel()}
    assert set(a.compare(b).different) == with_elements
    assert set(a.compare(ReferenceEngine(MOE)).different) == with_elements
    assert a.checksum() != b.checksum()
    assert a.compare(ReferenceEngine.cold_start(tmp_path / "a")).equal


def test_loading_never_moves_a_parameter(tmp_path: Path) -> None:
    engine = ReferenceEngine(DENSE, tp_rank=1, tp_size=2)
    before = engine.addresses()
    tensors = tensors_of(make_checkpoint(tmp_path, DENSE, seed=1))
    assert engine.load_weights(tensors.items()) == set(dict(checkpoint_tensors(DENSE)))
    assert engine.addresses() == before
    assert engine.compare(ReferenceEngine.cold_start(tmp_path, tp_rank=1, tp_size=2)).equal


def test_one_wrong_byte_is_found(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, DENSE, seed=1)
    engine, other = ReferenceEngine.cold_start(tmp_path), ReferenceEngine.cold_start(tmp_path)
    engine.parameters["model.norm.weight"].view(torch.uint8)[5] ^= 1
    assert engine.compare(other).different == ("model.norm.weight",)


@pytest.mark.parametrize("wrong", ["unknown", "misshapen", "missing"])
def test_an_update_of_other_tensors_writes_nothing(wrong: str, tmp_path: Path) -> None:
    engine = ReferenceEngine(DENSE)
    sink = ReferenceSink(engine)
    before = engine.checksum()
    tensors = tensors_of(make_checkpoint(tmp_path, DENSE, seed=1))
    if wrong == "unknown":
        tensors["model.surprise"] = torch.ones(3)
    elif wrong == "misshapen":
        tensors["model.norm.weight"] = torch.ones(DENSE.hidden + 1)
    else:
        del tensors["model.norm.weight"]
    named = "model.surprise" if wrong == "unknown" else "model.norm.weight"
    with pytest.raises(WeightsRejectedError, match=named):
        sink.begin(update_of(tensors))
    assert sink.abort() is True
    assert not sink.dirty
    assert engine.checksum() == before


def test_an_update_aborted_in_the_middle_is_dirty_until_the_next_one(tmp_path: Path) -> None:
    sink = ReferenceSink(ReferenceEngine(DENSE))
    tensors = tensors_of(make_checkpoint(tmp_path, DENSE, seed=1))
    sink.begin(update_of(tensors))
    sink.load(list(tensors.items())[:4])
    with pytest.raises(WeightsRejectedError, match="which did not come"):
        sink.finish()
    assert sink.abort() is False
    assert sink.dirty

    # A refused update changes nothing, so the older damage is still there.
    with pytest.raises(WeightsRejectedError):
        sink.begin(update_of({}))
    assert sink.abort() is False, "the link would say otherwise than the status"
    assert sink.dirty

    sink.begin(update_of(tensors, "v2"))
    sink.load(list(tensors.items()))
    sink.finish()
    assert not sink.dirty
    assert sink.version == "v2"
    assert sink.engine.compare(ReferenceEngine.cold_start(tmp_path)).equal


def test_sizes_that_cannot_be_divided_are_refused() -> None:
    with pytest.raises(SettingError, match="4 heads"):
        ReferenceEngine(DENSE, tp_size=3)
    with pytest.raises(SettingError, match="no model spec"):
        ModelSpec.parse('{"layrs": 3}')
    with pytest.raises(SettingError, match="float7"):
        ReferenceEngine(ModelSpec(dtype="float7"))


@pytest.fixture(scope="module")
def engine() -> Iterator[ReferenceProcess]:
    with ReferenceProcess(DENSE.to_json(), 2) as process:
        ReferenceClient(process.endpoint).wait_ready(Deadline(60))
        yield process


def test_server_answers_as_vllm_does(engine: ReferenceProcess) -> None:
    client = ReferenceClient(engine.endpoint)
    assert client.world_size() == 2
    assert [status.dirty for status in client.status(Deadline(10))] == [False, False]
    client.endpoint.call("POST", "/pause", Deadline(5), query={"mode": "keep"})
    assert client.endpoint.call("GET", "/is_paused", Deadline(5)) == {"is_paused": True}
    client.resume(Deadline(5))
    assert client.endpoint.call("GET", "/is_paused", Deadline(5)) == {"is_paused": False}
    client.reset_caches(Deadline(5))
    expected = ReferenceEngine(DENSE, tp_rank=1, tp_size=2).checksum()
    assert client.collective_rpc("checksum", Deadline(10))[1] == expected


def test_errors_of_the_server_reach_the_caller_in_words(engine: ReferenceProcess) -> None:
    client = ReferenceClient(engine.endpoint)
    with pytest.raises(EngineRequestError, match=r"answered POST /collective_rpc with 500.*no method 'nonsense'"):
        client.collective_rpc("nonsense", Deadline(10))
    with pytest.raises(EngineRequestError, match="with 404"):
        client.endpoint.call("GET", "/nothing", Deadline(5))
    with pytest.raises(EngineRequestError, match="mode is 'gently'"):
        client.endpoint.call("POST", "/pause", Deadline(5), query={"mode": "gently"})
    with pytest.raises(EngineRequestError, match="with 400"):
        client.endpoint.call("POST", "/collective_rpc", Deadline(5), body={"args": 7})
    with pytest.raises(EngineRequestError, match="cannot reach the parameter server"):
        request_inference_to_update(
            f"{engine.endpoint}/collective_rpc", {"a": "ce-link:///nope#t", "b": "ce-link:///n#t"}
        )


def test_a_failed_update_leaves_the_engine_serving_its_old_weights(engine: ReferenceProcess) -> None:
    client = ReferenceClient(engine.endpoint)
    handles = {"cpu:0": "ce-link:///nope#t", "cpu:1": "ce-link:///nope#t"}
    with pytest.raises(EngineRequestError, match=r"worker 0, 1 failed.*it still holds its old weights"):
        client.update_weights(handles, version="v", pause="keep", reset_caches=True, timeout=10)
    assert client.endpoint.call("GET", "/is_paused", Deadline(5)) == {"is_paused": False}


def test_clients_find_and_refuse_endpoints() -> None:
    assert load_client("reference") is ReferenceClient
    with pytest.raises(MissingDependencyError, match="pip install checkpoint-engine-nosuch"):
        load_client("nosuch")
    with pytest.raises(SettingError, match="unix:"):
        ReferenceClient("ftp://localhost:8000")
    with pytest.raises(DeadlineError, match="No such file"):
        ReferenceClient("unix:/nowhere/at/all.sock").wait_ready(Deadline(0.3))


def test_unix_socket_in_use_is_refused_and_a_dead_one_replaced(tmp_path: Path) -> None:
    path = tmp_path / "e"
    if len(str(path)) > 100:
        pytest.skip("the temporary directory's path is too long for a Unix socket")
    command = [sys.executable, "-m", "checkpoint_engine.reference.server", "--uds", str(path)]
    with ReferenceProcess(DENSE.to_json(), 1, uds=str(path)) as process:
        assert path.stat().st_mode & 0o077 == 0
        second = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        assert second.returncode == 1
        assert "AddressInUseError" in second.stderr
        os.kill(process.pid, signal.SIGKILL)
    assert path.exists()
    with ReferenceProcess(DENSE.to_json(), 1, uds=str(path)) as process:
        assert process.endpoint == f"unix:{path}"
    assert not path.exists()


def test_a_dead_worker_is_named_and_nobody_survives_the_front() -> None:
    with ReferenceProcess(DENSE.to_json(), 2) as process:
        client = ReferenceClient(process.endpoint)
        client.wait_ready(Deadline(60))
        pids = client.endpoint.call("GET", "/pids", Deadline(5))["pids"]
        os.kill(pids[1], signal.SIGKILL)
        with pytest.raises(EngineRequestError, match=r"worker 1 .*was killed by SIGKILL"):
            client.collective_rpc("checkpoint_engine_status", Deadline(10))
        with pytest.raises(DeadlineError, match="503"):
            client.wait_ready(Deadline(0.5))
        os.kill(process.pid, signal.SIGKILL)
    wait_until_gone(pids)


def wait_until_gone(pids: list[int]) -> None:
    patience = Deadline(10)
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        patience.check(f"the end of {pids}")
        time.sleep(0.05)
