"""Code written for the names and shapes of upstream 0.4 runs against this package."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

import checkpoint_engine
from checkpoint_engine import data_types, worker
from checkpoint_engine.catalog import Catalog, Holding, SegmentEntry, TensorEntry
from checkpoint_engine.device_utils import DeviceManager, get_ip, npu_generate_uuid
from checkpoint_engine.errors import CheckpointFormatError, DuplicateTensorError, SettingError, UpdateError
from checkpoint_engine.reference.engine import ModelSpec, make_checkpoint
from checkpoint_engine.reference.process import ReferenceProcess
from checkpoint_engine.server.parameter_server import ParameterServer
from tests.core.cluster import Cluster
from tests.core.engines import assert_holds
from tests.ports import free_port

SPEC = ModelSpec(experts=2)

CATALOG = Catalog(
    "x",
    (
        Holding(
            rank=0,
            host="host-a",
            device="GPU-1",
            p2p_address="10.0.0.1:1234",
            rdma_device="mlx5_0",
            transport="rdma",
            control_address=1 << 42,
            generation=(1 << 63) - 1,
            content="abc",
            settling=0.5,
            segments=(
                # Used in place: a header stands before the first tensor.
                SegmentEntry(
                    4096,
                    (TensorEntry("a", "bfloat16", (3, 5), 200), TensorEntry("b", "float32", (), 512)),
                    address=1 << 40,
                ),
                SegmentEntry(
                    256, (TensorEntry("empty", "int64", (0, 7), 0), TensorEntry("c", "bool", (1,), 0)), 1 << 41
                ),
            ),
        ),
        Holding(rank=1, host="host-b", device="GPU-2", segments=()),
    ),
)

# What update scripts in the wild do, in one script; run as two ranks under torchrun.
UPDATE_SCRIPT = """
import os, pickle, sys
import torch
from pydantic import TypeAdapter
import checkpoint_engine.distributed as dist
from checkpoint_engine import request_inference_to_update
from checkpoint_engine.data_types import MemoryBufferMetaList
from checkpoint_engine.ps import ParameterServer
from safetensors import safe_open

endpoint, directory, out = sys.argv[1:]
rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
src = rank // 2 * 2

def req_func(socket_paths):
    if rank == src:
        request_inference_to_update(f"{endpoint}/collective_rpc", dict(socket_paths[src : src + 2]), timeout=60.0)

dist.use_backend(None)
ps = ParameterServer(auto_pg=True)
ps._p2p_store = None
ps.init_process_group()
assert dist.is_initialized()
dist.barrier()
torch.distributed.barrier()  # as SGLang's own update script does
file = sorted(f for f in os.listdir(directory) if f.endswith(".safetensors"))[rank]
named_tensors = {}
with safe_open(os.path.join(directory, file), framework="pt") as opened:
    for name in opened.keys():
        named_tensors[name] = opened.get_tensor(name)
ps.register_checkpoint("my-checkpoint-iter-0", files=[], named_tensors=named_tensors)
dist.barrier()
ps.gather_metas("my-checkpoint-iter-0")
if rank == 0:
    with open(f"{out}/metas.pkl", "wb") as f:
        pickle.dump(ps.get_metas(), f)
    with open(f"{out}/metas.json", "wb") as f:
        f.write(TypeAdapter(dict[int, MemoryBufferMetaList]).dump_json(ps.get_metas()))
ps.update("my-checkpoint-iter-0", req_func)
ps.update("my-checkpoint-iter-0", req_func, ranks=list(range(world_size)))

