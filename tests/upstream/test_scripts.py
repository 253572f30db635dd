"""Scripts as upstream's users write them, with every argument by its name, on two ranks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import torch

from checkpoint_engine.api import request_inference_to_update
from checkpoint_engine.errors import DeadlineError, EngineRequestError
from checkpoint_engine.reference.engine import ModelSpec, make_checkpoint
from checkpoint_engine.reference.process import ReferenceProcess
from checkpoint_engine.server.parameter_server import ParameterServer
from tests.core.engines import assert_holds
from tests.core.p2p_help import needs_mooncake
from tests.ports import free_port

SPEC = ModelSpec(experts=2)

COMMON = """
import os, sys, datetime
import torch, torch.distributed
import checkpoint_engine.distributed as dist
from checkpoint_engine.ps import ParameterServer, request_inference_to_update

endpoint, directory = sys.argv[1:]
rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
file = sorted(os.path.join(directory, f) for f in os.listdir(directory) if f.endswith(".safetensors"))[rank]

def req_func(socket_paths: list[tuple[str, str]]):
    if rank == 0:
        request_inference_to_update(url=endpoint + "/collective_rpc", socket_paths=dict(socket_paths), timeout=60.0,
                                    uds=None)
"""

ALL_BY_KEYWORD = """
ps = ParameterServer(rank=rank, world_size=world_size, auto_pg=True, gpu_count=None, mem_fraction=0.5,
                     master_addr=None, master_port=None)
ps.register_checkpoint(checkpoint_name="a", files=[file], named_tensors=None, use_shared_memory_pool=False,
                       use_inplace_pin_memory=True)
ps.gather_metas(checkpoint_name="a")
torch.distributed.barrier()
dist.barrier(group=None)
ranks = [None, None]
dist.all_gather_object(object_list=ranks, obj=rank, group=None)
mine, first = torch.tensor([rank + 1.0]), torch.tensor([rank])
dist.all_reduce(tensor=mine, op=torch.distributed.ReduceOp.SUM, group=None)
dist.broadcast(tensor=first, src=0, group=None)
pair = dist.new_group(ranks=[0, 1])
dist.barrier(group=pair)
dist.destroy_process_group(group=pair)
assert (dist.is_initialized(), ranks, mine.item(), first.item()) == (True, [0, 1], 3.0, 0)
ps.update(checkpoint_name="a", req_func=req_func, timeout=datetime.timedelta(minutes=1), ranks=None)
assert not torch.distributed.is_initialized()
ps.gather_metas("a")
ps.store_based_barrier(timeout=datetime.timedelta(minutes=1))
ps.unregister_checkpoint(checkpoint_name="a", force=True)
ps.unregister_checkpoint("a")
torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{os.environ['PORT']}", rank=rank,
                                     world_size=world_size)  # a group of its own, afterwards
torch.distributed.barrier()
ps.close()
"""

ITS_OWN_GROUP = """
torch.distributed.init_process_group("gloo")
ps = ParameterServer(rank=rank, world_size=world_size, auto_pg=False)
ps.register_checkpoint("a", files=[file])
ps.gather_metas("a")
ps.update("a", req_func)
ps.close()
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def run_script(script: Path, arguments: list[str], port: int) -> None:
    """On two ranks, with what torchrun sets."""
    environment = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PORT": str(free_port()),
        "CHECKPOINT_ENGINE_DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",
        "TORCHELASTIC_RUN_ID": "none",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), *arguments],
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
    assert [process.returncode for process in processes] == [0, 0], errors


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("upstream"), SPEC, 3, shards=2)


def assert_runs(script: Path, body: str, checkpoint: Path, port: int) -> None:
    script.write_text(COMMON + body)
    with ReferenceProcess(SPEC.to_json(), 2) as engine:
        run_script(script, [engine.endpoint, str(checkpoint)], port)
        assert_holds(engine, checkpoint)


@pytest.mark.long
def test_a_script_with_every_argument_by_its_name_and_a_running_jobs_port(tmp_path: Path, checkpoint: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as running:
        assert_runs(tmp_path / "script.py", ALL_BY_KEYWORD, checkpoint, running.getsockname()[1])


@pytest.mark.long
def test_a_script_that_has_a_group_of_its_own(tmp_path: Path, checkpoint: Path) -> None:
    assert_runs(tmp_path / "script.py", ITS_OWN_GROUP, checkpoint, free_port())


def test_a_single_rank_connects_by_itself(caplog: pytest.LogCaptureFixture) -> None:
    with ParameterServer(rank=0, world_size=1, auto_pg=False, device="cpu") as server:
        server.register_checkpoint("a", named_tensors={"w": torch.ones(3)})
        server.gather_metas("a")
        for _ in range(2):
            assert list(server.get_metas()) == [0]
    assert caplog.text.count("of use within this job only") == 1


@needs_mooncake
@pytest.mark.usefixtures("p2p_environment")
def test_metas_that_are_loaded_serve_under_any_name(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (
        ParameterServer(rank=0, world_size=1, device="cpu") as seed,
        ParameterServer(rank=0, world_size=1, device="cpu") as joiner,
        ReferenceProcess(SPEC.to_json(), 1) as engine,
    ):
        seed.register_checkpoint("what the seed calls it", files=sorted(checkpoint.glob("*.safetensors")))
        seed.gather_metas("what the seed calls it")
        joiner.load_metas(seed.get_metas())
        joiner.update(
            "what the joiner calls it",
            lambda paths: request_inference_to_update(f"{engine.endpoint}/collective_rpc", dict(paths)),
            ranks=[0],
        )
        assert_holds(engine, checkpoint)
    assert "within this job only" not in caplog.text


def test_what_httpx_raises_is_caught(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}/collective_rpc"
    with pytest.raises(httpx.HTTPError, match="cannot ask") as refused:
        request_inference_to_update(url, {}, timeout=5)
    assert isinstance(refused.value, EngineRequestError)
    with pytest.raises(httpx.HTTPError):
        request_inference_to_update(url, {}, timeout=5, uds=str(tmp_path / "nobody"))
    with pytest.raises(httpx.TimeoutException) as late:
        request_inference_to_update(url, {}, timeout=0)
    assert isinstance(late.value, DeadlineError)