total = torch.tensor([rank + 1.0]); dist.all_reduce(total); assert total.item() == 3
largest = torch.tensor([rank]); dist.all_reduce(largest, torch.distributed.ReduceOp.MAX); assert largest.item() == 1
sent = torch.full((4,), rank); dist.broadcast(sent, src=1); assert sent.tolist() == [1] * 4
objects = [None, None]
dist.all_gather_object(objects, {"rank": rank, 7: (None, [b"x", 1.5, True])})
assert objects == [{"rank": r, 7: (None, [b"x", 1.5, True])} for r in (0, 1)], objects
for wrong in ({1, 2}, torch.ones(1), {"deep": [object()]}, 1 << 70):
    try:
        dist.all_gather_object([None, None], wrong)
    except ValueError as error:
        assert "all_gather_object" in str(error)
    else:
        raise AssertionError(wrong)
group = dist.new_group([1])
assert (group is not None) == (rank == 1)
if group:
    dist.barrier(group); dist.all_reduce(total, group=group); dist.destroy_process_group(group)
dist.destroy_process_group()
assert not dist.is_initialized()
# The script's own group is another one.
dist.init_process_group(rank, world_size, torch.distributed.TCPStore("127.0.0.1", int(os.environ["PORT"]),
                        world_size, rank == 0), timeout=__import__("datetime").timedelta(seconds=30), backend="gloo")
dist.barrier()
dist.destroy_process_group()
ps.unregister_checkpoint("my-checkpoint-iter-0")
ps.close()
assert not torch.distributed.is_initialized()
"""


def test_an_update_script_of_the_wild_runs_unchanged(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", SPEC, 3, shards=2)
    script = tmp_path / "update.py"
    script.write_text(UPDATE_SCRIPT)
    with ReferenceProcess(SPEC.to_json(), 2) as engine:
        done = run_ranks([str(script), engine.endpoint, str(checkpoint), str(tmp_path)])
        (_, said), second = done
        assert ([code for code, _ in done], second[1]) == ([0, 0], ""), done
        assert said.count("\n") == 1  # it writes metas of what is not shared
        assert "start all ranks with CHECKPOINT_ENGINE_P2P=1" in said
        assert_holds(engine, checkpoint)
    metas = pickle.loads((tmp_path / "metas.pkl").read_bytes())
    assert sorted(metas) == [0, 1]
    adapter = TypeAdapter(dict[int, data_types.MemoryBufferMetaList])
    read_back = adapter.validate_json((tmp_path / "metas.json").read_bytes())
    assert [m.memory_buffer_metas_list for m in read_back.values()] == [
        m.memory_buffer_metas_list for m in metas.values()
    ]


def run_ranks(arguments: list[str]) -> list[tuple[int, str]]:
    """Two ranks with torchrun's variables; exit codes and what they wrote to stderr."""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "PORT": str(free_port())}
    environment = {**os.environ, **common, "CHECKPOINT_ENGINE_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=90)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]


@pytest.fixture
def alone() -> Cluster:
    return Cluster(1)


def update_through_worker(cluster: Cluster, run: Callable[..., None], post_hook: Callable[[], None] | None) -> None:
    def req_func(socket_paths: list[tuple[str, str]]) -> None:
        ((_, handle),) = socket_paths
        worker.update_weights_from_ipc(None, handle, "cpu", run=run, post_hook=post_hook)

    cluster.servers[0].update("x", req_func, timeout=timedelta(seconds=20))


def test_a_worker_of_the_wild_gets_every_tensor_and_its_post_hook(alone: Cluster) -> None:
    sent = {f"w{i}": torch.randn(i, 3).to(torch.bfloat16) for i in range(50)}
    calls: list[object] = []
    got: dict[str, torch.Tensor] = {}

    def run(weights: list[tuple[str, torch.Tensor]]) -> None:
        assert isinstance(weights, list)
        calls.append("run")
        got.update({name: tensor.clone() for name, tensor in weights})

    try:
        alone.register("x", sent)
        update_through_worker(alone, run, lambda: calls.append("post_hook"))
    finally:
        alone.close()
    assert calls[-1] == "post_hook"
    assert calls.count("post_hook") == 1
    assert got.keys() == sent.keys()
    assert all(torch.equal(got[name], sent[name]) for name in sent)


def test_what_a_worker_of_the_wild_raises_ends_the_update(alone: Cluster) -> None:
    def fail(_: object = None) -> None:
        raise KeyError("no such parameter")

    try:
        alone.register("x", {"w": torch.ones(3)})
        with pytest.raises(UpdateError, match="no such parameter"):
            update_through_worker(alone, fail, None)
        with pytest.raises(UpdateError, match="no such parameter"):
            update_through_worker(alone, lambda _: None, fail)
        update_through_worker(alone, lambda _: None, None)
    finally:
        alone.close()


def test_torchs_own_group_is_left_alone_where_no_script_can_expect_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with ParameterServer(rank=0, world_size=1, device="cpu") as server:
        server.init_process_group()
        assert not torch.distributed.is_initialized()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with ParameterServer(device="cpu") as server:
        server.register_checkpoint("x", named_tensors={"w": torch.ones(3)})
        server.gather_metas("x")  # connects, without having been asked for a group
        assert not torch.distributed.is_initialized()
    with ParameterServer(device="cpu") as server:
        server.init_process_group()
        torch.distributed.barrier()
    assert not torch.distributed.is_initialized()


def test_all_known_names_are_there() -> None:
    from checkpoint_engine import ps

    for name in checkpoint_engine.__all__:
        if name != "VllmColocateWorkerExtension":
            assert getattr(checkpoint_engine, name) is not None
    assert checkpoint_engine.ParameterServer is ps.ParameterServer
    assert set(checkpoint_engine.__all__) <= set(dir(checkpoint_engine))
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = checkpoint_engine.nothing_of_the_kind
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = worker.nothing_of_the_kind


def test_importing_the_package_brings_no_torch() -> None:
    run_python("import sys, checkpoint_engine; assert 'torch' not in sys.modules")


def test_without_the_plugin_its_extension_names_the_install_command() -> None:
    done = run_python(
        "import sys; sys.modules['checkpoint_engine_vllm'] = None\n"
        "from checkpoint_engine.worker import VllmColocateWorkerExtension\n",
        expect=1,
    )
    assert "MissingDependencyError" in done.splitlines()[-1]
    assert "pip install checkpoint-engine-vllm" in done.splitlines()[-1]


def test_both_distributions_together_are_told(tmp_path: Path) -> None:
    install(tmp_path, "checkpoint-engine", "0.4.2")
    said = run_python("import checkpoint_engine", path=tmp_path)
    assert "RuntimeWarning: checkpoint-engine 0.4.2 and checkpoint-engine-core" in said
    assert "pip uninstall checkpoint-engine checkpoint-engine-core" in said
    assert run_python("import checkpoint_engine") == ""


def install(directory: Path, name: str, version: str) -> None:
    """What a package manager leaves behind for a distribution, without its files."""
    info = directory / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def run_python(script: str, expect: int = 0, path: Path | None = None) -> str:
    environment = {**os.environ, **({"PYTHONPATH": str(path)} if path else {})}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == expect, done.stderr
    return done.stderr


def test_metas_say_the_same_as_the_catalog() -> None:
    metas = data_types.catalog_to_metas(CATALOG)
    assert list(metas) == [0]
    first, second = metas[0].memory_buffer_metas_list
    assert (first.ptr, first.size) == ((1 << 40) + 200, 4096 - 200)
    assert [meta.aligned_size for meta in first.metas] == [312, 4096 - 512]
    assert second.metas[0].shape == torch.Size([0, 7])
    assert first.metas[0].dtype is torch.bfloat16
    assert metas[0].host_ip == "host-a"
    back = data_types.metas_to_catalog(metas, "x")
    assert back.fingerprint() == CATALOG.fingerprint()
    for old, new in zip(CATALOG.holdings[0].segments, back.holdings[0].segments, strict=True):
        assert [old.address + t.offset for t in old.tensors] == [new.address + t.offset for t in new.tensors]
        assert old.address + old.nbytes == new.address + new.nbytes
    assert back.holdings[0].p2p_address == "10.0.0.1:1234"
    # A catalog that came out of metas survives the next round as it is.
    assert data_types.metas_to_catalog(data_types.catalog_to_metas(back), "x") == back
    assert pickle.loads(pickle.dumps(metas)) == metas


def test_metas_as_json_are_the_same_for_pydantic_and_us() -> None:
    metas = data_types.catalog_to_metas(CATALOG)
    adapter = TypeAdapter(dict[int, data_types.MemoryBufferMetaList])  # as update scripts write and read them
    ours, theirs = data_types.metas_to_json(metas), adapter.dump_json(metas)
    assert json.loads(ours) == json.loads(theirs)
    assert json.loads(ours)["0"]["memory_buffer_metas_list"][0]["metas"][0] == {
        "name": "a",
        "dtype": "torch.bfloat16",
        "shape": [3, 5],
        "aligned_size": 312,
    }
    assert adapter.validate_json(theirs) == adapter.validate_json(ours) == metas
    assert data_types.metas_to_catalog(adapter.validate_json(theirs)) == data_types.metas_to_catalog(metas)
    read = data_types.metas_from_json(ours)
    assert read[0].memory_buffer_metas_list == metas[0].memory_buffer_metas_list
    for before, after in (
        (b"torch.bfloat16", b"bfloat16"),
        (b"torch.bfloat16", b"torch.nothing"),
        (b"[3,5]", b"[-3,5]"),
        (b"[3,5]", b"3"),
        (b"[3,5]", b"[1.5]"),
        (b'"0":', b'"zero":'),
        (b'"ptr"', b'"pointer"'),
    ):
        broken = ours.replace(before, after)
        with pytest.raises(CheckpointFormatError):
            data_types.metas_from_json(broken)
        with pytest.raises(ValidationError):
            adapter.validate_json(broken)


def test_metas_that_contradict_themselves_are_refused() -> None:
    def metas(aligned_size: int, size: int) -> dict[int, data_types.MemoryBufferMetaList]:
        entries = [
            data_types.ParameterMeta("a", torch.float32, torch.Size([10]), aligned_size),
            data_types.ParameterMeta("b", torch.float32, torch.Size([10]), 40),
        ]
        return {0: data_types.MemoryBufferMetaList(None, [data_types.MemoryBufferMetas(entries, 0, size)], "")}

    data_types.metas_to_catalog(metas(40, 80))
    for aligned_size, size in ((36, 80), (40, 79), (-40, 80)):
        with pytest.raises(CheckpointFormatError):
            data_types.metas_to_catalog(metas(aligned_size, size))
    with pytest.raises(DuplicateTensorError):
        data_types.metas_to_catalog({**metas(40, 80), 1: metas(40, 80)[0]})


def test_device_names() -> None:
    manager = DeviceManager()
    expected = ("cuda", "nccl") if torch.cuda.is_available() else ("cpu", "gloo")
    assert (manager.device_type, manager.backend) == expected
    assert manager.device_module.device_count() > 0
    with pytest.raises(SettingError, match="not supported"):
        npu_generate_uuid()


def test_the_own_address_is_one_of_this_host() -> None:
    import socket

    with socket.socket() as probe:
        probe.bind((get_ip(), 0))


def test_a_server_can_be_asked_through_the_module_of_its_api(alone: Cluster) -> None:
    from checkpoint_engine.api import request_inference_to_update

    try:
        alone.register("x", {"w": torch.ones(3)})

        def ask(addresses: list[tuple[str, str]]) -> None:
            request_inference_to_update(f"http://127.0.0.1:{free_port()}/collective_rpc", dict(addresses), timeout=5)

        with pytest.raises(UpdateError, match="cannot ask"):
            alone.servers[0].update("x", ask, timeout=timedelta(seconds=10))
    finally:
        alone.close()
